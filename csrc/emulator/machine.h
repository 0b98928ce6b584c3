// SPDX-License-Identifier: Apache-2.0
// The wave64 machine: registers, decoded instructions, memory regions, counters.
// Source: AMD Instinct MI300 (CDNA3) and MI350 (CDNA4) instruction set architecture reference guides.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emu {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;

constexpr int kLanes = 64;
constexpr int kVcc = 106, kM0 = 124, kExec = 126;  // scalar register numbers, as encoded on gfx9
constexpr int kFirstAgpr = 256;                    // v[0:255] then a[0:255] in one file
constexpr u64 kSharedAperture = u64(1) << 62, kPrivateAperture = u64(1) << 61;  // addresses of generic LDS and scratch

enum class Arch { gfx942, gfx950 };

struct alignas(64) Row {
  u32 lane[kLanes];
  u32& operator[](int i) { return lane[i]; }
  u32 operator[](int i) const { return lane[i]; }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---------------------------------------------------------------------------------------------- decoded program

enum class Kind : u8 { Vector, Scalar, Literal, Off };

struct Operand {
  Kind kind = Kind::Off;
  u8 count = 1;          // dwords
  bool neg = false, abs = false, sext = false;
  bool special = false;  // needs the slow path of operand fetch: any of the above, SDWA, DPP or op_sel
  u8 select = 6;         // SDWA: 0-3 byte, 4-5 word, 6 dword
  u16 reg = 0;
  bool real = false;     // a literal written as a real number
  u64 bits64 = 0;        // the literal as a 64, 32 and 16 bit operand would see it
  u32 bits32 = 0;
  u16 bits16 = 0;
  const Row* broadcast = nullptr;
};

struct Dpp {
  i8 source[kLanes];     // lane read, -1: outside the row or the wave
  u64 write = ~u64(0);   // lanes enabled by row_mask and bank_mask
  bool bound_zero = false;
};

enum class Class : u8 { Valu, Mfma, Salu, Smem, Vmem, Lds, Control, Count };

enum Accept : u32 {      // modifiers a handler knows about; any other one is an error at decode
  kClamp = 1, kOmod = 2, kDpp = 4, kSdwa = 8, kOpSel = 16, kPacked = 32, kNegAbs = 64, kOffset = 128,
  kTwoOffsets = 256, kCache = 512, kBuffer = 1024, kLdsDma = 2048, kMatrix = 4096,
  kMixed = 8192,            // the modifiers of kPacked, but an omitted op_sel_hi means zeros, not ones
};

struct Wave;
struct Instruction;
using Handler = void (*)(Wave&, const Instruction&);

struct Instruction {
  Handler run = nullptr;
  std::vector<Operand> op;
  i64 offset = 0;
  u32 offset0 = 0, offset1 = 0;
  bool offen = false, lds = false, sc0 = false, clamp = false;
  bool plain_result = true;                  // no clamp, output modifier, SDWA destination or DPP mask
  f32 omod = 1;
  u8 op_sel = 0, op_sel_hi = 0, neg_lo = 0, neg_hi = 0, cbsz = 0, abid = 0, blgp = 0;
  int first_source = 1;
  u8 dst_sel = 6, dst_unused = 0;            // dst_unused: 0 pad, 1 sign-extend, 2 preserve
  const Dpp* dpp = nullptr;
  int target = -1;                           // branch target, an index
  u32 index = 0;
  Class cls = Class::Valu;
  u64 flops = 0;                             // of one wave instruction (MFMA)
  u32 cycles = 0;                            // matrix-core cycles of one wave instruction (MFMA)
  bool atomic_return = false;                // result depends on the order of waves
  std::string mnemonic, text;
};

struct Entry {
  Handler run = nullptr;
  Class cls = Class::Valu;
  u32 accepts = 0;
  std::vector<i8> widths;                    // dwords of each operand, 0: any
  int first_source = 1;                      // position of source 0 (DPP and SDWA apply from there)
  u64 flops = 0;
  u32 cycles = 0;
};

// ------------------------------------------------------------------------------------------------------- memory

struct Region {
  u64 base = 0, size = 0;
  std::string name;
  bool writable = true;
  std::unique_ptr<std::atomic<u8>[]> lines;  // per 128 bytes: bit 0 read, bit 1 written
  u8* written = nullptr;                     // per byte, only for watched tensors
};

struct Counters {
  std::vector<u64> executed;                 // per instruction of the program
  u64 bytes_read = 0, bytes_written = 0, wide_bytes = 0, lds_bytes = 0, lds_conflicts = 0;
};

struct Checks {
  bool races = false, count_lines = true, bank_conflicts = false;
};

struct Group;

/// One wavefront. v holds VGPRs then AGPRs, s the 128 scalar registers.
struct Wave {
  std::array<Row, 512> v;
  Row mask;                                  // EXEC, one dword of ones or zeros per lane
  std::array<u32, 128> s;
  u64 exec() const { return s[kExec] | u64(s[kExec + 1]) << 32; }
  bool scc = false, full = true;             // full: all lanes are on
  bool running = true, done = false, at_barrier = false;
  u32 mode = 0;
  int pc = 0;
  int id = 0;
  Group* group = nullptr;
  std::vector<u8> scratch;                   // lane-major
  u32 scratch_size = 0;                      // bytes per lane
  u64 steps = 0;

  void refresh_mask() {
    const u64 e = exec();
    full = e == ~u64(0);
    for (int i = 0; i < kLanes; ++i) mask[i] = (e >> i & 1) ? ~0u : 0u;
  }
  void write_scalar(int reg, u32 value) {
    s[reg] = value;
    if (reg >= kExec) refresh_mask();
  }
  void write_scalar64(int reg, u64 value) {
    s[reg] = u32(value);
    s[reg + 1] = u32(value >> 32);
    if (reg >= kExec) refresh_mask();
  }
};

struct LdsShadow {                           // of one LDS dword, valid while epoch is the current one
  u32 epoch = 0;
  i8 writer = -1;                            // wave, or -1
  u8 written = 0, read = 0;                  // byte masks
  bool atomic = false;
  u16 readers = 0;                           // waves
};

struct Launch;

struct Group {
  Launch* launch = nullptr;
  Counters* counters = nullptr;
  std::vector<Region*>* hints = nullptr;     // per instruction: the region it hit last
  std::vector<u8> lds;
  std::vector<LdsShadow> shadow;
  u32 epoch = 1;
  u32 index[3] = {0, 0, 0};
  std::vector<std::unique_ptr<Wave>> waves;
};

struct Program {
  Arch arch = Arch::gfx942;
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::unique_ptr<Row>> constants;
  std::vector<std::unique_ptr<Dpp>> dpps;
  bool ordered = false;                      // has atomics that return: threads would make results depend on luck
};

struct Launch {
  const Program* program = nullptr;
  std::vector<Region> regions;               // sorted by base, disjoint
  Checks checks;
  u32 grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  u32 lds_size = 0, scratch_size = 0, num_vgprs = 512, accum_offset = 256, mode = 0;
  std::vector<u32> user_sgprs;
  int group_id_sgpr[3] = {-1, -1, -1};
  u32 poison = 0x7fc5a5a5;
  u64 step_limit = ~u64(0);
  int resident = 8;
  int trace_group = -1, trace_wave = -1, break_at = -1;
  std::vector<std::string>* trace = nullptr;
};

[[noreturn]] void fail(const Wave& w, const Instruction& in, const std::string& what);

/// Checks that [address, address + size) lies in one registered tensor, marks its cache lines, returns the region.
Region& check_access(Wave& w, const Instruction& in, u64 address, u32 size, bool write, int lane);

// --------------------------------------------------------------------------------------------- operand and result

template <class T> T literal(const Operand& o) {
  if constexpr (sizeof(T) == 8) return std::bit_cast<T>(o.bits64);
  else if constexpr (sizeof(T) == 4) return std::bit_cast<T>(o.bits32);
  else return std::bit_cast<T>(o.bits16);
}

template <class T> T scalar(const Wave& w, const Operand& o) {
  if (o.kind == Kind::Literal) return literal<T>(o);
  if constexpr (sizeof(T) == 8) return std::bit_cast<T>(w.s[o.reg] | u64(w.s[o.reg + 1]) << 32);
  else if constexpr (sizeof(T) == 4) return std::bit_cast<T>(w.s[o.reg]);
  else return std::bit_cast<T>(u16(w.s[o.reg]));
}

/// Raw bits of one dword of an operand with DPP, SDWA selection or op_sel applied (signs are left to the caller).
void fetch_special(Wave& w, const Instruction& in, const Operand& o, int dword, bool high_half, Row& out);

template <class T> constexpr bool is_float = std::is_same_v<T, f16> || std::is_same_v<T, f32> || std::is_same_v<T, f64>;

template <class T> T apply_sign(T x, const Operand& o) {
  if constexpr (is_float<T>) {
    using Bits = std::conditional_t<sizeof(T) == 8, u64, std::conditional_t<sizeof(T) == 4, u32, u16>>;
    constexpr Bits sign = Bits(Bits(1) << (8 * sizeof(T) - 1));
    Bits b = std::bit_cast<Bits>(x);
    if (o.abs) b &= Bits(~sign);
    if (o.neg) b ^= sign;
    return std::bit_cast<T>(b);
  } else {
    return x;
  }
}

/// Values of source operand i in all lanes. Points into the register file where it can, else into buf.
template <class T> const T* fetch(Wave& w, const Instruction& in, int i, T* buf) {
  const Operand& o = in.op[i];
  if constexpr (sizeof(T) == 4) {
    if (!o.special) {
      if (o.kind == Kind::Vector) return reinterpret_cast<const T*>(w.v[o.reg].lane);
      if (o.kind == Kind::Literal) return reinterpret_cast<const T*>(o.broadcast->lane);
      const T x = std::bit_cast<T>(w.s[o.reg]);
      for (int l = 0; l < kLanes; ++l) buf[l] = x;
      return buf;
    }
    Row row;
    fetch_special(w, in, o, 0, false, row);
    for (int l = 0; l < kLanes; ++l) buf[l] = apply_sign(std::bit_cast<T>(row[l]), o);
  } else if constexpr (sizeof(T) == 8) {
    if (o.kind == Kind::Vector && !o.special) {
      const Row &lo = w.v[o.reg], &hi = w.v[o.reg + 1];
      for (int l = 0; l < kLanes; ++l) buf[l] = std::bit_cast<T>(lo[l] | u64(hi[l]) << 32);
    } else if (o.kind == Kind::Vector) {
      Row lo, hi;
      fetch_special(w, in, o, 0, false, lo);
      fetch_special(w, in, o, 1, false, hi);
      for (int l = 0; l < kLanes; ++l) buf[l] = apply_sign(std::bit_cast<T>(lo[l] | u64(hi[l]) << 32), o);
    } else {
      const T x = apply_sign(scalar<T>(w, o), o);
      for (int l = 0; l < kLanes; ++l) buf[l] = x;
    }
  } else {
    static_assert(sizeof(T) == 2);
    if (o.special && o.kind != Kind::Literal) {
      Row row;
      fetch_special(w, in, o, 0, in.op_sel >> (i - 1) & 1, row);
      for (int l = 0; l < kLanes; ++l) buf[l] = apply_sign(std::bit_cast<T>(u16(row[l])), o);
    } else if (o.kind == Kind::Vector) {
      const Row& row = w.v[o.reg];
      for (int l = 0; l < kLanes; ++l) buf[l] = std::bit_cast<T>(u16(row[l]));
    } else {
      const T x = apply_sign(scalar<T>(w, o), o);
      for (int l = 0; l < kLanes; ++l) buf[l] = x;
    }
  }
  return buf;
}

inline void store_masked(Wave& w, int reg, const u32* __restrict out) {
  u32* __restrict dst = w.v[reg].lane;
  if (w.full) {
    for (int l = 0; l < kLanes; ++l) dst[l] = out[l];
  } else {
    const u32* __restrict mask = w.mask.lane;
    for (int l = 0; l < kLanes; ++l) dst[l] = (out[l] & mask[l]) | (dst[l] & ~mask[l]);
  }
}

void commit_special(Wave& w, const Instruction& in, const Operand& dst, const u32* out);

template <class T> T clamp_unit(T x) { return x > T(1) ? T(1) : x > T(0) ? x : T(0); }  // NaN -> 0 (DX10 clamp)

/// Writes a result row to operand 0 under EXEC, with clamp, output modifier, SDWA destination and DPP masks.
/// 16-bit results clear the upper half, as gfx9 does, unless keep_high or a destination op_sel says otherwise.
template <class T, bool keep_high = false> void commit(Wave& w, const Instruction& in, T* out) {
  const Operand& dst = in.op[0];
  if (!in.plain_result && is_float<T>) {
    for (int l = 0; l < kLanes; ++l) {
      if (in.omod != 1) out[l] = T(out[l] * T(in.omod));
      if (in.clamp) out[l] = clamp_unit(out[l]);
    }
  }
  if constexpr (sizeof(T) == 8) {
    Row lo, hi;
    for (int l = 0; l < kLanes; ++l) {
      const u64 x = std::bit_cast<u64>(out[l]);
      lo[l] = u32(x), hi[l] = u32(x >> 32);
    }
    store_masked(w, dst.reg, lo.lane);
    store_masked(w, dst.reg + 1, hi.lane);
  } else if constexpr (sizeof(T) == 4) {
    if (in.plain_result) store_masked(w, dst.reg, reinterpret_cast<const u32*>(out));
    else commit_special(w, in, dst, reinterpret_cast<const u32*>(out));
  } else {
    Row row;
    const Row& old = w.v[dst.reg];
    const bool high = keep_high && (in.op_sel >> (in.op.size() - 1) & 1);
    for (int l = 0; l < kLanes; ++l) {
      const u32 x = std::bit_cast<u16>(out[l]);
      row[l] = high ? (old[l] & 0xffff) | x << 16 : keep_high ? (old[l] & 0xffff0000) | x : x;
    }
    if (in.plain_result) store_masked(w, dst.reg, row.lane);
    else commit_special(w, in, dst, row.lane);
  }
}

// ------------------------------------------------------------------------------------ one typed line per mnemonic

template <class T> constexpr i8 dwords = sizeof(T) == 8 ? 2 : 1;

template <class Signature, class F, bool keep_high = false> struct Lanewise;  // F: a captureless lambda's type

template <class D, class A, class F, bool keep> struct Lanewise<D(A), F, keep> {
  static void run(Wave& w, const Instruction& in) {
    alignas(64) A a_buf[kLanes];
    alignas(64) D out[kLanes];
    const A* __restrict a = fetch<A>(w, in, 1, a_buf);
    for (int l = 0; l < kLanes; ++l) out[l] = D(F()(a[l]));
    commit<D, keep>(w, in, out);
  }
  static std::vector<i8> widths() { return {dwords<D>, dwords<A>}; }
};

template <class D, class A, class B, class F, bool keep> struct Lanewise<D(A, B), F, keep> {
  static void run(Wave& w, const Instruction& in) {
    alignas(64) A a_buf[kLanes];
    alignas(64) B b_buf[kLanes];
    alignas(64) D out[kLanes];
    const A* __restrict a = fetch<A>(w, in, 1, a_buf);
    const B* __restrict b = fetch<B>(w, in, 2, b_buf);
    for (int l = 0; l < kLanes; ++l) out[l] = D(F()(a[l], b[l]));
    commit<D, keep>(w, in, out);
  }
  static std::vector<i8> widths() { return {dwords<D>, dwords<A>, dwords<B>}; }
};

template <class D, class A, class B, class C, class F, bool keep> struct Lanewise<D(A, B, C), F, keep> {
  static void run(Wave& w, const Instruction& in) {
    alignas(64) A a_buf[kLanes];
    alignas(64) B b_buf[kLanes];
    alignas(64) C c_buf[kLanes];
    alignas(64) D out[kLanes];
    const A* __restrict a = fetch<A>(w, in, 1, a_buf);
    const B* __restrict b = fetch<B>(w, in, 2, b_buf);
    const C* __restrict c = fetch<C>(w, in, 3, c_buf);
    for (int l = 0; l < kLanes; ++l) out[l] = D(F()(a[l], b[l], c[l]));
    commit<D, keep>(w, in, out);
  }
  static std::vector<i8> widths() { return {dwords<D>, dwords<A>, dwords<B>, dwords<C>}; }
};

/// Old value of the destination as a third source (fmac, dot2c and the like).
template <class D> const D* old_value(Wave& w, const Instruction& in, D* buf) {
  const Row& row = w.v[in.op[0].reg];
  if constexpr (sizeof(D) == 4) return reinterpret_cast<const D*>(row.lane);
  else if constexpr (sizeof(D) == 8) {
    const Row& hi = w.v[in.op[0].reg + 1];
    for (int l = 0; l < kLanes; ++l) buf[l] = std::bit_cast<D>(row[l] | u64(hi[l]) << 32);
  } else {
    for (int l = 0; l < kLanes; ++l) buf[l] = std::bit_cast<D>(u16(row[l]));
  }
  return buf;
}

/// D = F(A, B, D).
template <class D, class A, class B, class F> struct Accumulate {
  static void run(Wave& w, const Instruction& in) {
    alignas(64) A a_buf[kLanes];
    alignas(64) B b_buf[kLanes];
    alignas(64) D d_buf[kLanes];
    alignas(64) D out[kLanes];
    const A* __restrict a = fetch<A>(w, in, 1, a_buf);
    const B* __restrict b = fetch<B>(w, in, 2, b_buf);
    const D* __restrict d = old_value<D>(w, in, d_buf);
    for (int l = 0; l < kLanes; ++l) out[l] = D(F()(a[l], b[l], d[l]));
    commit<D>(w, in, out);
  }
};

// ------------------------------------------------------------------------------------------------ opcode families

struct Table {
  std::vector<std::pair<std::string, Entry>> entries;
  void add(std::string name, Entry e) { entries.emplace_back(std::move(name), std::move(e)); }
};

void add_scalar(Table& t);
void add_vector(Table& t);
void add_integer(Table& t);
void add_compare(Table& t);
void add_convert(Table& t, Arch arch);
void add_lane(Table& t);
void add_lds(Table& t);
void add_global(Table& t);
void add_matrix(Table& t, Arch arch);

void run_launch(Launch& launch, int num_threads, Counters& total);

}  // namespace emu
