// SPDX-License-Identifier: Apache-2.0
// Root-mean-square normalisation of a row, shared by rms_norm and add_rms_norm.
#pragma once

#include "row.h"

namespace grid {

struct NormParams {
    const void* x;       // [T, C]
    void* residual;      // [T, C], or null
    const void* weight;  // [C]
    i64 x_stride, residual_stride;
    int width;
    float eps;
    RowOut out;
};

// Split: one row per block, one 16-byte vector per thread, so a row of up to 1024 vectors stays in registers.
// Traffic: every byte once; wider rows are read a second time, from the cache.
// Why: `residual` gets the rounded sum only when the unrounded one is no longer needed.
template <class T, int N, bool kAdd>
GRID_DEVICE void normalise_row(const NormParams& p) {
    GRID_SHARED(float, sums, kMaxWaves);
    GRID_SHARED(u32, parts, kMaxWaves);
    i64 row = block_x();
    int first = thread_x(), num_vectors = p.width / N;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* residual = static_cast<T*>(p.residual) + (kAdd ? row * p.residual_stride : 0);

    auto read = [&](float(&v)[N], int vec, bool last_use) {
        Vec<T, N> loaded = load<N>(x + vec * N);
        GRID_UNROLL for (int i = 0; i < N; ++i) v[i] = to_float(loaded.v[i]);
        if (!kAdd) return;
        Vec<T, N> other = load<N>(residual + vec * N);
        GRID_UNROLL for (int i = 0; i < N; ++i) v[i] += to_float(other.v[i]);
        if (!last_use) return;
        GRID_UNROLL for (int i = 0; i < N; ++i) other.v[i] = from_float<T>(v[i]);
        store(residual + vec * N, other);
    };

    float held[N] = {}, total = 0.0f;
    if (first < num_vectors) read(held, first, true);
    GRID_UNROLL for (int i = 0; i < N; ++i) total += held[i] * held[i];
    for (int vec = first + num_threads(); vec < num_vectors; vec += num_threads()) {
        float v[N];
        read(v, vec, false);
        GRID_UNROLL for (int i = 0; i < N; ++i) total += v[i] * v[i];
    }
    float factor = rsqrt(block_sum(total, sums) / static_cast<float>(p.width) + p.eps);

    write_row<T, N>(p.out, row, p.width, 0, num_vectors, parts, [&](float(&v)[N], int vec, bool last_use) {
        if (vec == first) {
            GRID_UNROLL for (int i = 0; i < N; ++i) v[i] = held[i];
        } else {
            read(v, vec, last_use);
        }
        Vec<T, N> weight = load<N>(static_cast<const T*>(p.weight) + vec * N);
        GRID_UNROLL for (int i = 0; i < N; ++i) v[i] = v[i] * factor * to_float(weight.v[i]);
    });
}

// The host half of both ops: `residual` is null for rms_norm; Kernels::template get<T, N>() names the kernel.
template <class Kernels>
int launch_norm(const Args& args, const Tensor& y, const Tensor& scale, const Tensor& x, const Tensor* residual, const Tensor& weight) {
    i64 width = x.size[1], group = args.integer(1);
    if (width > 1 << 30) return fail(args, "x: expected rows of at most 2^30 elements, got %lld", width);
    if (int refused = check_row_out(args, y, scale, x.type, width, group)) return refused;
    bool wide = aligned(x, width, 16) && aligned(weight, width, 16) && aligned(y, width, group ? 16 / item_size(x.type) : 16);
    if (residual) wide = wide && aligned(*residual, width, 16);
    return by_float_type(args, x, [&](auto element) {
        using T = decltype(element);
        return by_vector_width<T>(wide, [&](auto n) {
            constexpr int N = decltype(n)::value;
            NormParams params{x.data,  residual ? residual->data : nullptr, weight.data, x.stride[0], residual ? residual->stride[0] : 0, static_cast<int>(width),
                              args.real(0), row_out(y, scale, group, width, N)};
            return launch(args, Kernels::template get<T, N>(), {x.size[0]}, threads_for(args, width / N, 1024), params, table_bytes(params.out, width));
        });
    });
}

}  // namespace grid
