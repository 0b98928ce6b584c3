// SPDX-License-Identifier: Apache-2.0
// Vector ALU: integer arithmetic, shifts, bit fields, carries.
#include <algorithm>

#include "machine.h"

namespace emu {
namespace {

template <class Signature, class F> Entry alu(F, u32 accepts = kDpp | kSdwa) {
  using L = Lanewise<Signature, F>;
  return {L::run, Class::Valu, accepts, L::widths()};
}
// gfx9 three-operand 16-bit instructions keep the other half of the destination.
template <class Signature, class F> Entry short3(F) {
  using L = Lanewise<Signature, F, true>;
  return {L::run, Class::Valu, kOpSel, L::widths()};
}

/// With the clamp modifier the result saturates instead of wrapping. Wide: a type that holds the exact result.
template <class T, class Wide, class F> void wrap_or_clamp(Wave& w, const Instruction& in) {
  constexpr auto wrap = [](T a, T b) { return T(F()(Wide(a), Wide(b))); };
  constexpr auto saturate = [](T a, T b) {
    return T(std::clamp<Wide>(F()(Wide(a), Wide(b)), std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
  };
  if (in.clamp) Lanewise<T(T, T), decltype(saturate)>::run(w, in);
  else Lanewise<T(T, T), decltype(wrap)>::run(w, in);
}
template <class T, class Wide, class F> Entry clampable(F) {
  return {wrap_or_clamp<T, Wide, F>, Class::Valu, kDpp | kSdwa | kClamp, {1, 1, 1}};
}

u32 reverse(u32 a) {
  u32 r = 0;
  for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
  return r;
}

/// Picks bytes of {a, b} by the selector c (v_perm_b32): 0-3 b, 4-7 a, 8-11 sign bytes, 12 zero, 13.. 0xff.
u32 perm(u32 a, u32 b, u32 c) {
  const u64 data = u64(a) << 32 | b;
  u32 r = 0;
  for (int i = 0; i < 32; i += 8) {
    const u32 s = c >> i & 0xff;
    const u32 byte = s < 8 ? u32(data >> (8 * s)) & 0xff : s < 12 ? ((data >> (16 * (s - 8) + 15) & 1) ? 0xffu : 0u) : s == 12 ? 0u : 0xffu;
    r |= byte << i;
  }
  return r;
}

u32 bfe(u32 a, u32 b, u32 c) { return (c & 31) ? a >> (b & 31) & ((1u << (c & 31)) - 1) : 0u; }
i32 bfe_signed(i32 a, u32 b, u32 c) {
  const u32 n = c & 31;
  return n ? i32((u32(a) >> (b & 31)) << (32 - n)) >> (32 - n) : 0;
}
template <class T> T med(T a, T b, T c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); }
u32 sad_u8(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 32; i += 8) c += u32(std::abs(i32(a >> i & 0xff) - i32(b >> i & 0xff)));
  return c;
}
i32 sext24(i32 a) { return i32(u32(a) << 8) >> 8; }

// Adds with carry. Operands: result, carry out, a, b [, carry in].
template <bool with_carry_in, class F> void carry_op(Wave& w, const Instruction& in) {
  u32 a_buf[kLanes], b_buf[kLanes], out[kLanes];
  const u32 *a = fetch<u32>(w, in, 2, a_buf), *b = fetch<u32>(w, in, 3, b_buf);
  const u64 carry_in = with_carry_in ? scalar<u64>(w, in.op[4]) : 0;
  u64 carry_out = 0;
  for (int l = 0; l < kLanes; ++l) {
    const u64 r = F()(u64(a[l]), u64(b[l]), carry_in >> l & 1);
    out[l] = u32(r);
    carry_out |= (r >> 32 & 1) << l;
  }
  w.write_scalar64(in.op[1].reg, carry_out & w.exec());
  commit(w, in, out);
}
template <bool with_carry_in, class F> Entry carry(F) {
  return {carry_op<with_carry_in, F>, Class::Valu, kDpp | kSdwa, with_carry_in ? std::vector<i8>{1, 2, 1, 1, 2} : std::vector<i8>{1, 2, 1, 1}, 2};
}

// v_mad_u64_u32: result pair, carry out, a, b, 64-bit c.
template <class T, class Wide> void mad64(Wave& w, const Instruction& in) {
  T a_buf[kLanes], b_buf[kLanes];
  u64 c_buf[kLanes], out[kLanes];
  const T *a = fetch<T>(w, in, 2, a_buf), *b = fetch<T>(w, in, 3, b_buf);
  const u64* c = fetch<u64>(w, in, 4, c_buf);
  u64 carry = 0;
  for (int l = 0; l < kLanes; ++l) {
    const Wide product = Wide(a[l]) * Wide(b[l]);
    out[l] = u64(product) + c[l];
    if constexpr (std::is_signed_v<T>) {
      i64 sum;
      carry |= u64(__builtin_add_overflow(i64(product), i64(c[l]), &sum)) << l;
    } else {
      carry |= u64(out[l] < c[l]) << l;
    }
  }
  w.write_scalar64(in.op[1].reg, carry & w.exec());
  commit(w, in, out);
}

u32 bitop(u32 a, u32 b, u32 c, u32 table) {  // bit i of table: result for (a, b, c) = i's bits, a the highest
  u32 r = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) r |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
  return r;
}
template <class T> void bitop3(Wave& w, const Instruction& in) {
  alignas(64) T buf[3][kLanes];
  alignas(64) T out[kLanes];
  const T *a = fetch<T>(w, in, 1, buf[0]), *b = fetch<T>(w, in, 2, buf[1]), *c = fetch<T>(w, in, 3, buf[2]);
  for (int l = 0; l < kLanes; ++l) out[l] = T(bitop(a[l], b[l], c[l], in.offset0));
  commit<T, sizeof(T) == 2>(w, in, out);
}

}  // namespace

void add_integer(Table& t) {
  // 32-bit arithmetic
  t.add("v_add_u32", clampable<u32, i64>([](i64 a, i64 b) { return a + b; }));
  t.add("v_sub_u32", clampable<u32, i64>([](i64 a, i64 b) { return a - b; }));
  t.add("v_subrev_u32", clampable<u32, i64>([](i64 a, i64 b) { return b - a; }));
  t.add("v_add_i32", clampable<i32, i64>([](i64 a, i64 b) { return a + b; }));
  t.add("v_sub_i32", clampable<i32, i64>([](i64 a, i64 b) { return a - b; }));
  t.add("v_add3_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return a + b + c; }));
  t.add("v_add_lshl_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return (a + b) << (c & 31); }));
  t.add("v_lshl_add_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return (a << (b & 31)) + c; }));
  t.add("v_mul_lo_u32", alu<u32(u32, u32)>([](u32 a, u32 b) { return a * b; }, 0));
  t.add("v_mul_hi_u32", alu<u32(u32, u32)>([](u32 a, u32 b) { return u32(u64(a) * b >> 32); }, 0));
  t.add("v_mul_hi_i32", alu<i32(i32, i32)>([](i32 a, i32 b) { return i32(i64(a) * b >> 32); }, 0));
  t.add("v_mul_u32_u24", alu<u32(u32, u32)>([](u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }));
  t.add("v_mul_i32_i24", alu<i32(i32, i32)>([](i32 a, i32 b) { return i32(u32(sext24(a)) * u32(sext24(b))); }));
  t.add("v_mul_hi_u32_u24", alu<u32(u32, u32)>([](u32 a, u32 b) { return u32(u64(a & 0xffffff) * (b & 0xffffff) >> 32); }));
  t.add("v_mul_hi_i32_i24", alu<i32(i32, i32)>([](i32 a, i32 b) { return i32(i64(sext24(a)) * sext24(b) >> 32); }));
  t.add("v_mad_u32_u24", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return (a & 0xffffff) * (b & 0xffffff) + c; }, 0));
  t.add("v_mad_i32_i24", alu<u32(i32, i32, u32)>([](i32 a, i32 b, u32 c) { return u32(sext24(a)) * u32(sext24(b)) + c; }, 0));
  t.add("v_min_i32", alu<i32(i32, i32)>([](i32 a, i32 b) { return a < b ? a : b; }));
  t.add("v_max_i32", alu<i32(i32, i32)>([](i32 a, i32 b) { return a > b ? a : b; }));
  t.add("v_min_u32", alu<u32(u32, u32)>([](u32 a, u32 b) { return a < b ? a : b; }));
  t.add("v_max_u32", alu<u32(u32, u32)>([](u32 a, u32 b) { return a > b ? a : b; }));
  t.add("v_min3_i32", alu<i32(i32, i32, i32)>([](i32 a, i32 b, i32 c) { return std::min(std::min(a, b), c); }, 0));
  t.add("v_max3_i32", alu<i32(i32, i32, i32)>([](i32 a, i32 b, i32 c) { return std::max(std::max(a, b), c); }, 0));
  t.add("v_min3_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return std::min(std::min(a, b), c); }, 0));
  t.add("v_max3_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return std::max(std::max(a, b), c); }, 0));
  t.add("v_med3_i32", alu<i32(i32, i32, i32)>([](i32 a, i32 b, i32 c) { return med(a, b, c); }, 0));
  t.add("v_med3_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return med(a, b, c); }, 0));
  t.add("v_sad_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return (a > b ? a - b : b - a) + c; }, 0));
  t.add("v_sad_u8", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return sad_u8(a, b, c); }, 0));

  // carries and 64 bits
  t.add("v_add_co_u32", carry<false>([](u64 a, u64 b, u64) { return a + b; }));
  t.add("v_sub_co_u32", carry<false>([](u64 a, u64 b, u64) { return a - b; }));
  t.add("v_subrev_co_u32", carry<false>([](u64 a, u64 b, u64) { return b - a; }));
  t.add("v_addc_co_u32", carry<true>([](u64 a, u64 b, u64 c) { return a + b + c; }));
  t.add("v_subb_co_u32", carry<true>([](u64 a, u64 b, u64 c) { return a - b - c; }));
  t.add("v_subbrev_co_u32", carry<true>([](u64 a, u64 b, u64 c) { return b - a - c; }));
  t.add("v_mad_u64_u32", {mad64<u32, u64>, Class::Valu, 0, {2, 2, 1, 1, 2}, 2});
  t.add("v_mad_i64_i32", {mad64<i32, i64>, Class::Valu, 0, {2, 2, 1, 1, 2}, 2});
  t.add("v_lshl_add_u64", alu<u64(u64, u32, u64)>([](u64 a, u32 b, u64 c) { return (a << (b & 7)) + c; }, 0));
  t.add("v_lshlrev_b64", alu<u64(u32, u64)>([](u32 a, u64 b) { return b << (a & 63); }, 0));
  t.add("v_lshrrev_b64", alu<u64(u32, u64)>([](u32 a, u64 b) { return b >> (a & 63); }, 0));
  t.add("v_ashrrev_i64", alu<i64(u32, i64)>([](u32 a, i64 b) { return b >> (a & 63); }, 0));

  // logic and shifts
  t.add("v_and_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return a & b; }));
  t.add("v_or_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return a | b; }));
  t.add("v_xor_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return a ^ b; }));
  t.add("v_xnor_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return ~(a ^ b); }));
  t.add("v_not_b32", alu<u32(u32)>([](u32 a) { return ~a; }));
  t.add("v_bfrev_b32", alu<u32(u32)>([](u32 a) { return reverse(a); }));
  t.add("v_lshlrev_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return b << (a & 31); }));
  t.add("v_lshrrev_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return b >> (a & 31); }));
  t.add("v_ashrrev_i32", alu<i32(u32, i32)>([](u32 a, i32 b) { return b >> (a & 31); }));
  t.add("v_and_or_b32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return (a & b) | c; }, 0));
  t.add("v_or3_b32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return a | b | c; }, 0));
  t.add("v_xad_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return (a ^ b) + c; }, 0));
  t.add("v_lshl_or_b32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return a << (b & 31) | c; }, 0));
  t.add("v_bfe_u32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return bfe(a, b, c); }, 0));
  t.add("v_bfe_i32", alu<i32(i32, u32, u32)>([](i32 a, u32 b, u32 c) { return bfe_signed(a, b, c); }, 0));
  t.add("v_bfi_b32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return (a & b) | (~a & c); }, 0));
  t.add("v_bfm_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); }, 0));
  t.add("v_alignbit_b32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return u32((u64(a) << 32 | b) >> (c & 31)); }, 0));
  t.add("v_alignbyte_b32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return u32((u64(a) << 32 | b) >> (8 * (c & 3))); }, 0));
  t.add("v_perm_b32", alu<u32(u32, u32, u32)>([](u32 a, u32 b, u32 c) { return perm(a, b, c); }, 0));
  t.add("v_bcnt_u32_b32", alu<u32(u32, u32)>([](u32 a, u32 b) { return u32(std::popcount(a)) + b; }, 0));
  t.add("v_ffbh_u32", alu<i32(u32)>([](u32 a) { return a ? std::countl_zero(a) : -1; }));
  t.add("v_ffbl_b32", alu<i32(u32)>([](u32 a) { return a ? std::countr_zero(a) : -1; }));
  t.add("v_ffbh_i32", alu<i32(i32)>([](i32 a) { const u32 b = u32(a ^ a >> 31); return b ? std::countl_zero(b) : -1; }));
  t.add("v_bitop3_b32", {bitop3<u32>, Class::Valu, 0, {1, 1, 1, 1}});
  t.add("v_bitop3_b16", {bitop3<u16>, Class::Valu, kOpSel, {1, 1, 1, 1}});

  // 16-bit
  t.add("v_add_u16", clampable<u16, i32>([](i32 a, i32 b) { return a + b; }));
  t.add("v_sub_u16", clampable<u16, i32>([](i32 a, i32 b) { return a - b; }));
  t.add("v_subrev_u16", clampable<u16, i32>([](i32 a, i32 b) { return b - a; }));
  t.add("v_mul_lo_u16", alu<u16(u16, u16)>([](u16 a, u16 b) { return u16(u32(a) * b); }));
  t.add("v_lshlrev_b16", alu<u16(u16, u16)>([](u16 a, u16 b) { return u16(b << (a & 15)); }));
  t.add("v_lshrrev_b16", alu<u16(u16, u16)>([](u16 a, u16 b) { return u16(b >> (a & 15)); }));
  t.add("v_ashrrev_i16", alu<i16(u16, i16)>([](u16 a, i16 b) { return i16(b >> (a & 15)); }));
  t.add("v_min_u16", alu<u16(u16, u16)>([](u16 a, u16 b) { return a < b ? a : b; }));
  t.add("v_max_u16", alu<u16(u16, u16)>([](u16 a, u16 b) { return a > b ? a : b; }));
  t.add("v_min_i16", alu<i16(i16, i16)>([](i16 a, i16 b) { return a < b ? a : b; }));
  t.add("v_max_i16", alu<i16(i16, i16)>([](i16 a, i16 b) { return a > b ? a : b; }));
  t.add("v_add_i16", short3<u16(u16, u16)>([](u16 a, u16 b) { return u16(a + b); }));
  t.add("v_sub_i16", short3<u16(u16, u16)>([](u16 a, u16 b) { return u16(a - b); }));
  t.add("v_mad_u16", short3<u16(u16, u16, u16)>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }));
  t.add("v_mad_i16", short3<u16(u16, u16, u16)>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }));
  t.add("v_mad_legacy_u16", alu<u16(u16, u16, u16)>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }, 0));
  t.add("v_mad_u32_u16", alu<u32(u16, u16, u32)>([](u16 a, u16 b, u32 c) { return u32(a) * b + c; }, kOpSel));
  t.add("v_mad_i32_i16", alu<i32(i16, i16, i32)>([](i16 a, i16 b, i32 c) { return i32(u32(i32(a) * b) + u32(c)); }, kOpSel));
  t.add("v_min3_u16", short3<u16(u16, u16, u16)>([](u16 a, u16 b, u16 c) { return std::min(std::min(a, b), c); }));
  t.add("v_max3_u16", short3<u16(u16, u16, u16)>([](u16 a, u16 b, u16 c) { return std::max(std::max(a, b), c); }));
  t.add("v_min3_i16", short3<i16(i16, i16, i16)>([](i16 a, i16 b, i16 c) { return std::min(std::min(a, b), c); }));
  t.add("v_max3_i16", short3<i16(i16, i16, i16)>([](i16 a, i16 b, i16 c) { return std::max(std::max(a, b), c); }));
  t.add("v_med3_u16", short3<u16(u16, u16, u16)>([](u16 a, u16 b, u16 c) { return med(a, b, c); }));
  t.add("v_med3_i16", short3<i16(i16, i16, i16)>([](i16 a, i16 b, i16 c) { return med(a, b, c); }));
  t.add("v_pack_b32_f16", alu<u32(u16, u16)>([](u16 a, u16 b) { return u32(a) | u32(b) << 16; }, kOpSel));
}

}  // namespace emu
