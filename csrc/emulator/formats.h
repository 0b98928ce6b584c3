// SPDX-License-Identifier: Apache-2.0
// Small float formats: bf16, fp8 (OCP and FNUZ), fp6, fp4.
#pragma once

#include "machine.h"

namespace emu {

inline f32 from_bf16(u32 x) { return std::bit_cast<f32>(x << 16); }
inline u16 to_bf16(f32 x) {
  const u32 b = std::bit_cast<u32>(x);
  if (x != x) return u16(b >> 16 | 0x40);
  return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

enum class Special { None, Fn, Ieee, Fnuz };  // none: all codes finite; fn: all-ones is NaN; ieee: inf and NaN; fnuz: 0x80 is NaN

/// A float format of at most 8 bits.
struct Format {
  int exponent_bits, mantissa_bits, bias;
  f64 max;
  Special special;
  int bits() const { return 1 + exponent_bits + mantissa_bits; }

  f32 decode(u32 code) const {
    const u32 sign = code >> (exponent_bits + mantissa_bits) & 1;
    const int e = int(code >> mantissa_bits & ((1u << exponent_bits) - 1));
    const u32 m = code & ((1u << mantissa_bits) - 1), m_all = (1u << mantissa_bits) - 1;
    const int e_all = (1 << exponent_bits) - 1;
    const f32 nan = std::numeric_limits<f32>::quiet_NaN();
    if (special == Special::Fnuz && code == 0x80) return nan;
    if (special == Special::Fn && e == e_all && m == m_all) return nan;
    if (special == Special::Ieee && e == e_all) return m ? nan : sign ? -INFINITY : INFINITY;
    const f32 x = e == 0 ? std::ldexp(f32(m), 1 - bias - mantissa_bits) : std::ldexp(f32(m | 1u << mantissa_bits), e - bias - mantissa_bits);
    return sign ? -x : x;
  }

  /// Round to nearest even. Overflow saturates or becomes the format's NaN or infinity.
  u32 encode(f64 x, bool saturate) const {
    const u32 sign = u32(std::signbit(x)) << (exponent_bits + mantissa_bits);
    const u32 all_ones = (1u << (exponent_bits + mantissa_bits)) - 1;
    const u32 infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
    if (x != x) return special == Special::Fnuz ? 0x80 : special == Special::None ? sign | encode_finite(max) : sign | all_ones;
    f64 a = std::fabs(x);
    int e = a == 0 || std::isinf(a) ? 0 : std::ilogb(a);
    if (e < 1 - bias) e = 1 - bias;
    if (!std::isinf(a)) a = std::ldexp(std::nearbyint(std::ldexp(a, mantissa_bits - e)), e - mantissa_bits);
    if (a > max) {
      if (saturate || special == Special::None) return sign | encode_finite(max);
      return special == Special::Fnuz ? 0x80 : special == Special::Ieee ? sign | infinity : sign | all_ones;
    }
    const u32 code = encode_finite(a);
    return special == Special::Fnuz && code == 0 ? 0 : sign | code;
  }

 private:
  u32 encode_finite(f64 a) const {  // a is representable
    if (a == 0) return 0;
    const int e = std::max(std::ilogb(a), 1 - bias);
    const u32 m = u32(std::ldexp(a, mantissa_bits - e));
    return m >> mantissa_bits ? u32(e + bias) << mantissa_bits | (m & ((1u << mantissa_bits) - 1)) : m;
  }
};

inline constexpr Format kE4M3Fn{4, 3, 7, 448, Special::Fn}, kE4M3Fnuz{4, 3, 8, 240, Special::Fnuz};
inline constexpr Format kE5M2{5, 2, 15, 57344, Special::Ieee}, kE5M2Fnuz{5, 2, 16, 57344, Special::Fnuz};
inline constexpr Format kE2M3{2, 3, 1, 7.5, Special::None}, kE3M2{3, 2, 3, 28, Special::None}, kE2M1{2, 1, 1, 6, Special::None};

/// All decoded values of a format.
struct Decoded {
  f32 value[256];
  explicit Decoded(const Format& f) { for (u32 i = 0; i < 256; ++i) value[i] = f.decode(i & ((1u << f.bits()) - 1)); }
};

template <const Format& f> const f32* decoded() {
  static const Decoded table(f);
  return table.value;
}

}  // namespace emu
