// SPDX-License-Identifier: Apache-2.0
// Matrix tiles: C[16, 16] += A[16, 32] B[32, 16] by one wave, accumulated in fp32. Which element of A, B and C a lane holds is
// asked of a_row, a_k, b_k, b_col, c_row and c_col; nothing else knows the layout. K is 32 so that a lane of gfx9 holds 8
// neighbours along it, 16 bytes; on chips with K = 16 instructions two of them share the tile.
// Sources: AMD matrix instruction calculator; CDNA3, RDNA3 and RDNA4 instruction sets; PTX, mma.m16n8k16.
#pragma once

#include "grid.h"

namespace grid {

#if defined(__GFX9__) || (!defined(__AMDGCN__) && !defined(__CUDACC__) && GRID_WAVE == 64)
// MFMA: a lane holds one row, 8 neighbours along K.
constexpr int kTileAB = 8, kTileC = 4;
GRID_DEVICE int a_row(int lane, int) { return lane % 16; }
GRID_DEVICE int a_k(int lane, int i) { return lane / 16 * 8 + i; }
GRID_DEVICE int b_col(int lane, int) { return lane % 16; }
GRID_DEVICE int b_k(int lane, int i) { return lane / 16 * 8 + i; }
GRID_DEVICE int c_row(int lane, int i) { return lane / 16 * 4 + i; }
GRID_DEVICE int c_col(int lane, int) { return lane % 16; }
#elif defined(__GFX11__)
// WMMA of RDNA3: a lane holds one row and all of K; the upper half of the wave repeats the lower.
constexpr int kTileAB = 32, kTileC = 8;
GRID_DEVICE int a_row(int lane, int) { return lane % 16; }
GRID_DEVICE int a_k(int, int i) { return i; }
GRID_DEVICE int b_col(int lane, int) { return lane % 16; }
GRID_DEVICE int b_k(int, int i) { return i; }
GRID_DEVICE int c_row(int lane, int i) { return 2 * i + lane / 16; }
GRID_DEVICE int c_col(int lane, int) { return lane % 16; }
#elif defined(__CUDACC__)
// mma.sync: registers of A go row low, row high, then the upper half of K; B is two tiles of 8 columns.
constexpr int kTileAB = 16, kTileC = 8;
GRID_DEVICE int a_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
GRID_DEVICE int a_k(int lane, int i) { return lane % 4 * 2 + i % 2 + i % 8 / 4 * 8 + i / 8 * 16; }
GRID_DEVICE int b_col(int lane, int i) { return lane / 4 + i % 8 / 4 * 8; }
GRID_DEVICE int b_k(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 % 2 * 8 + i / 8 * 16; }
GRID_DEVICE int c_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
GRID_DEVICE int c_col(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }
#else
// WMMA of RDNA4, and the host with waves of 32: a lane holds one row, 8 neighbours of each half of K.
constexpr int kTileAB = 16, kTileC = 8;
GRID_DEVICE int a_row(int lane, int) { return lane % 16; }
GRID_DEVICE int a_k(int lane, int i) { return i / 8 * 16 + lane / 16 * 8 + i % 8; }
GRID_DEVICE int b_col(int lane, int) { return lane % 16; }
GRID_DEVICE int b_k(int lane, int i) { return i / 8 * 16 + lane / 16 * 8 + i % 8; }
GRID_DEVICE int c_row(int lane, int i) { return lane / 16 * 8 + i; }
GRID_DEVICE int c_col(int lane, int) { return lane % 16; }
#endif

// fp32 tiles exist on gfx9 (and on the host); RDNA and mma.sync have no fp32 matrix instruction.
#if defined(__GFX9__) || (!defined(__AMDGCN__) && !defined(__CUDACC__))
constexpr bool kHasF32Tiles = true;
#else
constexpr bool kHasF32Tiles = false;
#endif

template <class T>
struct Fragment {
    T v[kTileAB];
};
struct Accumulator {
    float v[kTileC];
};

#if defined(__AMDGCN__)

template <class Element, int N>
using Packed = Element __attribute__((ext_vector_type(N)));

template <class Element, int N, class T>
GRID_DEVICE Packed<Element, N> packed(const Fragment<T>& fragment, int first) {
    Packed<Element, N> out;
    GRID_UNROLL for (int i = 0; i < N; ++i) out[i] = bits_of<Element>(fragment.v[first + i].bits);
    return out;
}

GRID_DEVICE Packed<float, kTileC> packed(const Accumulator& c) {
    Packed<float, kTileC> out;
    GRID_UNROLL for (int i = 0; i < kTileC; ++i) out[i] = c.v[i];
    return out;
}

GRID_DEVICE void unpack(Accumulator& c, Packed<float, kTileC> from) {
    GRID_UNROLL for (int i = 0; i < kTileC; ++i) c.v[i] = from[i];
}

GRID_DEVICE void mma(Accumulator& c, const Fragment<bf16>& a, const Fragment<bf16>& b) {
    auto sum = packed(c);
#if defined(__gfx950__)
    sum = __builtin_amdgcn_mfma_f32_16x16x32_bf16(packed<__bf16, 8>(a, 0), packed<__bf16, 8>(b, 0), sum, 0, 0, 0);
#elif defined(__GFX9__)
    for (int half = 0; half < 8; half += 4) sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(packed<short, 4>(a, half), packed<short, 4>(b, half), sum, 0, 0, 0);
#elif defined(__GFX11__)
    for (int half = 0; half < 32; half += 16) sum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(packed<short, 16>(a, half), packed<short, 16>(b, half), sum);
#else
    for (int half = 0; half < 16; half += 8) sum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(packed<short, 8>(a, half), packed<short, 8>(b, half), sum);
#endif
    unpack(c, sum);
}

GRID_DEVICE void mma(Accumulator& c, const Fragment<f16>& a, const Fragment<f16>& b) {
    auto sum = packed(c);
#if defined(__gfx950__)
    sum = __builtin_amdgcn_mfma_f32_16x16x32_f16(packed<_Float16, 8>(a, 0), packed<_Float16, 8>(b, 0), sum, 0, 0, 0);
#elif defined(__GFX9__)
    for (int half = 0; half < 8; half += 4) sum = __builtin_amdgcn_mfma_f32_16x16x16f16(packed<_Float16, 4>(a, half), packed<_Float16, 4>(b, half), sum, 0, 0, 0);
#elif defined(__GFX11__)
    for (int half = 0; half < 32; half += 16) sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(packed<_Float16, 16>(a, half), packed<_Float16, 16>(b, half), sum);
#else
    for (int half = 0; half < 16; half += 8) sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(packed<_Float16, 8>(a, half), packed<_Float16, 8>(b, half), sum);
#endif
    unpack(c, sum);
}

#if defined(__GFX9__)
GRID_DEVICE void mma(Accumulator& c, const Fragment<float>& a, const Fragment<float>& b) {
    auto sum = packed(c);
    // Each instruction takes one k of every quarter of the wave: any four will do, as long as A and B agree.
    GRID_UNROLL for (int i = 0; i < 8; ++i) sum = __builtin_amdgcn_mfma_f32_16x16x4f32(a.v[i], b.v[i], sum, 0, 0, 0);
    unpack(c, sum);
}
#endif

#elif defined(__CUDACC__)

template <class T>
GRID_DEVICE u32 pair(const Fragment<T>& fragment, int i) {
    return fragment.v[i].bits | static_cast<u32>(fragment.v[i + 1].bits) << 16;
}

#define GRID_CUDA_MMA(type, name)                                                                                                            \
    GRID_DEVICE void mma(Accumulator& c, const Fragment<type>& a, const Fragment<type>& b) {                                                 \
        GRID_UNROLL for (int half = 0; half < 16; half += 8) GRID_UNROLL for (int t = 0; t < 2; ++t) asm(                                    \
            "mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
            : "+f"(c.v[4 * t]), "+f"(c.v[4 * t + 1]), "+f"(c.v[4 * t + 2]), "+f"(c.v[4 * t + 3])                                             \
            : "r"(pair(a, half)), "r"(pair(a, half + 2)), "r"(pair(a, half + 4)), "r"(pair(a, half + 6)), "r"(pair(b, half + 4 * t)),        \
              "r"(pair(b, half + 4 * t + 2)));                                                                                               \
    }
GRID_CUDA_MMA(bf16, "bf16")
GRID_CUDA_MMA(f16, "f16")

#else

template <class T>
struct TileProduct {
    const Fragment<T>*a, *b;
    Accumulator* c;
    GRID_NO_TSAN static void run(void** lanes) {
        float a[16][32], b[32][16];
        for (int l = 0; l < kWave; ++l) {
            const TileProduct& own = *static_cast<TileProduct*>(lanes[l]);
            for (int i = 0; i < kTileAB; ++i) {
                a[a_row(l, i)][a_k(l, i)] = to_float(own.a->v[i]);
                b[b_k(l, i)][b_col(l, i)] = to_float(own.b->v[i]);
            }
        }
        float sums[16][16] = {};
        for (int r = 0; r < 16; ++r)
            for (int k = 0; k < 32; ++k)
                for (int n = 0; n < 16; ++n) sums[r][n] += a[r][k] * b[k][n];
        for (int l = 0; l < kWave; ++l)
            for (int i = 0; i < kTileC; ++i) static_cast<TileProduct*>(lanes[l])->c->v[i] += sums[c_row(l, i)][c_col(l, i)];
    }
};

template <class T>
inline void mma(Accumulator& c, const Fragment<T>& a, const Fragment<T>& b GRID_SITE_AFTER) {
    TileProduct<T> operand{&a, &b, &c};
    host::collective(&TileProduct<T>::run, &operand, "mma", site);
}

#endif

// c times a factor for each row.
GRID_DEVICE void multiply(Accumulator& c, const float (&factors)[kTileC]) {
#if defined(__GFX9__)
    Packed<float, kTileC> wide;
    GRID_UNROLL for (int i = 0; i < kTileC; ++i) wide[i] = factors[i];
    unpack(c, packed(c) * wide);
#else
    GRID_UNROLL for (int i = 0; i < kTileC; ++i) c.v[i] *= factors[i];
#endif
}

// A from rows in memory: at(row, k) is the address of an element; those of 16 bytes along k are neighbours.
template <class T, class At>
GRID_DEVICE Fragment<T> load_a(At at) {
    Fragment<T> out;
#if defined(__CUDACC__)
    GRID_UNROLL for (int i = 0; i < kTileAB; ++i) out.v[i] = *at(a_row(lane(), i), a_k(lane(), i));
#else
    constexpr int kVector = 16 / sizeof(T);
    GRID_UNROLL for (int i = 0; i < kTileAB; i += kVector) {
        Vec<T, kVector> part = load<kVector>(at(a_row(lane(), i), a_k(lane(), i)));
        GRID_UNROLL for (int j = 0; j < kVector; ++j) out.v[i + j] = part.v[j];
    }
#endif
    return out;
}

// B whose columns are rows in memory: at(column, k).
template <class T, class At>
GRID_DEVICE Fragment<T> load_b_columns(At at) {
    Fragment<T> out;
#if defined(__CUDACC__)
    GRID_UNROLL for (int i = 0; i < kTileAB; ++i) out.v[i] = *at(b_col(lane(), i), b_k(lane(), i));
#else
    constexpr int kVector = 16 / sizeof(T);
    GRID_UNROLL for (int i = 0; i < kTileAB; i += kVector) {
        Vec<T, kVector> part = load<kVector>(at(b_col(lane(), i), b_k(lane(), i)));
        GRID_UNROLL for (int j = 0; j < kVector; ++j) out.v[i + j] = part.v[j];
    }
#endif
    return out;
}

// Which of the 16 * tiles columns is column `c` of tile `t`, where load_b_rows made the tiles.
template <class T, int kTiles>
GRID_DEVICE int spread_column(int c, int t) {
    return kTransposedReads && sizeof(T) == 2 ? 16 * t + c : kTiles * c + t;
}

// B tiles first..first+count of the kTiles that share 16 * kTiles columns, from rows in LDS: at(k, column). Neighbours in a row are
// 16 bytes long. Chips that transpose while they read get tiles side by side; on others a lane reads neighbours of a row as one and
// hands them to one tile each.
template <int kTiles, int kCount, class T, class At>
GRID_DEVICE void load_b_rows(Fragment<T> (&out)[kCount], int first, At at) {
#if defined(__gfx950__)
    if constexpr (sizeof(T) == 2) {
        using Part = short __attribute__((ext_vector_type(4)));
        // Four lanes read 4 rows of 16 columns; lane c of 16 receives column c.
        int row = lane() / 16 * 8 + lane() % 16 / 4, column = lane() % 4 * 4;
        GRID_UNROLL for (int t = 0; t < kCount; ++t) GRID_UNROLL for (int i = 0; i < 8; i += 4) {
            auto* from = (__attribute__((address_space(3))) Part*)at(row + i, 16 * (first + t) + column);
            Part part = __builtin_amdgcn_ds_read_tr16_b64_v4i16(from);
            GRID_UNROLL for (int j = 0; j < 4; ++j) out[t].v[i + j] = bits_of<T>(static_cast<short>(part[j]));
        }
        return;
    }
#endif
#if defined(__CUDACC__)
    GRID_UNROLL for (int t = 0; t < kCount; ++t) GRID_UNROLL for (int i = 0; i < kTileAB; ++i)
        out[t].v[i] = *at(b_k(lane(), i), kTiles * b_col(lane(), i) + first + t);
#else
    constexpr int kVector = kCount * sizeof(T) < 16 ? kCount : 16 / static_cast<int>(sizeof(T));
    GRID_UNROLL for (int i = 0; i < kTileAB; ++i) GRID_UNROLL for (int t = 0; t < kCount; t += kVector) {
        Vec<T, kVector> part = load<kVector>(at(b_k(lane(), i), kTiles * b_col(lane(), i) + first + t));
        GRID_UNROLL for (int j = 0; j < kVector; ++j) out[t + j].v[i] = part.v[j];
    }
#endif
}

}  // namespace grid
