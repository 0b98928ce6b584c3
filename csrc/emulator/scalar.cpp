// SPDX-License-Identifier: Apache-2.0
// Scalar ALU, branches, scalar loads, barriers.
#include "machine.h"

namespace emu {
namespace {

constexpr int kScc = 255;  // pseudo register of the operand src_scc

template <class T> T read(const Wave& w, const Operand& o) {
  if (o.kind == Kind::Scalar && o.reg == kScc) return T(w.scc);
  return scalar<T>(w, o);
}

template <class T> void write(Wave& w, const Operand& o, T x) {
  if constexpr (sizeof(T) == 8) w.write_scalar64(o.reg, std::bit_cast<u64>(x));
  else w.write_scalar(o.reg, std::bit_cast<u32>(x));
}

template <class T> constexpr i8 width = sizeof(T) == 8 ? 2 : 1;

enum Scc { kKeep, kNonZero, kSet };  // kSet: the lambda writes scc itself

template <class Signature, Scc scc, class F> struct Op;

template <class D, class A, Scc scc, class F> struct Op<D(A), scc, F> {
  static void run(Wave& w, const Instruction& in) {
    const D d = D(F()(read<A>(w, in.op[1]), w.scc));
    write<D>(w, in.op[0], d);
    if (scc == kNonZero) w.scc = d != 0;
  }
  static std::vector<i8> widths() { return {width<D>, width<A>}; }
};

template <class D, class A, class B, Scc scc, class F> struct Op<D(A, B), scc, F> {
  static void run(Wave& w, const Instruction& in) {
    const D d = D(F()(read<A>(w, in.op[1]), read<B>(w, in.op[2]), w.scc));
    write<D>(w, in.op[0], d);
    if (scc == kNonZero) w.scc = d != 0;
  }
  static std::vector<i8> widths() { return {width<D>, width<A>, width<B>}; }
};

template <class Signature, Scc scc, class F> Entry salu(F) {
  using O = Op<Signature, scc, F>;
  return {O::run, Class::Salu, 0, O::widths()};
}

template <class T, class B = T, class F> void compare_scalars(Wave& w, const Instruction& in) {
  w.scc = F()(read<T>(w, in.op[0]), read<B>(w, in.op[1]));
}
template <class T, class F> Entry cmp(F) { return {compare_scalars<T, T, F>, Class::Salu, 0, {width<T>, width<T>}}; }

template <class F> Entry bit64(F) { return {compare_scalars<u64, u32, F>, Class::Salu, 0, {2, 0}}; }  // the bit number is a dword

// s_*_saveexec: D = EXEC, EXEC = F(source, EXEC), SCC = EXEC != 0.
template <class F> void saveexec(Wave& w, const Instruction& in) {
  const u64 source = read<u64>(w, in.op[1]), exec = w.exec();
  write<u64>(w, in.op[0], exec);
  w.write_scalar64(kExec, F()(source, exec));
  w.scc = w.exec() != 0;
}
template <class F> Entry save(F) { return {saveexec<F>, Class::Salu, 0, {2, 2}}; }

// SOPK: the 16-bit immediate is printed unsigned and means a signed number; addk and mulk also read the destination.
i32 imm16(const Wave& w, const Operand& o) { return i16(u16(read<u32>(w, o))); }
template <Scc scc, class F> void sopk(Wave& w, const Instruction& in) {
  const i32 d = F()(i32(w.s[in.op[0].reg]), imm16(w, in.op[1]), w.scc);
  w.write_scalar(in.op[0].reg, u32(d));
}
template <Scc scc, class F> Entry k(F) { return {sopk<scc, F>, Class::Salu, 0, {1, 1}}; }
template <class T, class F> void sopk_compare(Wave& w, const Instruction& in) {
  const u32 k = read<u32>(w, in.op[1]);
  w.scc = F()(std::bit_cast<T>(w.s[in.op[0].reg]), std::is_signed_v<T> ? T(i16(u16(k))) : T(u16(k)));
}
template <class T, class F> Entry kcmp(F) { return {sopk_compare<T, F>, Class::Salu, 0, {1, 1}}; }

void cmov32(Wave& w, const Instruction& in) { if (w.scc) write<u32>(w, in.op[0], read<u32>(w, in.op[1])); }
void cmov64(Wave& w, const Instruction& in) { if (w.scc) write<u64>(w, in.op[0], read<u64>(w, in.op[1])); }
void cmovk(Wave& w, const Instruction& in) { if (w.scc) write<u32>(w, in.op[0], u32(imm16(w, in.op[1]))); }
void bitset0(Wave& w, const Instruction& in) {
  w.write_scalar(in.op[0].reg, w.s[in.op[0].reg] & ~(1u << (read<u32>(w, in.op[1]) & 31)));
}
void bitset1(Wave& w, const Instruction& in) {
  w.write_scalar(in.op[0].reg, w.s[in.op[0].reg] | 1u << (read<u32>(w, in.op[1]) & 31));
}

template <class T> T field(T x, u32 s1) {  // s_bfe: offset in bits 5:0, width in bits 22:16
  constexpr u32 bits = 8 * sizeof(T);
  const u32 offset = s1 & (bits - 1), length = s1 >> 16 & 0x7f;
  if (length == 0) return 0;
  if (offset + length >= bits) return x >> offset;
  return T(T(x) << (bits - offset - length)) >> (bits - length);
}

void branch(Wave& w, const Instruction& in) { w.pc = in.target; }
template <class F> void branch_if(Wave& w, const Instruction& in) { if (F()(w)) w.pc = in.target; }
template <class F> Entry cbranch(F) { return {branch_if<F>, Class::Control, 0, {}}; }
u64 vcc(const Wave& w) { return w.s[kVcc] | u64(w.s[kVcc + 1]) << 32; }

void nothing(Wave&, const Instruction&) {}
void endpgm(Wave& w, const Instruction&) { w.done = true, w.running = false; }
void barrier(Wave& w, const Instruction&) { w.at_barrier = true, w.running = false; }
void sleep(Wave& w, const Instruction&) { w.running = false; }  // it waits for somebody: their turn
void trap(Wave& w, const Instruction& in) { fail(w, in, "the kernel executed s_trap (an assertion or unreachable code)"); }

// Code lives at address 0: a symbol's pc-relative distance is then its address (see decoder.py).
void getpc(Wave& w, const Instruction& in) { w.write_scalar64(in.op[0].reg, 0); }

// Only what kernels change: the fp8/f16 overflow mode (bit 23). op[1] holds id, offset, size of the hardware register.
void setreg(Wave& w, const Instruction& in) {
  const u32 where = u32(in.op[0].bits32), id = where & 63, offset = where >> 6 & 31, size = (where >> 11 & 31) + 1;
  const u32 mask = (size == 32 ? ~0u : (1u << size) - 1) << offset;
  const u32 mode = (w.mode & ~mask) | (read<u32>(w, in.op[1]) << offset & mask);
  if (id != 1) fail(w, in, "only the MODE register can be written");
  if ((mode ^ w.mode) & ~(1u << 23)) fail(w, in, "MODE: only bit 23 (overflow clamp) may change; rounding and denormals may not");
  w.mode = mode;
}

template <int dwords> void load(Wave& w, const Instruction& in) {
  const Operand &base = in.op[1], &offset = in.op[2];
  u64 address = w.s[base.reg] | u64(w.s[base.reg + 1]) << 32;
  if (base.count == 4) address &= 0xffffffffffffull;  // buffer descriptor
  const i64 off = (offset.kind == Kind::Literal ? i64(offset.bits64) : i64(w.s[offset.reg])) + in.offset;
  if (base.count == 4 && u64(off) + 4 * dwords > w.s[base.reg + 2]) fail(w, in, "scalar buffer load past num_records");
  address = (address + off) & ~u64(3);
  const Region& r = check_access(w, in, address, 4 * dwords, false, 0);
  (void)r;
  u32 data[dwords];
  std::memcpy(data, reinterpret_cast<const void*>(address), sizeof data);
  for (int i = 0; i < dwords; ++i) w.write_scalar(in.op[0].reg + i, data[i]);
}
template <int dwords> Entry smem(i8 base) { return {load<dwords>, Class::Smem, kOffset | kCache, {dwords, base, 0}}; }

}  // namespace

void add_scalar(Table& t) {
  // moves and bits
  t.add("s_mov_b32", salu<u32(u32), kKeep>([](u32 a, bool) { return a; }));
  t.add("s_mov_b64", salu<u64(u64), kKeep>([](u64 a, bool) { return a; }));
  t.add("s_not_b32", salu<u32(u32), kNonZero>([](u32 a, bool) { return ~a; }));
  t.add("s_not_b64", salu<u64(u64), kNonZero>([](u64 a, bool) { return ~a; }));
  t.add("s_brev_b32", salu<u32(u32), kKeep>([](u32 a, bool) { u32 r = 0; for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i); return r; }));
  t.add("s_brev_b64", salu<u64(u64), kKeep>([](u64 a, bool) { u64 r = 0; for (int i = 0; i < 64; ++i) r |= (a >> i & 1) << (63 - i); return r; }));
  t.add("s_abs_i32", salu<u32(u32), kNonZero>([](u32 a, bool) { return i32(a) < 0 ? 0u - a : a; }));
  t.add("s_sext_i32_i8", salu<i32(u32), kKeep>([](u32 a, bool) { return i32(i8(a)); }));
  t.add("s_sext_i32_i16", salu<i32(u32), kKeep>([](u32 a, bool) { return i32(i16(a)); }));
  t.add("s_bcnt1_i32_b32", salu<u32(u32), kNonZero>([](u32 a, bool) { return std::popcount(a); }));
  t.add("s_bcnt1_i32_b64", salu<u32(u64), kNonZero>([](u64 a, bool) { return std::popcount(a); }));
  t.add("s_bcnt0_i32_b32", salu<u32(u32), kNonZero>([](u32 a, bool) { return std::popcount(~a); }));
  t.add("s_bcnt0_i32_b64", salu<u32(u64), kNonZero>([](u64 a, bool) { return std::popcount(~a); }));
  t.add("s_ff1_i32_b32", salu<i32(u32), kKeep>([](u32 a, bool) { return a ? std::countr_zero(a) : -1; }));
  t.add("s_ff1_i32_b64", salu<i32(u64), kKeep>([](u64 a, bool) { return a ? std::countr_zero(a) : -1; }));
  t.add("s_ff0_i32_b32", salu<i32(u32), kKeep>([](u32 a, bool) { return ~a ? std::countr_one(a) : -1; }));
  t.add("s_ff0_i32_b64", salu<i32(u64), kKeep>([](u64 a, bool) { return ~a ? std::countr_one(a) : -1; }));
  t.add("s_flbit_i32_b32", salu<i32(u32), kKeep>([](u32 a, bool) { return a ? std::countl_zero(a) : -1; }));
  t.add("s_flbit_i32_b64", salu<i32(u64), kKeep>([](u64 a, bool) { return a ? std::countl_zero(a) : -1; }));
  t.add("s_flbit_i32", salu<i32(i32), kKeep>([](i32 a, bool) { const u32 b = u32(a ^ a >> 31); return b ? std::countl_zero(b) : -1; }));
  t.add("s_cmov_b32", {cmov32, Class::Salu, 0, {1, 1}});
  t.add("s_cmov_b64", {cmov64, Class::Salu, 0, {2, 2}});
  t.add("s_bitset0_b32", {bitset0, Class::Salu, 0, {1, 1}});
  t.add("s_bitset1_b32", {bitset1, Class::Salu, 0, {1, 1}});
  t.add("s_getpc_b64", {getpc, Class::Salu, 0, {2}});

  // arithmetic
  t.add("s_add_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { c = u64(a) + b >> 32; return a + b; }));
  t.add("s_sub_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { c = b > a; return a - b; }));
  t.add("s_add_i32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { i32 r; c = __builtin_add_overflow(i32(a), i32(b), &r); return u32(r); }));
  t.add("s_sub_i32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { i32 r; c = __builtin_sub_overflow(i32(a), i32(b), &r); return u32(r); }));
  t.add("s_addc_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { const u64 r = u64(a) + b + c; c = r >> 32; return u32(r); }));
  t.add("s_subb_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { const u64 r = u64(a) - b - c; c = r >> 63; return u32(r); }));
  t.add("s_mul_i32", salu<u32(u32, u32), kKeep>([](u32 a, u32 b, bool) { return a * b; }));
  t.add("s_mul_hi_u32", salu<u32(u32, u32), kKeep>([](u32 a, u32 b, bool) { return u64(a) * b >> 32; }));
  t.add("s_mul_hi_i32", salu<i32(i32, i32), kKeep>([](i32 a, i32 b, bool) { return i64(a) * b >> 32; }));
  t.add("s_min_i32", salu<i32(i32, i32), kSet>([](i32 a, i32 b, bool& c) { c = a < b; return c ? a : b; }));
  t.add("s_max_i32", salu<i32(i32, i32), kSet>([](i32 a, i32 b, bool& c) { c = a > b; return c ? a : b; }));
  t.add("s_min_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { c = a < b; return c ? a : b; }));
  t.add("s_max_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { c = a > b; return c ? a : b; }));
  t.add("s_absdiff_i32", salu<u32(i32, i32), kNonZero>([](i32 a, i32 b, bool) { return a > b ? u32(a) - u32(b) : u32(b) - u32(a); }));
  t.add("s_lshl1_add_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { const u64 r = (u64(a) << 1) + b; c = r >> 32; return u32(r); }));
  t.add("s_lshl2_add_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { const u64 r = (u64(a) << 2) + b; c = r >> 32; return u32(r); }));
  t.add("s_lshl3_add_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { const u64 r = (u64(a) << 3) + b; c = r >> 32; return u32(r); }));
  t.add("s_lshl4_add_u32", salu<u32(u32, u32), kSet>([](u32 a, u32 b, bool& c) { const u64 r = (u64(a) << 4) + b; c = r >> 32; return u32(r); }));
  t.add("s_pack_ll_b32_b16", salu<u32(u32, u32), kKeep>([](u32 a, u32 b, bool) { return (a & 0xffff) | b << 16; }));
  t.add("s_pack_lh_b32_b16", salu<u32(u32, u32), kKeep>([](u32 a, u32 b, bool) { return (a & 0xffff) | (b & 0xffff0000); }));
  t.add("s_pack_hh_b32_b16", salu<u32(u32, u32), kKeep>([](u32 a, u32 b, bool) { return a >> 16 | (b & 0xffff0000); }));
  t.add("s_cselect_b32", salu<u32(u32, u32), kKeep>([](u32 a, u32 b, bool c) { return c ? a : b; }));
  t.add("s_cselect_b64", salu<u64(u64, u64), kKeep>([](u64 a, u64 b, bool c) { return c ? a : b; }));

  // logic and shifts
  t.add("s_and_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return a & b; }));
  t.add("s_and_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return a & b; }));
  t.add("s_or_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return a | b; }));
  t.add("s_or_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return a | b; }));
  t.add("s_xor_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return a ^ b; }));
  t.add("s_xor_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return a ^ b; }));
  t.add("s_andn2_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return a & ~b; }));
  t.add("s_andn2_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return a & ~b; }));
  t.add("s_orn2_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return a | ~b; }));
  t.add("s_orn2_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return a | ~b; }));
  t.add("s_nand_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return ~(a & b); }));
  t.add("s_nand_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return ~(a & b); }));
  t.add("s_nor_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return ~(a | b); }));
  t.add("s_nor_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return ~(a | b); }));
  t.add("s_xnor_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return ~(a ^ b); }));
  t.add("s_xnor_b64", salu<u64(u64, u64), kNonZero>([](u64 a, u64 b, bool) { return ~(a ^ b); }));
  t.add("s_lshl_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return a << (b & 31); }));
  t.add("s_lshl_b64", salu<u64(u64, u32), kNonZero>([](u64 a, u32 b, bool) { return a << (b & 63); }));
  t.add("s_lshr_b32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return a >> (b & 31); }));
  t.add("s_lshr_b64", salu<u64(u64, u32), kNonZero>([](u64 a, u32 b, bool) { return a >> (b & 63); }));
  t.add("s_ashr_i32", salu<i32(i32, u32), kNonZero>([](i32 a, u32 b, bool) { return a >> (b & 31); }));
  t.add("s_ashr_i64", salu<i64(i64, u32), kNonZero>([](i64 a, u32 b, bool) { return a >> (b & 63); }));
  t.add("s_bfm_b32", salu<u32(u32, u32), kKeep>([](u32 a, u32 b, bool) { return ((1u << (a & 31)) - 1) << (b & 31); }));
  t.add("s_bfm_b64", salu<u64(u32, u32), kKeep>([](u32 a, u32 b, bool) { return ((u64(1) << (a & 63)) - 1) << (b & 63); }));
  t.add("s_bfe_u32", salu<u32(u32, u32), kNonZero>([](u32 a, u32 b, bool) { return field(a, b); }));
  t.add("s_bfe_i32", salu<i32(i32, u32), kNonZero>([](i32 a, u32 b, bool) { return field(a, b); }));
  t.add("s_bfe_u64", salu<u64(u64, u32), kNonZero>([](u64 a, u32 b, bool) { return field(a, b); }));
  t.add("s_bfe_i64", salu<i64(i64, u32), kNonZero>([](i64 a, u32 b, bool) { return field(a, b); }));

  // compares
  t.add("s_cmp_eq_i32", cmp<i32>([](i32 a, i32 b) { return a == b; }));
  t.add("s_cmp_lg_i32", cmp<i32>([](i32 a, i32 b) { return a != b; }));
  t.add("s_cmp_gt_i32", cmp<i32>([](i32 a, i32 b) { return a > b; }));
  t.add("s_cmp_ge_i32", cmp<i32>([](i32 a, i32 b) { return a >= b; }));
  t.add("s_cmp_lt_i32", cmp<i32>([](i32 a, i32 b) { return a < b; }));
  t.add("s_cmp_le_i32", cmp<i32>([](i32 a, i32 b) { return a <= b; }));
  t.add("s_cmp_eq_u32", cmp<u32>([](u32 a, u32 b) { return a == b; }));
  t.add("s_cmp_lg_u32", cmp<u32>([](u32 a, u32 b) { return a != b; }));
  t.add("s_cmp_gt_u32", cmp<u32>([](u32 a, u32 b) { return a > b; }));
  t.add("s_cmp_ge_u32", cmp<u32>([](u32 a, u32 b) { return a >= b; }));
  t.add("s_cmp_lt_u32", cmp<u32>([](u32 a, u32 b) { return a < b; }));
  t.add("s_cmp_le_u32", cmp<u32>([](u32 a, u32 b) { return a <= b; }));
  t.add("s_cmp_eq_u64", cmp<u64>([](u64 a, u64 b) { return a == b; }));
  t.add("s_cmp_lg_u64", cmp<u64>([](u64 a, u64 b) { return a != b; }));
  t.add("s_bitcmp0_b32", cmp<u32>([](u32 a, u32 b) { return !(a >> (b & 31) & 1); }));
  t.add("s_bitcmp1_b32", cmp<u32>([](u32 a, u32 b) { return a >> (b & 31) & 1; }));
  t.add("s_bitcmp0_b64", bit64([](u64 a, u64 b) { return !(a >> (b & 63) & 1); }));
  t.add("s_bitcmp1_b64", bit64([](u64 a, u64 b) { return a >> (b & 63) & 1; }));

  // 16-bit immediates
  t.add("s_movk_i32", k<kKeep>([](i32, i32 b, bool) { return b; }));
  t.add("s_addk_i32", k<kSet>([](i32 a, i32 b, bool& c) { i32 r; c = __builtin_add_overflow(a, b, &r); return r; }));
  t.add("s_mulk_i32", k<kKeep>([](i32 a, i32 b, bool) { return i32(u32(a) * u32(b)); }));
  t.add("s_cmovk_i32", {cmovk, Class::Salu, 0, {1, 1}});
  t.add("s_cmpk_eq_i32", kcmp<i32>([](i32 a, i32 b) { return a == b; }));
  t.add("s_cmpk_lg_i32", kcmp<i32>([](i32 a, i32 b) { return a != b; }));
  t.add("s_cmpk_gt_i32", kcmp<i32>([](i32 a, i32 b) { return a > b; }));
  t.add("s_cmpk_ge_i32", kcmp<i32>([](i32 a, i32 b) { return a >= b; }));
  t.add("s_cmpk_lt_i32", kcmp<i32>([](i32 a, i32 b) { return a < b; }));
  t.add("s_cmpk_le_i32", kcmp<i32>([](i32 a, i32 b) { return a <= b; }));
  t.add("s_cmpk_eq_u32", kcmp<u32>([](u32 a, u32 b) { return a == b; }));
  t.add("s_cmpk_lg_u32", kcmp<u32>([](u32 a, u32 b) { return a != b; }));
  t.add("s_cmpk_gt_u32", kcmp<u32>([](u32 a, u32 b) { return a > b; }));
  t.add("s_cmpk_ge_u32", kcmp<u32>([](u32 a, u32 b) { return a >= b; }));
  t.add("s_cmpk_lt_u32", kcmp<u32>([](u32 a, u32 b) { return a < b; }));
  t.add("s_cmpk_le_u32", kcmp<u32>([](u32 a, u32 b) { return a <= b; }));

  // EXEC
  t.add("s_and_saveexec_b64", save([](u64 a, u64 e) { return a & e; }));
  t.add("s_or_saveexec_b64", save([](u64 a, u64 e) { return a | e; }));
  t.add("s_xor_saveexec_b64", save([](u64 a, u64 e) { return a ^ e; }));
  t.add("s_andn2_saveexec_b64", save([](u64 a, u64 e) { return a & ~e; }));
  t.add("s_orn2_saveexec_b64", save([](u64 a, u64 e) { return a | ~e; }));
  t.add("s_nand_saveexec_b64", save([](u64 a, u64 e) { return ~(a & e); }));
  t.add("s_nor_saveexec_b64", save([](u64 a, u64 e) { return ~(a | e); }));
  t.add("s_xnor_saveexec_b64", save([](u64 a, u64 e) { return ~(a ^ e); }));
  t.add("s_andn1_saveexec_b64", save([](u64 a, u64 e) { return ~a & e; }));
  t.add("s_orn1_saveexec_b64", save([](u64 a, u64 e) { return ~a | e; }));

  // control
  t.add("s_branch", {branch, Class::Control, 0, {}});
  t.add("s_cbranch_scc0", cbranch([](const Wave& w) { return !w.scc; }));
  t.add("s_cbranch_scc1", cbranch([](const Wave& w) { return w.scc; }));
  t.add("s_cbranch_vccz", cbranch([](const Wave& w) { return vcc(w) == 0; }));
  t.add("s_cbranch_vccnz", cbranch([](const Wave& w) { return vcc(w) != 0; }));
  t.add("s_cbranch_execz", cbranch([](const Wave& w) { return w.exec() == 0; }));
  t.add("s_cbranch_execnz", cbranch([](const Wave& w) { return w.exec() != 0; }));
  t.add("s_barrier", {barrier, Class::Control, 0, {}});
  t.add("s_sleep", {sleep, Class::Control, 0, {}});
  t.add("s_endpgm", {endpgm, Class::Control, 0, {}});
  t.add("s_trap", {trap, Class::Control, 0, {0}});
  for (const char* name : {"s_nop", "s_waitcnt", "s_setprio", "s_inst_prefetch", "s_icache_inv",
                           "s_dcache_inv", "s_dcache_wb", "s_dcache_inv_vol", "s_sched_barrier"})
    t.add(name, {nothing, Class::Control, 0, {}});
  t.add("s_setreg_imm32_b32", {setreg, Class::Control, 0, {0, 1}});
  t.add("s_setreg_b32", {setreg, Class::Control, 0, {0, 1}});

  // scalar memory
  t.add("s_load_dword", smem<1>(2));
  t.add("s_load_dwordx2", smem<2>(2));
  t.add("s_load_dwordx4", smem<4>(2));
  t.add("s_load_dwordx8", smem<8>(2));
  t.add("s_load_dwordx16", smem<16>(2));
  t.add("s_buffer_load_dword", smem<1>(4));
  t.add("s_buffer_load_dwordx2", smem<2>(4));
  t.add("s_buffer_load_dwordx4", smem<4>(4));
  t.add("s_buffer_load_dwordx8", smem<8>(4));
  t.add("s_buffer_load_dwordx16", smem<16>(4));
}

}  // namespace emu
