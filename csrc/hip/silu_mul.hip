// SPDX-License-Identifier: Apache-2.0
#include "row.h"

using namespace grid;

struct SiluMulParams {
    const void* x;  // [T, 2 * width], gate then up
    i64 x_stride;
    int width, vectors_per_block;
    RowOut out;
};

// Split: a block owns vectors_per_block 16-byte vectors of one row; the whole row if a scale spans it.
// Traffic: every byte once (the row's gate and up twice, from the cache, if a scale spans it).
template <class T, int N>
GRID_KERNEL(256) void silu_mul_kernel(const SiluMulParams p) {
    GRID_SHARED(u32, parts, kMaxWaves);
    i64 row = block_x();
    const T* gate = static_cast<const T*>(p.x) + row * p.x_stride;
    int first = block_y() * p.vectors_per_block;
    int last = smaller(first + p.vectors_per_block, p.width / N);
    write_row<T, N>(p.out, row, p.width, first, last, parts, [&](float(&v)[N], int vec, bool) {
        Vec<T, N> g = load<N>(gate + vec * N), up = load<N>(gate + p.width + vec * N);
        GRID_UNROLL for (int i = 0; i < N; ++i) {
            float value = to_float(g.v[i]);
            v[i] = value * reciprocal(1.0f + exp2(-kLog2E * value)) * to_float(up.v[i]);
        }
    });
}

// scalars: group
GRID_OP(silu_mul, "y", "scale", "x") {
    const Tensor &y = args[0], &scale = args[1], &x = args[2];
    i64 width = x.size[1] / 2, group = args.integer(0);
    if (x.size[1] % 2) return fail(args, "x: expected an even row length, gate and up side by side, got %lld", x.size[1]);
    if (width > 1 << 29) return fail(args, "x: expected rows of at most 2^30 elements, got %lld", x.size[1]);
    if (int refused = check_row_out(args, y, scale, x.type, width, group)) return refused;
    bool wide = aligned(x, width, 16) && aligned(y, width, group ? 16 / item_size(x.type) : 16);
    return by_float_type(args, x, [&](auto element) {
        using T = decltype(element);
        return by_vector_width<T>(wide, [&](auto n) {
            constexpr int N = decltype(n)::value;
            RowOut out = row_out(y, scale, group, width, N);
            bool whole = out.groups == Groups::kRow || out.groups == Groups::kTable;
            int threads = threads_for(args, width / N, whole ? 256 : 128);  // fewer leave less of the last block idle
            int share = whole ? static_cast<int>(width / N) : threads;
            SiluMulParams params{x.data, x.stride[0], static_cast<int>(width), share, out};
            return launch(args, silu_mul_kernel<T, N>, {x.size[0], whole ? 1 : ceil_div(width / N, share)}, threads, params, table_bytes(out, width));
        });
    });
}
