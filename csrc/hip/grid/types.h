// SPDX-License-Identifier: Apache-2.0
// Number types with the same bits on every target, and vectors of 16 bytes. Every conversion rounds to nearest even.
#pragma once

namespace grid {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
// One code of either fp8 dialect; which one is a run-time fact of the tensor.
struct fp8 {
    u8 bits;
};

enum Type : int { kBf16 = 0, kF16 = 1, kF32 = 2, kI32 = 3, kI64 = 4, kU8 = 5, kFp8Fn = 6, kFp8Fnuz = 7 };

template <class To, class From>
GRID_DEVICE To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits_of: sizes differ");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T v[N];
};

template <int N, class T>
GRID_DEVICE Vec<T, N> load(const T* address) {
    return *reinterpret_cast<const Vec<T, N>*>(address);
}
template <int N, class T>
GRID_DEVICE void store(T* address, const Vec<T, N>& vec) {
    *reinterpret_cast<Vec<T, N>*>(address) = vec;
}

// ---- 16 and 32 bits

GRID_DEVICE float to_float(float x) { return x; }
GRID_DEVICE float to_float(bf16 x) { return bits_of<float>(static_cast<u32>(x.bits) << 16); }

GRID_DEVICE float to_float(f16 x) {
#if defined(__AMDGCN__)
    return static_cast<float>(bits_of<_Float16>(x.bits));
#elif defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    u32 sign = static_cast<u32>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    if (rest >= 0x7C00) return bits_of<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    return bits_of<float>(sign | bits_of<u32>(bits_of<float>(rest << 13) * 0x1p112f));
#endif
}

template <class T>
GRID_DEVICE T from_float(float x);

template <>
GRID_DEVICE float from_float<float>(float x) {
    return x;
}

template <>
GRID_DEVICE bf16 from_float<bf16>(float x) {
#if defined(__AMDGCN__)
    return bits_of<bf16>(static_cast<__bf16>(x));
#else
    u32 bits = bits_of<u32>(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return {static_cast<u16>((bits >> 16) | 0x40)};
    return {static_cast<u16>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
#endif
}

template <>
GRID_DEVICE f16 from_float<f16>(float x) {
#if defined(__AMDGCN__)
    return bits_of<f16>(static_cast<_Float16>(x));
#elif defined(__CUDA_ARCH__)
    f16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
    return half;
#else
    u32 bits = bits_of<u32>(x), size = bits & 0x7FFFFFFF, half;
    if (size > 0x7F800000) {
        half = 0x7E00;
    } else if (size >= 0x477FF000) {
        half = 0x7C00;
    } else if (size < 0x38800000) {
        half = bits_of<u32>(bits_of<float>(size) + 0.5f) - 0x3F000000;  // an ulp of 0.5 is the smallest half
    } else {
        half = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10);
    }
    return {static_cast<u16>(half | (bits >> 16 & 0x8000))};
#endif
}

template <class T, int N>
GRID_DEVICE Vec<T, N> rounded(const float (&values)[N]) {
    Vec<T, N> out;
    GRID_UNROLL for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(values[i]);
    return out;
}

// ---- fp8: e4m3fn (largest 448, NaN 0x7F) and e4m3fnuz (largest 240, NaN 0x80, no -0)

GRID_DEVICE float largest_fp8(bool fnuz) { return fnuz ? 240.0f : 448.0f; }

// The dialect that this chip converts in one instruction.
#if defined(__gfx942__)
constexpr bool kHasFp8 = true, kFnuzHere = true;
#elif defined(__gfx950__) || defined(__gfx1200__) || defined(__gfx1201__)
constexpr bool kHasFp8 = true, kFnuzHere = false;
#else
constexpr bool kHasFp8 = false, kFnuzHere = false;
#endif

GRID_DEVICE u8 fp8_code(float x, bool fnuz) {
    u32 bits = bits_of<u32>(x), size = bits & 0x7FFFFFFF, sign = bits >> 24 & 0x80;
    int bias = fnuz ? 8 : 7;
    u32 code;
    if (size > 0x7F800000) {
        return fnuz ? 0x80 : static_cast<u8>(0x7F | sign);
    } else if (size < static_cast<u32>(128 - bias) << 23) {
        float steps = bits_of<float>(size) * (fnuz ? 0x1p10f : 0x1p9f) + 0x1p23f;  // an ulp of 2^23 is 1
        code = bits_of<u32>(steps) - 0x4B000000;
    } else {
        code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (static_cast<u32>(127 - bias) << 3);
    }
    return static_cast<u8>(fnuz && code == 0 ? 0 : code | sign);
}

GRID_DEVICE float fp8_value(u8 code, bool fnuz) {
    u32 rest = code & 0x7F, sign = static_cast<u32>(code & 0x80) << 24;
    if (fnuz ? code == 0x80 : rest == 0x7F) return bits_of<float>(0x7FC00000u);
    return bits_of<float>(sign | bits_of<u32>(bits_of<float>(rest << 20) * (fnuz ? 0x1p119f : 0x1p120f)));
}

// Values that lie within what the dialect holds, to codes. Whole words, so that the compiler takes no bytes apart.
template <int N>
GRID_DEVICE Vec<fp8, N> encode_within(const float (&values)[N], bool fnuz) {
    constexpr int kWords = (N + 3) / 4;
    u32 words[kWords] = {};
#if defined(__AMDGCN__) && (defined(__gfx942__) || defined(__gfx950__) || defined(__gfx1200__) || defined(__gfx1201__))
    if (fnuz == kFnuzHere) {
        GRID_UNROLL for (int i = 0; i < N; i += 4) {
            int word = __builtin_amdgcn_cvt_pk_fp8_f32(values[i], i + 1 < N ? values[(i + 1) % N] : 0.0f, 0, false);
            words[i / 4] = i + 2 < N ? __builtin_amdgcn_cvt_pk_fp8_f32(values[(i + 2) % N], values[(i + 3) % N], word, true) : word;
        }
    } else
#endif
        GRID_UNROLL for (int i = 0; i < N; ++i) words[i / 4] |= static_cast<u32>(fp8_code(values[i], fnuz)) << i % 4 * 8;
    Vec<fp8, N> codes;
    __builtin_memcpy(&codes, words, N);
    return codes;
}

// Values to codes; clamped to what the dialect holds, because fnuz turns what lies beyond into NaN. NaN stays NaN.
template <int N>
GRID_DEVICE Vec<fp8, N> encode(const float (&values)[N], bool fnuz) {
    float kept[N];
    float largest = largest_fp8(fnuz);
    GRID_UNROLL for (int i = 0; i < N; ++i) {
        float x = values[i];
        kept[i] = x > largest ? largest : x < -largest ? -largest : x;
    }
    return encode_within(kept, fnuz);
}

// x clamped to -limit .. limit; NaN only if both are.
GRID_DEVICE float within(float x, float limit) {
#if defined(__AMDGCN__)
    return __builtin_amdgcn_fmed3f(x, -limit, limit);
#else
    return x > limit ? limit : x < -limit ? -limit : x;
#endif
}

GRID_DEVICE float decode(fp8 code, bool fnuz) {
#if defined(__AMDGCN__) && (defined(__gfx942__) || defined(__gfx950__) || defined(__gfx1200__) || defined(__gfx1201__))
    if (fnuz == kFnuzHere) return __builtin_amdgcn_cvt_f32_fp8(code.bits, 0);
#endif
    return fp8_value(code.bits, fnuz);
}

// x as a T that holds it exactly.
template <class T>
GRID_DEVICE T exactly(float x) {
    return from_float<T>(x);
}
template <>
GRID_DEVICE bf16 exactly<bf16>(float x) {
    return {static_cast<u16>(bits_of<u32>(x) >> 16)};
}

// The four codes of a word. kNative: they are of the dialect that the chip converts.
template <class T, bool kNative>
GRID_DEVICE Vec<T, 4> decode_word(u32 word, bool fnuz) {
    float values[4];
#if defined(__AMDGCN__) && (defined(__gfx942__) || defined(__gfx950__) || defined(__gfx1200__) || defined(__gfx1201__))
    if constexpr (kNative) {
        auto low = __builtin_amdgcn_cvt_pk_f32_fp8(word, false), high = __builtin_amdgcn_cvt_pk_f32_fp8(word, true);
        values[0] = low[0], values[1] = low[1], values[2] = high[0], values[3] = high[1];
    } else
#endif
        GRID_UNROLL for (int i = 0; i < 4; ++i) values[i] = fp8_value(static_cast<u8>(word >> 8 * i), fnuz);
    Vec<T, 4> out;
    GRID_UNROLL for (int i = 0; i < 4; ++i) out.v[i] = exactly<T>(values[i]);
    return out;
}

// An element of a tensor whose type is only known at run time, where speed does not hang on it.
GRID_DEVICE float load_as_float(const void* data, int type, i64 index) {
    if (type == kF32) return static_cast<const float*>(data)[index];
    return type == kBf16 ? to_float(static_cast<const bf16*>(data)[index]) : to_float(static_cast<const f16*>(data)[index]);
}

}  // namespace grid
