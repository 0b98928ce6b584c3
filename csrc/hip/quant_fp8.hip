// SPDX-License-Identifier: Apache-2.0
#include "row.h"

using namespace grid;

struct QuantParams {
    const void* x;  // [T, K]
    i64 x_stride;
    int width, vectors_per_block;
    RowOut out;
};

// Split: a block owns vectors_per_block vectors of N elements of one row; the whole row if a scale spans it.
// Traffic: every byte once (twice, from the cache, if a scale spans the row).
// Why: with N = 16 codes leave in 16 bytes too, and what a wave does once serves twice as many.
template <class T, int N>
GRID_KERNEL(256) void quant_fp8_kernel(const QuantParams p) {
    GRID_SHARED(u32, parts, kMaxWaves);
    i64 row = block_x();
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    int first = block_y() * p.vectors_per_block;
    int last = smaller(first + p.vectors_per_block, p.width / N);
    write_row<T, N>(p.out, row, p.width, first, last, parts, [&](float(&v)[N], int vec, bool) {
        constexpr int kPart = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
        GRID_UNROLL for (int i = 0; i < N; i += kPart) {
            Vec<T, kPart> loaded = load<kPart>(x + vec * N + i);
            GRID_UNROLL for (int j = 0; j < kPart; ++j) v[i + j] = to_float(loaded.v[j]);
        }
    });
}

// scalars: out_dtype, group
GRID_OP(quant_fp8, "y", "scale", "x") {
    const Tensor &y = args[0], &scale = args[1], &x = args[2];
    i64 width = x.size[1], group = args.integer(1);
    if (group <= 0) return fail(args, "group: expected group > 0, got %lld", group);
    if (width > 1 << 30) return fail(args, "x: expected rows of at most 2^30 elements, got %lld", width);
    if (int refused = check_row_out(args, y, scale, x.type, width, group)) return refused;
    bool wide = aligned(x, width, 16) && aligned(y, width, 16 / item_size(x.type));
    return by_float_type(args, x, [&](auto element) {
        using T = decltype(element);
        auto launch_as = [&](auto n) {
            constexpr int N = decltype(n)::value;
            RowOut out = row_out(y, scale, group, width, N);
            bool whole = out.groups == Groups::kRow || out.groups == Groups::kTable;
            int threads = threads_for(args, width / N, whole ? 256 : 128);  // fewer leave less of the last block idle
            int share = whole ? static_cast<int>(width / N) : threads;
            QuantParams params{x.data, x.stride[0], static_cast<int>(width), share, out};
            return launch(args, quant_fp8_kernel<T, N>, {x.size[0], whole ? 1 : ceil_div(width / N, share)}, threads, params, table_bytes(out, width));
        };
        bool widest = wide && width % 16 == 0 && aligned(y, width, 16) && groups_for(static_cast<int>(group), static_cast<int>(width), 16) == Groups::kLanes;
        return sizeof(T) == 2 && widest ? launch_as(Const<16>{}) : by_vector_width<T>(wide, launch_as);
    });
}
