// SPDX-License-Identifier: Apache-2.0
// Vector ALU: floating point, packed math, moves and selections.
#include "machine.h"

namespace emu {
namespace {

constexpr u32 kFloatMods = kClamp | kOmod | kDpp | kSdwa | kNegAbs;

template <class Signature, class F> Entry alu(F, u32 accepts) {
  using L = Lanewise<Signature, F>;
  return {L::run, Class::Valu, accepts, L::widths()};
}
template <class Signature, class F> Entry flt(F f) { return alu<Signature>(f, kFloatMods); }
template <class Signature, class F> Entry half(F f) { return alu<Signature>(f, kFloatMods); }
// gfx9 three-operand half instructions keep the other half of the destination and know op_sel.
template <class Signature, class F> Entry half3(F) {
  using L = Lanewise<Signature, F, true>;
  return {L::run, Class::Valu, kClamp | kNegAbs | kOpSel, L::widths()};
}
template <class T, class F> Entry accumulate(F) {
  return {Accumulate<T, T, T, F>::run, Class::Valu, kFloatMods, {dwords<T>, dwords<T>, dwords<T>}};
}

// ------------------------------------------------------------------------------------------------- arithmetic

template <class T> T flush(T x) { return std::fabs(x) < std::numeric_limits<T>::min() ? std::copysign(T(0), x) : x; }

template <class T> T min_num(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(float(a)) ? a : b;  // -0 is below +0
  return a < b ? a : b;
}
template <class T> T max_num(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(float(a)) ? b : a;
  return a > b ? a : b;
}
template <class T> T med3(T a, T b, T c) {
  if (a != a || b != b || c != c) return min_num(min_num(a, b), c);
  return max_num(min_num(a, b), min_num(max_num(a, b), c));
}
template <class T> T minimum(T a, T b) { return a != a ? a : b != b ? b : min_num(a, b); }  // NaN wins (gfx950)
template <class T> T maximum(T a, T b) { return a != a ? a : b != b ? b : max_num(a, b); }

f16 fma16(f16 a, f16 b, f16 c) { return f16(std::fma(double(a), double(b), double(c))); }

// Rounded half to even without touching the host's rounding mode.
f32 rndne(f32 x) { return std::nearbyint(x); }

// Inputs of sin and cos are revolutions; outside +-256 the hardware returns sin 0.
f32 sin_turns(f32 x) { return std::fabs(x) > 256.f ? 0.f : f32(std::sin(2 * M_PI * (double(x) - std::floor(double(x))))); }
f32 cos_turns(f32 x) { return std::fabs(x) > 256.f ? 1.f : f32(std::cos(2 * M_PI * (double(x) - std::floor(double(x))))); }

f32 fract(f32 x) { return std::isinf(x) ? std::numeric_limits<f32>::quiet_NaN() : std::fmin(x - std::floor(x), 0x1.fffffep-1f); }
template <class T> i32 exponent(T x) { return x == 0 || std::isnan(x) || std::isinf(x) ? 0 : std::ilogb(x) + 1; }
template <class T> T mantissa(T x) { int e; return std::isnan(x) || std::isinf(x) ? x : std::frexp(x, &e); }
template <class T> T ldexp_sat(T x, i32 n) { return std::ldexp(x, n < -4000 ? -4000 : n > 4000 ? 4000 : n); }

// ----------------------------------------------------------------------------- division: scale, fmas and fixup steps

struct Single {
  using T = f32;
  static constexpr int bias = 127, top = 255, near_max = 96, tiny = 23, scale = 64, lowest = -150;
  static int exponent(T x) { return std::bit_cast<u32>(x) >> 23 & 0xff; }
};
struct Double {
  using T = f64;
  static constexpr int bias = 1023, top = 2047, near_max = 768, tiny = 53, scale = 128, lowest = -1075;
  static int exponent(T x) { return int(std::bit_cast<u64>(x) >> 52 & 0x7ff); }
};
template <class T> bool denormal(T x) { return x != 0 && std::fabs(x) < std::numeric_limits<T>::min(); }

/// One lane of v_div_scale: s0 is denominator s1 or numerator s2; vcc says that div_fmas must scale back.
template <class P> typename P::T div_scale(typename P::T s0, typename P::T s1, typename P::T s2, bool& vcc) {
  using T = typename P::T;
  vcc = false;
  if (s1 == 0 || s2 == 0) return std::numeric_limits<T>::quiet_NaN();
  const bool small_reciprocal = denormal(T(1) / s1), small_quotient = denormal(s2 / s1);
  if (P::exponent(s2) - P::exponent(s1) >= P::near_max) {
    vcc = true;
    return s0 == s1 ? std::ldexp(s0, P::scale) : s0;
  }
  if (denormal(s1)) return std::ldexp(s0, P::scale);
  if (small_reciprocal && small_quotient) {
    vcc = true;
    return s0 == s1 ? std::ldexp(s0, P::scale) : s0;
  }
  if (small_reciprocal) return std::ldexp(s0, -P::scale);
  if (small_quotient) {
    vcc = true;
    return s0 == s2 ? std::ldexp(s0, P::scale) : s0;
  }
  return P::exponent(s2) <= P::tiny ? std::ldexp(s0, P::scale) : s0;
}

/// Operands: result, scalar pair (VCC or any), s0, s1, s2.
template <class P> void run_div_scale(Wave& w, const Instruction& in) {
  using T = typename P::T;
  T buf[3][kLanes], out[kLanes];
  const T *a = fetch<T>(w, in, 2, buf[0]), *b = fetch<T>(w, in, 3, buf[1]), *c = fetch<T>(w, in, 4, buf[2]);
  u64 mask = 0;
  for (int l = 0; l < kLanes; ++l) {
    bool vcc;
    out[l] = div_scale<P>(a[l], b[l], c[l], vcc);
    mask |= u64(vcc) << l;
  }
  w.write_scalar64(in.op[1].reg, mask & w.exec());
  commit(w, in, out);
}

template <class P> void run_div_fmas(Wave& w, const Instruction& in) {
  using T = typename P::T;
  T buf[3][kLanes], out[kLanes];
  const T *a = fetch<T>(w, in, 1, buf[0]), *b = fetch<T>(w, in, 2, buf[1]), *c = fetch<T>(w, in, 3, buf[2]);
  const u64 vcc = w.s[kVcc] | u64(w.s[kVcc + 1]) << 32;
  for (int l = 0; l < kLanes; ++l) {
    out[l] = std::fma(a[l], b[l], c[l]);
    if (vcc >> l & 1) out[l] = std::ldexp(out[l], P::exponent(c[l]) > P::bias ? P::scale : -P::scale);
  }
  commit(w, in, out);
}

template <class P> typename P::T div_fixup(typename P::T q, typename P::T den, typename P::T num) {
  using T = typename P::T;
  const T sign = std::signbit(den) != std::signbit(num) ? T(-1) : T(1);
  if (num != num) return num;
  if (den != den) return den;
  if ((den == 0 && num == 0) || (std::isinf(den) && std::isinf(num))) return -std::numeric_limits<T>::quiet_NaN();
  if (den == 0 || std::isinf(num)) return sign * std::numeric_limits<T>::infinity();
  if (std::isinf(den) || num == 0) return sign * T(0);
  if (P::exponent(num) - P::exponent(den) < P::lowest) return sign * T(0);
  return std::copysign(q, sign);
}

// ------------------------------------------------------------------------------------------------- packed math

/// One half of a packed 32-bit operand pair: op_sel chooses the register for the low result, op_sel_hi for the high one.
void fetch_packed32(Wave& w, const Instruction& in, int i, bool high, f32* out) {
  const Operand& o = in.op[i];
  const int select = (high ? in.op_sel_hi : in.op_sel) >> (i - 1) & 1;
  const bool negate = (high ? in.neg_hi : in.neg_lo) >> (i - 1) & 1;
  // The upper half of a constant is not documented; that of 0 can only be 0, and compilers write it so.
  if (o.kind == Kind::Literal && select && o.bits32) fail(w, in, "packed 32-bit constant read through its upper half");
  const u32 flip = negate ? 0x80000000u : 0u;
  if (o.kind == Kind::Vector) {
    const Row& row = w.v[o.reg + select];
    for (int l = 0; l < kLanes; ++l) out[l] = std::bit_cast<f32>(row[l] ^ flip);
  } else {
    const u32 x = o.kind == Kind::Literal ? o.bits32 : w.s[o.reg + select];
    for (int l = 0; l < kLanes; ++l) out[l] = std::bit_cast<f32>(x ^ flip);
  }
}

template <int n, class F> void packed32(Wave& w, const Instruction& in) {
  alignas(64) f32 src[3][kLanes];
  alignas(64) f32 out[2][kLanes];
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < n; ++i) fetch_packed32(w, in, i + 1, half, src[i]);
    for (int l = 0; l < kLanes; ++l) out[half][l] = F()(src[0][l], src[1][l], src[2][l]);
    if (in.clamp) for (int l = 0; l < kLanes; ++l) out[half][l] = clamp_unit(out[half][l]);
  }
  for (int half = 0; half < 2; ++half) store_masked(w, in.op[0].reg + half, reinterpret_cast<u32*>(out[half]));
}
template <int n, class F> Entry pk32(F) {
  return {packed32<n, F>, Class::Valu, kPacked | kClamp, n == 2 ? std::vector<i8>{2, 2, 2} : std::vector<i8>{2, 2, 2, 2}};
}

// v_pk_mov_b32: low result from source 0, high result from source 1, each by its own op_sel bit.
void pk_mov(Wave& w, const Instruction& in) {
  Row out[2];
  for (int half = 0; half < 2; ++half) {
    const Operand& o = in.op[1 + half];
    const int select = in.op_sel >> half & 1;
    for (int l = 0; l < kLanes; ++l)
      out[half][l] = o.kind == Kind::Vector ? w.v[o.reg + select][l] : o.kind == Kind::Literal ? o.bits32 : w.s[o.reg + select];
  }
  for (int half = 0; half < 2; ++half) store_masked(w, in.op[0].reg + half, out[half].lane);
}

/// Operand i as raw dwords for packed 16-bit math; a float constant appears in the low half only.
void fetch_packed16(Wave& w, const Instruction& in, int i, Row& out) {
  const Operand& o = in.op[i];
  for (int l = 0; l < kLanes; ++l)
    out[l] = o.kind == Kind::Vector ? w.v[o.reg][l] : o.kind == Kind::Literal ? (o.real ? o.bits16 : o.bits32) : w.s[o.reg];
}

template <class T, int n, class F> void packed16(Wave& w, const Instruction& in) {
  Row src[3], out;
  for (int i = 0; i < n; ++i) fetch_packed16(w, in, i + 1, src[i]);
  for (int l = 0; l < kLanes; ++l) {
    u32 result = 0;
    for (int half = 0; half < 2; ++half) {
      T x[3] = {};
      for (int i = 0; i < n; ++i) {
        const bool select = (half ? in.op_sel_hi : in.op_sel) >> i & 1, negate = (half ? in.neg_hi : in.neg_lo) >> i & 1;
        x[i] = std::bit_cast<T>(u16((select ? src[i][l] >> 16 : src[i][l]) ^ (negate ? 0x8000 : 0)));
      }
      T r = T(F()(x[0], x[1], x[2]));
      if constexpr (is_float<T>) if (in.clamp) r = clamp_unit(r);
      result |= u32(std::bit_cast<u16>(r)) << (16 * half);
    }
    out[l] = result;
  }
  store_masked(w, in.op[0].reg, out.lane);
}
template <class T, int n, class F> Entry pk16(F) {
  return {packed16<T, n, F>, Class::Valu, kPacked | (is_float<T> ? u32(kClamp) : 0u),
          n == 2 ? std::vector<i8>{1, 1, 1} : std::vector<i8>{1, 1, 1, 1}};
}

// ------------------------------------------------------------------------------------------------- mixed and dot

/// v_mad_mix / v_fma_mix source: op_sel_hi chooses f16, op_sel its half.
void fetch_mix(Wave& w, const Instruction& in, int i, f32* out) {
  Row row;
  const Operand& o = in.op[i];
  const bool half = in.op_sel_hi >> (i - 1) & 1, high = in.op_sel >> (i - 1) & 1;
  for (int l = 0; l < kLanes; ++l) row[l] = o.kind == Kind::Vector ? w.v[o.reg][l] : o.kind == Kind::Literal ? (half ? o.bits16 : o.bits32) : w.s[o.reg];
  for (int l = 0; l < kLanes; ++l) {
    f32 x = half ? f32(std::bit_cast<f16>(u16(high ? row[l] >> 16 : row[l]))) : std::bit_cast<f32>(row[l]);
    if (o.abs || (in.neg_hi >> (i - 1) & 1)) x = std::fabs(x);  // neg_hi means abs here
    out[l] = o.neg || (in.neg_lo >> (i - 1) & 1) ? -x : x;
  }
}
enum Mix { kMixF32, kMixLow, kMixHigh };
template <Mix mix> void fma_mix(Wave& w, const Instruction& in) {
  f32 src[3][kLanes];
  for (int i = 0; i < 3; ++i) fetch_mix(w, in, i + 1, src[i]);
  Row out;
  const Row& old = w.v[in.op[0].reg];
  for (int l = 0; l < kLanes; ++l) {
    f32 r = std::fma(src[0][l], src[1][l], src[2][l]);
    if (in.clamp) r = clamp_unit(r);
    const u32 h = std::bit_cast<u16>(f16(r));
    out[l] = mix == kMixF32 ? std::bit_cast<u32>(r) : mix == kMixLow ? (old[l] & 0xffff0000) | h : (old[l] & 0xffff) | h << 16;
  }
  store_masked(w, in.op[0].reg, out.lane);
}
template <Mix mix> Entry fma_mix_entry() { return {fma_mix<mix>, Class::Valu, kMixed | kClamp | kNegAbs, {1, 1, 1, 1}}; }

f32 bf16_low(u32 x) { return std::bit_cast<f32>(x << 16); }
f32 bf16_high(u32 x) { return std::bit_cast<f32>(x & 0xffff0000); }
f32 f16_low(u32 x) { return f32(std::bit_cast<f16>(u16(x))); }
f32 f16_high(u32 x) { return f32(std::bit_cast<f16>(u16(x >> 16))); }
f32 dot2_f16(u32 a, u32 b, f32 c) { return std::fma(f16_low(a), f16_low(b), std::fma(f16_high(a), f16_high(b), c)); }
f32 dot2_bf16(u32 a, u32 b, f32 c) { return std::fma(bf16_low(a), bf16_low(b), std::fma(bf16_high(a), bf16_high(b), c)); }
template <class T> i32 dot4(u32 a, u32 b, i32 c) {
  for (int i = 0; i < 32; i += 8) c += i32(T(a >> i)) * i32(T(b >> i));
  return c;
}
template <class T> i32 dot2_int(u32 a, u32 b, i32 c) {
  return i32(u32(T(a)) * u32(T(b)) + u32(T(a >> 16)) * u32(T(b >> 16)) + u32(c));
}
template <class Signature, class F> Entry dot(F) { return {Lanewise<Signature, F>::run, Class::Valu, 0, {1, 1, 1, 1}}; }
template <class D, class F> Entry dot_accumulate(F) { return {Accumulate<D, u32, u32, F>::run, Class::Valu, kDpp, {1, 1, 1}}; }

// ------------------------------------------------------------------------------------------------------- moves

/// v_cndmask: operand 3 is the lane mask. Sources may carry signs as if they were f32.
void cndmask(Wave& w, const Instruction& in) {
  alignas(64) f32 a_buf[kLanes];
  alignas(64) f32 b_buf[kLanes];
  alignas(64) f32 out[kLanes];
  const f32 *a = fetch<f32>(w, in, 1, a_buf), *b = fetch<f32>(w, in, 2, b_buf);
  const u64 mask = scalar<u64>(w, in.op[3]);
  const u32 *ua = reinterpret_cast<const u32*>(a), *ub = reinterpret_cast<const u32*>(b);
  u32* uo = reinterpret_cast<u32*>(out);
  for (int l = 0; l < kLanes; ++l) uo[l] = (mask >> l & 1) ? ub[l] : ua[l];
  if (in.plain_result) store_masked(w, in.op[0].reg, uo);
  else commit_special(w, in, in.op[0], uo);
}

void swap(Wave& w, const Instruction& in) {
  Row a = w.v[in.op[0].reg], b = w.v[in.op[1].reg];
  store_masked(w, in.op[0].reg, b.lane);
  store_masked(w, in.op[1].reg, a.lane);
}

/// madmk: D = A * K + B; madak: D = A * B + K; operands are printed in the order of the formula.
template <class T> struct Fused {
  T operator()(T a, T b, T c) const { if constexpr (sizeof(T) == 2) return fma16(a, b, c); else return std::fma(a, b, c); }
};

}  // namespace

void add_vector(Table& t) {
  // f32
  t.add("v_add_f32", flt<f32(f32, f32)>([](f32 a, f32 b) { return a + b; }));
  t.add("v_sub_f32", flt<f32(f32, f32)>([](f32 a, f32 b) { return a - b; }));
  t.add("v_subrev_f32", flt<f32(f32, f32)>([](f32 a, f32 b) { return b - a; }));
  t.add("v_mul_f32", flt<f32(f32, f32)>([](f32 a, f32 b) { return a * b; }));
  t.add("v_mul_legacy_f32", flt<f32(f32, f32)>([](f32 a, f32 b) { return a == 0 || b == 0 ? 0.f : a * b; }));
  t.add("v_min_f32", flt<f32(f32, f32)>([](f32 a, f32 b) { return min_num(a, b); }));
  t.add("v_max_f32", flt<f32(f32, f32)>([](f32 a, f32 b) { return max_num(a, b); }));
  t.add("v_fma_f32", flt<f32(f32, f32, f32)>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
  t.add("v_fmac_f32", accumulate<f32>([](f32 a, f32 b, f32 d) { return std::fma(a, b, d); }));
  t.add("v_fmamk_f32", flt<f32(f32, f32, f32)>(Fused<f32>()));
  t.add("v_fmaak_f32", flt<f32(f32, f32, f32)>(Fused<f32>()));
  t.add("v_min3_f32", flt<f32(f32, f32, f32)>([](f32 a, f32 b, f32 c) { return min_num(min_num(a, b), c); }));
  t.add("v_max3_f32", flt<f32(f32, f32, f32)>([](f32 a, f32 b, f32 c) { return max_num(max_num(a, b), c); }));
  t.add("v_med3_f32", flt<f32(f32, f32, f32)>([](f32 a, f32 b, f32 c) { return med3(a, b, c); }));
  t.add("v_minimum3_f32", flt<f32(f32, f32, f32)>([](f32 a, f32 b, f32 c) { return minimum(minimum(a, b), c); }));
  t.add("v_maximum3_f32", flt<f32(f32, f32, f32)>([](f32 a, f32 b, f32 c) { return maximum(maximum(a, b), c); }));
  t.add("v_ldexp_f32", flt<f32(f32, i32)>([](f32 a, i32 b) { return ldexp_sat(a, b); }));
  t.add("v_floor_f32", flt<f32(f32)>([](f32 a) { return std::floor(a); }));
  t.add("v_ceil_f32", flt<f32(f32)>([](f32 a) { return std::ceil(a); }));
  t.add("v_trunc_f32", flt<f32(f32)>([](f32 a) { return std::trunc(a); }));
  t.add("v_rndne_f32", flt<f32(f32)>([](f32 a) { return rndne(a); }));
  t.add("v_fract_f32", flt<f32(f32)>([](f32 a) { return fract(a); }));
  t.add("v_frexp_exp_i32_f32", alu<i32(f32)>([](f32 a) { return exponent(a); }, kDpp | kSdwa | kNegAbs));
  t.add("v_frexp_mant_f32", flt<f32(f32)>([](f32 a) { return mantissa(a); }));
  t.add("v_div_scale_f32", {run_div_scale<Single>, Class::Valu, kNegAbs, {1, 2, 1, 1, 1}, 2});
  t.add("v_div_fmas_f32", {run_div_fmas<Single>, Class::Valu, kNegAbs | kClamp | kOmod, {1, 1, 1, 1}});
  t.add("v_div_fixup_f32", flt<f32(f32, f32, f32)>([](f32 a, f32 b, f32 c) { return div_fixup<Single>(a, b, c); }));

  // transcendental; these flush denormals whatever the mode says
  t.add("v_exp_f32", flt<f32(f32)>([](f32 a) { return flush(std::exp2(flush(a))); }));
  t.add("v_log_f32", flt<f32(f32)>([](f32 a) { return std::log2(flush(a)); }));
  t.add("v_rcp_f32", flt<f32(f32)>([](f32 a) { return flush(1.f / flush(a)); }));
  t.add("v_rcp_iflag_f32", flt<f32(f32)>([](f32 a) { return flush(1.f / flush(a)); }));
  t.add("v_rsq_f32", flt<f32(f32)>([](f32 a) { return f32(1. / std::sqrt(double(flush(a)))); }));
  t.add("v_sqrt_f32", flt<f32(f32)>([](f32 a) { return std::sqrt(a); }));
  t.add("v_sin_f32", flt<f32(f32)>([](f32 a) { return sin_turns(flush(a)); }));
  t.add("v_cos_f32", flt<f32(f32)>([](f32 a) { return cos_turns(flush(a)); }));

  // f16
  t.add("v_add_f16", half<f16(f16, f16)>([](f16 a, f16 b) { return a + b; }));
  t.add("v_sub_f16", half<f16(f16, f16)>([](f16 a, f16 b) { return a - b; }));
  t.add("v_subrev_f16", half<f16(f16, f16)>([](f16 a, f16 b) { return b - a; }));
  t.add("v_mul_f16", half<f16(f16, f16)>([](f16 a, f16 b) { return a * b; }));
  t.add("v_min_f16", half<f16(f16, f16)>([](f16 a, f16 b) { return min_num(a, b); }));
  t.add("v_max_f16", half<f16(f16, f16)>([](f16 a, f16 b) { return max_num(a, b); }));
  t.add("v_fmac_f16", accumulate<f16>([](f16 a, f16 b, f16 d) { return fma16(a, b, d); }));
  t.add("v_fma_f16", half3<f16(f16, f16, f16)>(Fused<f16>()));
  t.add("v_min3_f16", half3<f16(f16, f16, f16)>([](f16 a, f16 b, f16 c) { return min_num(min_num(a, b), c); }));
  t.add("v_max3_f16", half3<f16(f16, f16, f16)>([](f16 a, f16 b, f16 c) { return max_num(max_num(a, b), c); }));
  t.add("v_med3_f16", half3<f16(f16, f16, f16)>([](f16 a, f16 b, f16 c) { return med3(a, b, c); }));
  t.add("v_div_fixup_f16", half3<f16(f16, f16, f16)>([](f16 a, f16 b, f16 c) { return f16(div_fixup<Single>(a, b, c)); }));
  t.add("v_ldexp_f16", half<f16(f16, i16)>([](f16 a, i16 b) { return f16(ldexp_sat(f32(a), b)); }));
  t.add("v_rcp_f16", half<f16(f16)>([](f16 a) { return f16(1.f / f32(a)); }));
  t.add("v_rsq_f16", half<f16(f16)>([](f16 a) { return f16(1. / std::sqrt(double(a))); }));
  t.add("v_sqrt_f16", half<f16(f16)>([](f16 a) { return f16(std::sqrt(f32(a))); }));
  t.add("v_exp_f16", half<f16(f16)>([](f16 a) { return f16(std::exp2(f32(a))); }));
  t.add("v_log_f16", half<f16(f16)>([](f16 a) { return f16(std::log2(f32(a))); }));
  t.add("v_floor_f16", half<f16(f16)>([](f16 a) { return f16(std::floor(f32(a))); }));
  t.add("v_ceil_f16", half<f16(f16)>([](f16 a) { return f16(std::ceil(f32(a))); }));
  t.add("v_trunc_f16", half<f16(f16)>([](f16 a) { return f16(std::trunc(f32(a))); }));
  t.add("v_rndne_f16", half<f16(f16)>([](f16 a) { return f16(rndne(f32(a))); }));

  // f64
  t.add("v_add_f64", alu<f64(f64, f64)>([](f64 a, f64 b) { return a + b; }, kClamp | kOmod | kNegAbs));
  t.add("v_mul_f64", alu<f64(f64, f64)>([](f64 a, f64 b) { return a * b; }, kClamp | kOmod | kNegAbs));
  t.add("v_min_f64", alu<f64(f64, f64)>([](f64 a, f64 b) { return min_num(a, b); }, kClamp | kOmod | kNegAbs));
  t.add("v_max_f64", alu<f64(f64, f64)>([](f64 a, f64 b) { return max_num(a, b); }, kClamp | kOmod | kNegAbs));
  t.add("v_fma_f64", alu<f64(f64, f64, f64)>(Fused<f64>(), kClamp | kOmod | kNegAbs));
  t.add("v_fmac_f64", {Accumulate<f64, f64, f64, Fused<f64>>::run, Class::Valu, kNegAbs, {2, 2, 2}});
  t.add("v_ldexp_f64", alu<f64(f64, i32)>([](f64 a, i32 b) { return ldexp_sat(a, b); }, kNegAbs));
  t.add("v_rcp_f64", alu<f64(f64)>([](f64 a) { return 1. / a; }, kNegAbs));
  t.add("v_rsq_f64", alu<f64(f64)>([](f64 a) { return 1. / std::sqrt(a); }, kNegAbs));
  t.add("v_sqrt_f64", alu<f64(f64)>([](f64 a) { return std::sqrt(a); }, kNegAbs));
  t.add("v_floor_f64", alu<f64(f64)>([](f64 a) { return std::floor(a); }, kNegAbs));
  t.add("v_ceil_f64", alu<f64(f64)>([](f64 a) { return std::ceil(a); }, kNegAbs));
  t.add("v_trunc_f64", alu<f64(f64)>([](f64 a) { return std::trunc(a); }, kNegAbs));
  t.add("v_rndne_f64", alu<f64(f64)>([](f64 a) { return std::nearbyint(a); }, kNegAbs));
  t.add("v_frexp_exp_i32_f64", alu<i32(f64)>([](f64 a) { return exponent(a); }, kNegAbs));
  t.add("v_frexp_mant_f64", alu<f64(f64)>([](f64 a) { return mantissa(a); }, kNegAbs));
  t.add("v_div_scale_f64", {run_div_scale<Double>, Class::Valu, kNegAbs, {2, 2, 2, 2, 2}, 2});
  t.add("v_div_fmas_f64", {run_div_fmas<Double>, Class::Valu, kNegAbs, {2, 2, 2, 2}});
  t.add("v_div_fixup_f64", alu<f64(f64, f64, f64)>([](f64 a, f64 b, f64 c) { return div_fixup<Double>(a, b, c); }, kNegAbs));

  // packed f32 and 16-bit
  t.add("v_pk_add_f32", pk32<2>([](f32 a, f32 b, f32) { return a + b; }));
  t.add("v_pk_mul_f32", pk32<2>([](f32 a, f32 b, f32) { return a * b; }));
  t.add("v_pk_fma_f32", pk32<3>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
  t.add("v_pk_mov_b32", {pk_mov, Class::Valu, kPacked, {2, 2, 2}});
  t.add("v_pk_add_f16", pk16<f16, 2>([](f16 a, f16 b, f16) { return a + b; }));
  t.add("v_pk_mul_f16", pk16<f16, 2>([](f16 a, f16 b, f16) { return a * b; }));
  t.add("v_pk_min_f16", pk16<f16, 2>([](f16 a, f16 b, f16) { return min_num(a, b); }));
  t.add("v_pk_max_f16", pk16<f16, 2>([](f16 a, f16 b, f16) { return max_num(a, b); }));
  t.add("v_pk_fma_f16", pk16<f16, 3>(Fused<f16>()));
  t.add("v_pk_minimum3_f16", pk16<f16, 3>([](f16 a, f16 b, f16 c) { return minimum(minimum(a, b), c); }));
  t.add("v_pk_maximum3_f16", pk16<f16, 3>([](f16 a, f16 b, f16 c) { return maximum(maximum(a, b), c); }));
  t.add("v_pk_add_u16", pk16<u16, 2>([](u16 a, u16 b, u16) { return u16(a + b); }));
  t.add("v_pk_add_i16", pk16<u16, 2>([](u16 a, u16 b, u16) { return u16(a + b); }));
  t.add("v_pk_sub_u16", pk16<u16, 2>([](u16 a, u16 b, u16) { return u16(a - b); }));
  t.add("v_pk_sub_i16", pk16<u16, 2>([](u16 a, u16 b, u16) { return u16(a - b); }));
  t.add("v_pk_mul_lo_u16", pk16<u16, 2>([](u16 a, u16 b, u16) { return u16(u32(a) * b); }));
  t.add("v_pk_mad_u16", pk16<u16, 3>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }));
  t.add("v_pk_mad_i16", pk16<u16, 3>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }));
  t.add("v_pk_lshlrev_b16", pk16<u16, 2>([](u16 a, u16 b, u16) { return u16(b << (a & 15)); }));
  t.add("v_pk_lshrrev_b16", pk16<u16, 2>([](u16 a, u16 b, u16) { return u16(b >> (a & 15)); }));
  t.add("v_pk_ashrrev_i16", pk16<i16, 2>([](i16 a, i16 b, i16) { return i16(b >> (a & 15)); }));
  t.add("v_pk_min_u16", pk16<u16, 2>([](u16 a, u16 b, u16) { return a < b ? a : b; }));
  t.add("v_pk_max_u16", pk16<u16, 2>([](u16 a, u16 b, u16) { return a > b ? a : b; }));
  t.add("v_pk_min_i16", pk16<i16, 2>([](i16 a, i16 b, i16) { return a < b ? a : b; }));
  t.add("v_pk_max_i16", pk16<i16, 2>([](i16 a, i16 b, i16) { return a > b ? a : b; }));

  // mixed precision and dot products
  for (const char* name : {"v_mad_mix_f32", "v_fma_mix_f32"}) t.add(name, fma_mix_entry<kMixF32>());
  for (const char* name : {"v_mad_mixlo_f16", "v_fma_mixlo_f16"}) t.add(name, fma_mix_entry<kMixLow>());
  for (const char* name : {"v_mad_mixhi_f16", "v_fma_mixhi_f16"}) t.add(name, fma_mix_entry<kMixHigh>());
  t.add("v_dot2_f32_f16", dot<f32(u32, u32, f32)>([](u32 a, u32 b, f32 c) { return dot2_f16(a, b, c); }));
  t.add("v_dot2_f32_bf16", dot<f32(u32, u32, f32)>([](u32 a, u32 b, f32 c) { return dot2_bf16(a, b, c); }));
  t.add("v_dot2c_f32_f16", dot_accumulate<f32>([](u32 a, u32 b, f32 c) { return dot2_f16(a, b, c); }));
  t.add("v_dot2c_f32_bf16", dot_accumulate<f32>([](u32 a, u32 b, f32 c) { return dot2_bf16(a, b, c); }));
  t.add("v_dot4_i32_i8", dot<i32(u32, u32, i32)>([](u32 a, u32 b, i32 c) { return dot4<i8>(a, b, c); }));
  t.add("v_dot4_u32_u8", dot<i32(u32, u32, i32)>([](u32 a, u32 b, i32 c) { return dot4<u8>(a, b, c); }));
  t.add("v_dot4c_i32_i8", dot_accumulate<i32>([](u32 a, u32 b, i32 c) { return dot4<i8>(a, b, c); }));
  t.add("v_dot2_i32_i16", dot<i32(u32, u32, i32)>([](u32 a, u32 b, i32 c) { return dot2_int<i16>(a, b, c); }));
  t.add("v_dot2_u32_u16", dot<i32(u32, u32, i32)>([](u32 a, u32 b, i32 c) { return dot2_int<u16>(a, b, c); }));

  // moves
  t.add("v_nop", {[](Wave&, const Instruction&) {}, Class::Valu, 0, {}});
  t.add("v_mov_b32", alu<u32(u32)>([](u32 a) { return a; }, kDpp | kSdwa));
  t.add("v_mov_b64", alu<u64(u64)>([](u64 a) { return a; }, kDpp));
  t.add("v_accvgpr_read_b32", alu<u32(u32)>([](u32 a) { return a; }, 0));
  t.add("v_accvgpr_write_b32", alu<u32(u32)>([](u32 a) { return a; }, 0));
  t.add("v_accvgpr_mov_b32", alu<u32(u32)>([](u32 a) { return a; }, 0));
  t.add("v_cndmask_b32", {cndmask, Class::Valu, kDpp | kSdwa | kNegAbs, {1, 1, 1, 2}});
  t.add("v_swap_b32", {swap, Class::Valu, 0, {1, 1}});
}

}  // namespace emu
