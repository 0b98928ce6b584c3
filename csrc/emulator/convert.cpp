// SPDX-License-Identifier: Apache-2.0
// Conversions between number formats.
#include <algorithm>

#include "formats.h"

namespace emu {
namespace {

template <class Signature, class F> Entry cvt(F, u32 accepts = kClamp | kOmod | kDpp | kSdwa | kNegAbs) {
  using L = Lanewise<Signature, F>;
  return {L::run, Class::Valu, accepts, L::widths()};
}
constexpr u32 kIntResult = kDpp | kSdwa | kNegAbs;

/// Float to integer: saturates, NaN gives 0.
template <class I, class T> I to_int(T x) {
  if (x != x) return 0;
  constexpr f64 lo = f64(std::numeric_limits<I>::min()), hi = f64(std::numeric_limits<I>::max());
  const f64 d = std::trunc(f64(x));
  return d <= lo ? std::numeric_limits<I>::min() : d >= hi ? std::numeric_limits<I>::max() : I(d);
}
f32 ubyte(u32 a, int n) { return f32(a >> (8 * n) & 0xff); }

u16 f16_toward_zero(f32 x) {
  const f16 h = f16(x);
  u16 b = std::bit_cast<u16>(h);
  if (x == x && std::fabs(f32(h)) > std::fabs(x)) --b;  // also turns an overflow to infinity into the largest number
  return b;
}
u32 bits(f16 x) { return std::bit_cast<u16>(x); }
template <class I> u32 clamp_pack(i64 a, i64 b) {
  const auto c = [](i64 x) { return u32(std::clamp<i64>(x, std::numeric_limits<I>::min(), std::numeric_limits<I>::max())) & 0xffff; };
  return c(a) | c(b) << 16;
}

bool saturates(const Wave& w) { return w.mode >> 23 & 1; }

/// f32 pair to two bytes, in the low or high word of the result; the other word stays.
template <const Format& format> void cvt_pk_fp8(Wave& w, const Instruction& in) {
  f32 a_buf[kLanes], b_buf[kLanes];
  u32 out[kLanes];
  const f32 *a = fetch<f32>(w, in, 1, a_buf), *b = fetch<f32>(w, in, 2, b_buf);
  const Row& old = w.v[in.op[0].reg];
  const bool saturate = saturates(w), high = in.op_sel >> 2 & 1;
  for (int l = 0; l < kLanes; ++l) {
    const u32 pair = format.encode(a[l], saturate) | format.encode(b[l], saturate) << 8;
    out[l] = high ? (old[l] & 0xffff) | pair << 16 : (old[l] & 0xffff0000) | pair;
  }
  store_masked(w, in.op[0].reg, out);
}

template <const Format& format> void cvt_pk_f32_fp8(Wave& w, const Instruction& in) {
  u32 buf[kLanes];
  Row lo, hi;
  const f32* table = decoded<format>();
  const u32* a = fetch<u32>(w, in, 1, buf);
  const int shift = (in.op_sel & 1) ? 16 : 0;  // SDWA selects its word in fetch
  for (int l = 0; l < kLanes; ++l) {
    lo[l] = std::bit_cast<u32>(table[a[l] >> shift & 0xff]);
    hi[l] = std::bit_cast<u32>(table[a[l] >> (shift + 8) & 0xff]);
  }
  store_masked(w, in.op[0].reg, lo.lane);
  store_masked(w, in.op[0].reg + 1, hi.lane);
}

// ------------------------------------------------------------------- gfx950: conversions with a power-of-two scale

enum class Wide { F32, F16, Bf16 };

f32 exponent_only(f32 scale) {  // the scale operand counts by its exponent
  const u32 e = std::bit_cast<u32>(scale) >> 23 & 0xff;
  return e == 255 ? std::numeric_limits<f32>::quiet_NaN() : std::ldexp(1.f, int(e) - 127);
}
template <Wide wide> u32 pack_wide(f32 a, f32 b) {
  return wide == Wide::F16 ? bits(f16(a)) | bits(f16(b)) << 16 : u32(to_bf16(a)) | u32(to_bf16(b)) << 16;
}

/// Two small floats times scale. The source unit (word for 8-bit formats, byte for fp4) is chosen by op_sel.
template <const Format& format, Wide wide> void scaled_up(Wave& w, const Instruction& in) {
  f32 scale_buf[kLanes];
  const Row& a = w.v[in.op[1].reg];
  const f32* scale = fetch<f32>(w, in, 2, scale_buf);
  const int n = format.bits(), unit = n == 4 ? in.op_sel & 3 : in.op_sel & 1, shift = 2 * n * unit;
  const u32 mask = (1u << n) - 1;
  Row lo, hi;
  for (int l = 0; l < kLanes; ++l) {
    const f32 s = exponent_only(scale[l]);
    const f32 x = format.decode(a[l] >> shift & mask) * s, y = format.decode(a[l] >> (shift + n) & mask) * s;
    lo[l] = wide == Wide::F32 ? std::bit_cast<u32>(x) : pack_wide<wide>(x, y);
    hi[l] = std::bit_cast<u32>(y);
  }
  store_masked(w, in.op[0].reg, lo.lane);
  if (wide == Wide::F32) store_masked(w, in.op[0].reg + 1, hi.lane);
}

/// Two wide floats divided by scale, into the unit of the result chosen by op_sel; the rest of the result stays.
template <const Format& format, Wide wide> void scaled_down(Wave& w, const Instruction& in) {
  constexpr int sources = wide == Wide::F32 ? 2 : 1;
  u32 a_buf[kLanes], b_buf[kLanes];
  f32 scale_buf[kLanes];
  const u32 *a = fetch<u32>(w, in, 1, a_buf), *b = sources == 2 ? fetch<u32>(w, in, 2, b_buf) : a;
  const f32* scale = fetch<f32>(w, in, 1 + sources, scale_buf);
  const int n = format.bits(), unit = n == 4 ? in.op_sel >> 2 & 3 : in.op_sel >> (sources + 1) & 1, shift = 2 * n * unit;
  const u32 mask = ((n == 4 ? 0xffu : 0xffffu)) << shift;
  const Row& old = w.v[in.op[0].reg];
  const bool saturate = saturates(w);
  Row out;
  for (int l = 0; l < kLanes; ++l) {
    const f32 s = exponent_only(scale[l]);
    const f32 x = wide == Wide::F32 ? std::bit_cast<f32>(a[l]) : wide == Wide::Bf16 ? from_bf16(a[l] & 0xffff) : f32(std::bit_cast<f16>(u16(a[l])));
    const f32 y = wide == Wide::F32 ? std::bit_cast<f32>(b[l]) : wide == Wide::Bf16 ? from_bf16(a[l] >> 16) : f32(std::bit_cast<f16>(u16(a[l] >> 16)));
    const u32 pair = format.encode(f64(x) / s, saturate) | format.encode(f64(y) / s, saturate) << n;
    out[l] = (old[l] & ~mask) | pair << shift;
  }
  store_masked(w, in.op[0].reg, out.lane);
}

template <const Format& format> void add_scaled(Table& t, const std::string& name) {
  const std::string p = "v_cvt_scalef32_pk_";
  t.add(p + "f32_" + name, {scaled_up<format, Wide::F32>, Class::Valu, kOpSel, {2, 1, 1}});
  t.add(p + "f16_" + name, {scaled_up<format, Wide::F16>, Class::Valu, kOpSel, {1, 1, 1}});
  t.add(p + "bf16_" + name, {scaled_up<format, Wide::Bf16>, Class::Valu, kOpSel, {1, 1, 1}});
  t.add(p + name + "_f32", {scaled_down<format, Wide::F32>, Class::Valu, kOpSel | kNegAbs, {1, 1, 1, 1}});
  t.add(p + name + "_f16", {scaled_down<format, Wide::F16>, Class::Valu, kOpSel, {1, 1, 1}});
  t.add(p + name + "_bf16", {scaled_down<format, Wide::Bf16>, Class::Valu, kOpSel, {1, 1, 1}});
}

template <const Format& fp8, const Format& bf8> void add_fp8(Table& t) {
  t.add("v_cvt_pk_fp8_f32", {cvt_pk_fp8<fp8>, Class::Valu, kOpSel | kNegAbs, {1, 1, 1}});
  t.add("v_cvt_pk_bf8_f32", {cvt_pk_fp8<bf8>, Class::Valu, kOpSel | kNegAbs, {1, 1, 1}});
  t.add("v_cvt_pk_f32_fp8", {cvt_pk_f32_fp8<fp8>, Class::Valu, kOpSel | kSdwa, {2, 1}});
  t.add("v_cvt_pk_f32_bf8", {cvt_pk_f32_fp8<bf8>, Class::Valu, kOpSel | kSdwa, {2, 1}});
  t.add("v_cvt_f32_fp8", cvt<f32(u32)>([](u32 a) { return decoded<fp8>()[a & 0xff]; }, kSdwa | kDpp));
  t.add("v_cvt_f32_bf8", cvt<f32(u32)>([](u32 a) { return decoded<bf8>()[a & 0xff]; }, kSdwa | kDpp));
}

}  // namespace

void add_convert(Table& t, Arch arch) {
  // integers
  t.add("v_cvt_f32_i32", cvt<f32(i32)>([](i32 a) { return f32(a); }));
  t.add("v_cvt_f32_u32", cvt<f32(u32)>([](u32 a) { return f32(a); }));
  t.add("v_cvt_i32_f32", cvt<i32(f32)>([](f32 a) { return to_int<i32>(a); }, kIntResult));
  t.add("v_cvt_u32_f32", cvt<u32(f32)>([](f32 a) { return to_int<u32>(a); }, kIntResult));
  t.add("v_cvt_flr_i32_f32", cvt<i32(f32)>([](f32 a) { return to_int<i32>(std::floor(a)); }, kIntResult));
  t.add("v_cvt_rpi_i32_f32", cvt<i32(f32)>([](f32 a) { return to_int<i32>(std::floor(a + 0.5f)); }, kIntResult));
  t.add("v_cvt_f32_ubyte0", cvt<f32(u32)>([](u32 a) { return ubyte(a, 0); }));
  t.add("v_cvt_f32_ubyte1", cvt<f32(u32)>([](u32 a) { return ubyte(a, 1); }));
  t.add("v_cvt_f32_ubyte2", cvt<f32(u32)>([](u32 a) { return ubyte(a, 2); }));
  t.add("v_cvt_f32_ubyte3", cvt<f32(u32)>([](u32 a) { return ubyte(a, 3); }));
  t.add("v_cvt_f16_u16", cvt<f16(u16)>([](u16 a) { return f16(f32(a)); }));
  t.add("v_cvt_f16_i16", cvt<f16(i16)>([](i16 a) { return f16(f32(a)); }));
  t.add("v_cvt_u16_f16", cvt<u16(f16)>([](f16 a) { return to_int<u16>(a); }, kIntResult));
  t.add("v_cvt_i16_f16", cvt<i16(f16)>([](f16 a) { return to_int<i16>(a); }, kIntResult));
  t.add("v_cvt_pk_i16_i32", cvt<u32(i32, i32)>([](i32 a, i32 b) { return clamp_pack<i16>(a, b); }, 0));
  t.add("v_cvt_pk_u16_u32", cvt<u32(u32, u32)>([](u32 a, u32 b) { return clamp_pack<u16>(a, b); }, 0));
  t.add("v_cvt_f64_i32", cvt<f64(i32)>([](i32 a) { return f64(a); }, 0));
  t.add("v_cvt_f64_u32", cvt<f64(u32)>([](u32 a) { return f64(a); }, 0));
  t.add("v_cvt_i32_f64", cvt<i32(f64)>([](f64 a) { return to_int<i32>(a); }, kNegAbs));
  t.add("v_cvt_u32_f64", cvt<u32(f64)>([](f64 a) { return to_int<u32>(a); }, kNegAbs));

  // floats
  t.add("v_cvt_f16_f32", cvt<f16(f32)>([](f32 a) { return f16(a); }));
  t.add("v_cvt_f32_f16", cvt<f32(f16)>([](f16 a) { return f32(a); }));
  t.add("v_cvt_f64_f32", cvt<f64(f32)>([](f32 a) { return f64(a); }, kNegAbs));
  t.add("v_cvt_f32_f64", cvt<f32(f64)>([](f64 a) { return f32(a); }, kNegAbs | kClamp | kOmod));
  t.add("v_cvt_pkrtz_f16_f32", cvt<u32(f32, f32)>([](f32 a, f32 b) { return f16_toward_zero(a) | u32(f16_toward_zero(b)) << 16; }, kNegAbs));
  if (arch == Arch::gfx942) {
    add_fp8<kE4M3Fnuz, kE5M2Fnuz>(t);
  } else {
    add_fp8<kE4M3Fn, kE5M2>(t);
    add_scaled<kE4M3Fn>(t, "fp8");
    add_scaled<kE5M2>(t, "bf8");
    add_scaled<kE2M1>(t, "fp4");
    t.add("v_cvt_f32_bf16", cvt<f32(u16)>([](u16 a) { return from_bf16(a); }, kSdwa | kDpp));
    t.add("v_cvt_pk_bf16_f32", cvt<u32(f32, f32)>([](f32 a, f32 b) { return u32(to_bf16(a)) | u32(to_bf16(b)) << 16; }, kNegAbs));
    t.add("v_cvt_pk_f16_f32", cvt<u32(f32, f32)>([](f32 a, f32 b) { return bits(f16(a)) | bits(f16(b)) << 16; }, kNegAbs));
    t.add("v_ashr_pk_i8_i32", cvt<u16(i32, i32, u32)>([](i32 a, i32 b, u32 c) {
      return u16((u32(std::clamp(a >> (c & 31), -128, 127)) & 0xff) | (u32(std::clamp(b >> (c & 31), -128, 127)) & 0xff) << 8); }, 0));
    t.add("v_ashr_pk_u8_i32", cvt<u16(i32, i32, u32)>([](i32 a, i32 b, u32 c) {
      return u16(u32(std::clamp(a >> (c & 31), 0, 255)) | u32(std::clamp(b >> (c & 31), 0, 255)) << 8); }, 0));
  }
}

}  // namespace emu
