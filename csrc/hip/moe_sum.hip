// SPDX-License-Identifier: Apache-2.0
#include "grid/abi.h"

using namespace grid;

struct MoeSumParams {
    const void* y;       // [T, K, C]
    const void* addend;  // [T, C], or null
    void* out;           // [T, C]
    i64 y_stride, k_stride, addend_stride, out_stride;
    int num_terms, width;
    float scale;
};

// Split: one 16-byte vector of one token per thread. Traffic: every byte once.
// Why: the terms are added in the order of K, so a token's sum does not depend on where its experts ran.
template <class T, int N>
GRID_KERNEL(256) void moe_sum_kernel(const MoeSumParams p) {
    i64 row = block_x();
    int column = (block_y() * num_threads() + thread_x()) * N;
    if (column >= p.width) return;
    const T* y = static_cast<const T*>(p.y) + row * p.y_stride + column;
    float total[N] = {};
    for (int k = 0; k < p.num_terms; ++k) {
        Vec<T, N> term = load<N>(y + k * p.k_stride);
        GRID_UNROLL for (int i = 0; i < N; ++i) total[i] += to_float(term.v[i]);
    }
    GRID_UNROLL for (int i = 0; i < N; ++i) total[i] *= p.scale;
    if (p.addend) {
        Vec<T, N> more = load<N>(static_cast<const T*>(p.addend) + row * p.addend_stride + column);
        GRID_UNROLL for (int i = 0; i < N; ++i) total[i] += to_float(more.v[i]);
    }
    Vec<T, N> rounded;
    GRID_UNROLL for (int i = 0; i < N; ++i) rounded.v[i] = from_float<T>(total[i]);
    store(static_cast<T*>(p.out) + row * p.out_stride + column, rounded);
}

// scalars: scale
GRID_OP(moe_sum, "out", "y", "addend") {
    const Tensor &out = args[0], &y = args[1], &addend = args[2];
    i64 width = y.size[2];
    bool wide = aligned(out, width, 16) && aligned(y, width, 16) && aligned(addend, width, 16);
    return by_float_type(args, y, [&](auto element) {
        using T = decltype(element);
        return by_vector_width<T>(wide, [&](auto n) {
            constexpr int N = decltype(n)::value;
            MoeSumParams params{y.data,        addend.data,   out.data,      y.stride[0], y.stride[1], addend ? addend.stride[0] : 0,
                                out.stride[0], static_cast<int>(y.size[1]), static_cast<int>(width), args.real(0)};
            int threads = threads_for(args, width / N, 256);
            return launch(args, moe_sum_kernel<T, N>, {y.size[0], ceil_div(width / N, threads)}, threads, params);
        });
    });
}
