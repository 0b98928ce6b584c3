// SPDX-License-Identifier: Apache-2.0
// Moving rows into a cache, with the rotary embedding on the way: what store_kv, store_mla and mla_decode share.
#pragma once

#include "grid/abi.h"

namespace grid {

// A cache row's element type is known at run time: that of the values, or an fp8 dialect with a scale.
struct CacheType {
    bool is_fp8, fnuz;
    float scale;  // value = code * scale
};

inline CacheType cache_type(const Tensor& cache, float scale) { return {is_fp8(cache), cache.type == kFp8Fnuz, is_fp8(cache) ? scale : 1.0f}; }

struct Rope {
    const float* table;  // [L, 2 * half]: cos, then sin; null for no rotation
    i64 table_stride;
    const i64* positions;
    int half;
    bool interleaved;
};

inline Rope rope_of(const Tensor& table, const Tensor& positions, bool interleaved) {
    return {table.as<float>(), table ? table.stride[0] : 0, positions.as<i64>(), table ? static_cast<int>(table.size[1] / 2) : 0, interleaved};
}

// Products and sum are rounded one by one, so that every kernel, compiler and chip stores the same bits.
GRID_DEVICE void rotate(float& a, float& b, float cosine, float sine) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
#if defined(__CUDA_ARCH__)
    float turned = __fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine));
    b = __fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine));
#else
    float turned = a * cosine - b * sine;
    b = b * cosine + a * sine;
#endif
    a = turned;
}

template <class T, int N>
GRID_DEVICE void store_cached(void* row, const CacheType& type, int column, const float (&values)[N]) {
    if (type.is_fp8) {
        float scaled[N];
        GRID_UNROLL for (int i = 0; i < N; ++i) scaled[i] = values[i] / type.scale;
        store(static_cast<fp8*>(row) + column, encode(scaled, type.fnuz));
    } else {
        Vec<T, N> rounded;
        GRID_UNROLL for (int i = 0; i < N; ++i) rounded.v[i] = from_float<T>(values[i]);
        store(static_cast<T*>(row) + column, rounded);
    }
}

template <class T, int N>
GRID_DEVICE void load_wide(float (&values)[N], const T* address) {
    Vec<T, N> loaded = load<N>(address);
    GRID_UNROLL for (int i = 0; i < N; ++i) values[i] = to_float(loaded.v[i]);
}

// Work items of a row of `width`, of which the first 2 * half are rotated: each turns N pairs, or copies N elements.
GRID_DEVICE int row_items(int width, int half, int vector) { return half / vector + (width - 2 * half) / vector; }

// Does item `item` of a row. `cosines` is the row of the table at this position.
template <class T, int N>
GRID_DEVICE void move_item(const T* from, void* to, const CacheType& type, int item, const float* cosines, int half, bool interleaved) {
    int num_turned = half / N;
    if (item >= num_turned) {
        int column = 2 * half + (item - num_turned) * N;
        float values[N];
        load_wide<T, N>(values, from + column);
        store_cached<T, N>(to, type, column, values);
        return;
    }
    int pair = item * N;
    float a[N], b[N], c[N], s[N];
    GRID_UNROLL for (int i = 0; i < N; ++i) c[i] = cosines[pair + i], s[i] = cosines[half + pair + i];
    if (interleaved) {
        // Pairs are neighbours: 2 * N elements in a row hold N of them.
        load_wide<T, N>(a, from + 2 * pair);
        load_wide<T, N>(b, from + 2 * pair + N);
        float both[2 * N];
        GRID_UNROLL for (int i = 0; i < N; ++i) both[i] = a[i], both[N + i] = b[i];
        GRID_UNROLL for (int i = 0; i < N; ++i) rotate(both[2 * i], both[2 * i + 1], c[i], s[i]);
        GRID_UNROLL for (int i = 0; i < N; ++i) a[i] = both[i], b[i] = both[N + i];
        store_cached<T, N>(to, type, 2 * pair, a);
        store_cached<T, N>(to, type, 2 * pair + N, b);
    } else {
        load_wide<T, N>(a, from + pair);
        load_wide<T, N>(b, from + half + pair);
        GRID_UNROLL for (int i = 0; i < N; ++i) rotate(a[i], b[i], c[i], s[i]);
        store_cached<T, N>(to, type, pair, a);
        store_cached<T, N>(to, type, half + pair, b);
    }
}

inline int check_rope_args(const Args& args, const char* names, const Tensor& q, const Tensor& positions, const Tensor& table, i64 width) {
    bool all = q && positions && table, none = !q && !positions && !table;
    if (!all && !none) return fail(args, "%s: expected all or none of them, got some", names);
    if (table && (table.size[1] % 2 || table.size[1] > width))
        return fail(args, "table: expected an even width of at most %lld, got %lld", width, table.size[1]);
    return 0;
}

}  // namespace grid
