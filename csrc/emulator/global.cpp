// SPDX-License-Identifier: Apache-2.0
// Vector memory: global, flat, buffer and scratch loads, stores and atomics; loads that go straight to LDS.
#include <algorithm>

#include "formats.h"
#include "lds.h"

namespace emu {
namespace {

/// Host address of each lane's access.
struct Lanes {
  u64 address[kLanes];
  u64 active = 0;        // lanes that access memory
  u64 checked = 0;       // lanes whose address must lie in a registered tensor (the others are LDS or scratch)
  u64 read_zero = 0;     // buffer loads outside num_records: read 0; such stores are dropped
};

template <class F> void each(u64 mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

enum class Space { Global, Flat, Buffer, Scratch };

void mark(Region& r, u64 address, u32 size, bool write) {
  const u64 first = (address - r.base) >> 7, last = (address - r.base + size - 1) >> 7;
  const u8 bit = write ? 2 : 1;
  for (u64 line = first; line <= last; ++line)
    if (!(r.lines[line].load(std::memory_order_relaxed) & bit)) r.lines[line].fetch_or(bit, std::memory_order_relaxed);
  if (write && r.written) std::memset(r.written + (address - r.base), 1, size);
}

/// Bounds, permission and bookkeeping for all lanes at once; falls back to one lane at a time when they span tensors.
void check(Wave& w, const Instruction& in, const Lanes& lanes, u32 size, bool write) {
  if (!lanes.checked) return;
  u64 lo = ~u64(0), hi = 0;
  each(lanes.checked, [&](int l) {
    lo = std::min(lo, lanes.address[l]);
    hi = std::max(hi, lanes.address[l]);
  });
  Region* hint = (*w.group->hints)[in.index];
  const int first = std::countr_zero(lanes.checked);
  if (!hint || lo < hint->base || hi + size > hint->base + hint->size || (write && !hint->writable))
    hint = (*w.group->hints)[in.index] = &check_access(w, in, lanes.address[first], size, write, first);
  const bool together = lo >= hint->base && hi + size <= hint->base + hint->size;
  const bool book = w.group->launch->checks.count_lines || hint->written;
  u64 last_line = ~u64(0);
  each(lanes.checked, [&](int l) {
    const u64 a = lanes.address[l];
    if (!together) {
      check_access(w, in, a, size, write, l);
    } else if (book) {
      const u64 line = a >> 7;  // consecutive lanes mostly share a line
      if (line != last_line || hint->written || (a + size - 1) >> 7 != line) mark(*hint, a, size, write);
      last_line = line;
    }
  });
  const u64 bytes = u64(std::popcount(lanes.checked)) * size;
  Counters& c = *w.group->counters;
  (write ? c.bytes_written : c.bytes_read) += bytes;
  if (size == 16) c.wide_bytes += bytes;
}

u64 scalar_pair(const Wave& w, int reg) { return w.s[reg] | u64(w.s[reg + 1]) << 32; }

u8* scratch_at(Wave& w, const Instruction& in, int lane, u64 offset, u32 size) {
  if (offset + size > w.scratch_size)
    fail(w, in, "scratch overrun: offset " + std::to_string(offset) + " + " + std::to_string(size) + " bytes, " + std::to_string(w.scratch_size) + " per lane");
  return w.scratch.data() + u64(lane) * w.scratch_size + offset;
}

void global_lanes(Wave& w, const Instruction& in, int vaddr, int saddr, Lanes& out) {
  const Operand &v = in.op[vaddr], &s = in.op[saddr];
  const bool pair = s.kind == Kind::Off;
  if (v.count != (pair ? 2 : 1)) fail(w, in, "address operand of unexpected width");
  const u64 base = (pair ? 0 : scalar_pair(w, s.reg)) + u64(in.offset);
  for (int l = 0; l < kLanes; ++l)
    out.address[l] = base + w.v[v.reg][l] + (pair ? u64(w.v[v.reg + 1][l]) << 32 : 0);
  out.active = out.checked = w.exec();
}

void flat_lanes(Wave& w, const Instruction& in, int vaddr, u32 size, Lanes& out) {
  const int reg = in.op[vaddr].reg;
  out.active = w.exec();
  each(w.exec(), [&](int l) {
    const u64 a = (w.v[reg][l] | u64(w.v[reg + 1][l]) << 32) + u64(in.offset);
    if (a >> 32 == kSharedAperture >> 32) {
      touch_lds(w, in, u32(a), size, nullptr, Touch::Read);
      out.address[l] = reinterpret_cast<u64>(&w.group->lds[u32(a)]);
    } else if (a >> 32 == kPrivateAperture >> 32) {
      out.address[l] = reinterpret_cast<u64>(scratch_at(w, in, l, u32(a), size));
    } else {
      out.address[l] = a;
      out.checked |= u64(1) << l;
    }
  });
}

void scratch_lanes(Wave& w, const Instruction& in, int vaddr, int saddr, u32 size, Lanes& out) {
  const Operand &v = in.op[vaddr], &s = in.op[saddr];
  const u64 base = u64(in.offset) + (s.kind == Kind::Scalar ? w.s[s.reg] : 0);
  out.active = w.exec();
  each(w.exec(), [&](int l) {
    const u64 offset = base + (v.kind == Kind::Vector ? w.v[v.reg][l] : 0);
    out.address[l] = reinterpret_cast<u64>(scratch_at(w, in, l, u32(offset), size));
  });
}

/// Raw buffers only: base + vector offset + scalar offset + immediate, checked against num_records.
void buffer_lanes(Wave& w, const Instruction& in, int vaddr, u32 size, Lanes& out) {
  const Operand &v = in.op[vaddr], &resource = in.op[vaddr + 1], &soffset = in.op[vaddr + 2];
  const u32 word1 = w.s[resource.reg + 1], records = w.s[resource.reg + 2];
  if (word1 >> 16) fail(w, in, "buffer descriptor with a stride or swizzle (only raw buffers are modelled)");
  const u64 base = w.s[resource.reg] | u64(word1 & 0xffff) << 32;
  const u64 scalar_offset = soffset.kind == Kind::Literal ? soffset.bits32 : w.s[soffset.reg];
  const u64 fixed = scalar_offset + u64(in.offset);
  each(w.exec(), [&](int l) {
    const u64 offset = fixed + (in.offen ? w.v[v.reg][l] : 0);
    out.address[l] = base + offset;
    if (offset + size <= records) out.active |= u64(1) << l;
    else if (offset < records) fail(w, in, "buffer access straddles num_records");
    else out.read_zero |= u64(1) << l;
  });
  out.checked = out.active;
}

/// Addresses for an instruction whose address operands start at position first (buffer: address, descriptor, offset).
template <Space space> Lanes resolve(Wave& w, const Instruction& in, int vaddr, int saddr, u32 size, bool write) {
  Lanes lanes;
  if constexpr (space == Space::Global) global_lanes(w, in, vaddr, saddr, lanes);
  if constexpr (space == Space::Flat) flat_lanes(w, in, vaddr, size, lanes);
  if constexpr (space == Space::Buffer) buffer_lanes(w, in, vaddr, size, lanes);
  if constexpr (space == Space::Scratch) scratch_lanes(w, in, vaddr, saddr, size, lanes);
  check(w, in, lanes, size, write);
  return lanes;
}

// Positions of the address operands: a load is (result, address, saddr), a store (address, data, saddr), but a buffer
// instruction always names its data first.
template <Space space> constexpr int kStoreAddress = space == Space::Buffer ? 1 : 0;
template <Space space> constexpr int kStoreData = space == Space::Buffer ? 0 : 1;

template <Space space, u32 size> void load(Wave& w, const Instruction& in) {
  const Lanes lanes = resolve<space>(w, in, 1, 2, size, false);
  const int reg = in.op[0].reg;
  each(lanes.active, [&](int l) {
    u32 data[size / 4];
    std::memcpy(data, reinterpret_cast<const void*>(lanes.address[l]), size);
    for (u32 i = 0; i < size / 4; ++i) w.v[reg + i][l] = data[i];
  });
  each(lanes.read_zero, [&](int l) { for (u32 i = 0; i < size / 4; ++i) w.v[reg + i][l] = 0; });
}
template <Space space, u32 size> void store(Wave& w, const Instruction& in) {
  const Lanes lanes = resolve<space>(w, in, kStoreAddress<space>, 2, size, true);
  const int reg = in.op[kStoreData<space>].reg;
  each(lanes.active, [&](int l) {
    u32 data[size / 4];
    for (u32 i = 0; i < size / 4; ++i) data[i] = w.v[reg + i][l];
    std::memcpy(reinterpret_cast<void*>(lanes.address[l]), data, size);
  });
}

enum class Part { Whole, Low, High };

template <Space space, class T, Part part> void load_small(Wave& w, const Instruction& in) {
  const Lanes lanes = resolve<space>(w, in, 1, 2, sizeof(T), false);
  Row& dst = w.v[in.op[0].reg];
  const auto put = [&](int l, u32 x) {
    dst[l] = part == Part::Whole ? x : part == Part::Low ? (dst[l] & 0xffff0000) | (x & 0xffff) : (dst[l] & 0xffff) | x << 16;
  };
  each(lanes.active, [&](int l) {
    T x;
    std::memcpy(&x, reinterpret_cast<const void*>(lanes.address[l]), sizeof x);
    put(l, u32(i32(x)));
  });
  each(lanes.read_zero, [&](int l) { put(l, 0); });
}
template <Space space, class T, Part part> void store_small(Wave& w, const Instruction& in) {
  const Lanes lanes = resolve<space>(w, in, kStoreAddress<space>, 2, sizeof(T), true);
  const Row& src = w.v[in.op[kStoreData<space>].reg];
  each(lanes.active, [&](int l) {
    const T x = T(part == Part::High ? src[l] >> 16 : src[l]);
    std::memcpy(reinterpret_cast<void*>(lanes.address[l]), &x, sizeof x);
  });
}

/// Straight to LDS: lane l lands at M0 + l * stride; the stride is 4 bytes up to dwords and 16 bytes above.
template <Space space, u32 size> void load_lds(Wave& w, const Instruction& in) {
  const Lanes lanes = resolve<space>(w, in, 0, 1, size, false);
  const u32 base = w.s[kM0] + u32(in.offset), stride = size <= 4 ? 4 : 16;
  each(lanes.active | lanes.read_zero, [&](int l) {
    u8 data[16] = {};
    if (lanes.active >> l & 1) std::memcpy(data, reinterpret_cast<const void*>(lanes.address[l]), size);
    const u32 at = base + u32(l) * stride, n = std::max(size, 4u);  // bytes and shorts arrive zero-extended
    touch_lds(w, in, at, n, data, Touch::Write);
    std::memcpy(&w.group->lds[at], data, n);
    w.group->counters->lds_bytes += n;
  });
}

/// A buffer load either fills registers or, with the lds modifier, LDS.
template <u32 size> void buffer_load(Wave& w, const Instruction& in) {
  if (in.lds) load_lds<Space::Buffer, size>(w, in);
  else load<Space::Buffer, size>(w, in);
}

// ------------------------------------------------------------------------------------------------------- atomics

template <class T> T data_of(const Wave& w, int reg, int l) {
  if constexpr (sizeof(T) == 8) return std::bit_cast<T>(w.v[reg][l] | u64(w.v[reg + 1][l]) << 32);
  else return std::bit_cast<T>(w.v[reg][l]);
}

/// new = F(old, data, compare) by compare-and-swap on the host; lanes in order. sc0 asks for the old value.
template <Space space, class T, bool pair, class F> void atomic(Wave& w, const Instruction& in) {
  using Bits = std::conditional_t<sizeof(T) == 8, u64, u32>;
  const int shift = space != Space::Buffer && in.sc0 ? 1 : 0;
  const int vaddr = space == Space::Buffer ? 1 : shift, data_op = space == Space::Buffer ? 0 : shift + 1;
  const Lanes lanes = resolve<space>(w, in, vaddr, shift + 2, sizeof(T), true);
  const int reg = in.op[data_op].reg;
  each(lanes.active, [&](int l) {
    auto* p = reinterpret_cast<Bits*>(lanes.address[l]);
    if (lanes.address[l] % sizeof(T)) fail(w, in, "misaligned atomic");
    const T data = data_of<T>(w, reg, l), compare = pair ? data_of<T>(w, reg + int(sizeof(T) / 4), l) : T();
    Bits old = __atomic_load_n(p, __ATOMIC_ACQUIRE), fresh;
    do fresh = std::bit_cast<Bits>(T(F()(std::bit_cast<T>(old), data, compare)));
    while (!__atomic_compare_exchange_n(p, &old, fresh, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    if (in.sc0) {
      w.v[in.op[0].reg][l] = u32(old);
      if constexpr (sizeof(T) == 8) w.v[in.op[0].reg + 1][l] = u32(old >> 32);
    }
  });
}

template <class T, bool pair = false, class F> void add_atomic(F, Table& t, const std::string& name) {
  const i8 n = (pair ? 2 : 1) * i8(sizeof(T) / 4);
  (void)n;
  t.add("global_atomic_" + name, {atomic<Space::Global, T, pair, F>, Class::Vmem, kOffset | kCache, {}, -1});
  t.add("flat_atomic_" + name, {atomic<Space::Flat, T, pair, F>, Class::Vmem, kOffset | kCache, {}, -1});
  t.add("buffer_atomic_" + name, {atomic<Space::Buffer, T, pair, F>, Class::Vmem, kOffset | kCache | kBuffer, {n, 0, 4, 0}});
}

template <class U, class I> void add_int_atomics(Table& t, const std::string& suffix) {
  add_atomic<U>([](U o, U d, U) { return U(o + d); }, t, "add" + suffix);
  add_atomic<U>([](U o, U d, U) { return U(o - d); }, t, "sub" + suffix);
  add_atomic<U>([](U, U d, U) { return d; }, t, "swap" + suffix);
  add_atomic<U>([](U o, U d, U) { return std::min(o, d); }, t, "umin" + suffix);
  add_atomic<U>([](U o, U d, U) { return std::max(o, d); }, t, "umax" + suffix);
  add_atomic<I>([](I o, I d, I) { return std::min(o, d); }, t, "smin" + suffix);
  add_atomic<I>([](I o, I d, I) { return std::max(o, d); }, t, "smax" + suffix);
  add_atomic<U>([](U o, U d, U) { return o & d; }, t, "and" + suffix);
  add_atomic<U>([](U o, U d, U) { return o | d; }, t, "or" + suffix);
  add_atomic<U>([](U o, U d, U) { return o ^ d; }, t, "xor" + suffix);
  add_atomic<U>([](U o, U d, U) { return o >= d ? U(0) : U(o + 1); }, t, "inc" + suffix);
  add_atomic<U>([](U o, U d, U) { return o == 0 || o > d ? d : U(o - 1); }, t, "dec" + suffix);
  add_atomic<U, true>([](U o, U d, U c) { return o == c ? d : o; }, t, "cmpswap" + suffix);
}

u32 add_pairs_f16(u32 a, u32 b) {
  const auto half = [](u32 x, int s) { return std::bit_cast<f16>(u16(x >> s)); };
  const auto sum = [&](int s) { return u32(std::bit_cast<u16>(f16(half(a, s) + half(b, s)))) << s; };
  return sum(0) | sum(16);
}
u32 add_pairs_bf16(u32 a, u32 b) {
  return to_bf16(from_bf16(a & 0xffff) + from_bf16(b & 0xffff)) | u32(to_bf16(from_bf16(a >> 16) + from_bf16(b >> 16))) << 16;
}

// ------------------------------------------------------------------------------------------------- opcode tables

template <Space space> void add_loads(Table& t, const std::string& p, std::vector<i8> address, u32 accepts) {
  const auto loads = [&](i8 n) { std::vector<i8> v = address; v.insert(v.begin(), n); return v; };
  const auto stores = [&](i8 n) { std::vector<i8> v = address; v.insert(v.begin() + (space == Space::Buffer ? 0 : 1), n); return v; };
  const auto wide = [&](const char* name, Handler run, i8 n, u32 more) { t.add(p + name, {run, Class::Vmem, accepts | more, more ? std::vector<i8>{} : loads(n), more ? -1 : 1}); };
  const u32 dma = space == Space::Buffer ? u32(kLdsDma) : 0u;
  if constexpr (space == Space::Buffer) {
    wide("load_dword", buffer_load<4>, 1, dma);
    wide("load_dwordx2", load<space, 8>, 2, 0);
    wide("load_dwordx3", buffer_load<12>, 3, dma);
    wide("load_dwordx4", buffer_load<16>, 4, dma);
  } else {
    wide("load_dword", load<space, 4>, 1, 0);
    wide("load_dwordx2", load<space, 8>, 2, 0);
    wide("load_dwordx3", load<space, 12>, 3, 0);
    wide("load_dwordx4", load<space, 16>, 4, 0);
  }
  const auto small = [&](const std::string& name, Handler run) { t.add(p + "load_" + name, {run, Class::Vmem, accepts, loads(1)}); };
  small("ubyte", load_small<space, u8, Part::Whole>);
  small("sbyte", load_small<space, i8, Part::Whole>);
  small("ushort", load_small<space, u16, Part::Whole>);
  small("sshort", load_small<space, i16, Part::Whole>);
  small("ubyte_d16", load_small<space, u8, Part::Low>);
  small("ubyte_d16_hi", load_small<space, u8, Part::High>);
  small("sbyte_d16", load_small<space, i8, Part::Low>);
  small("sbyte_d16_hi", load_small<space, i8, Part::High>);
  small("short_d16", load_small<space, u16, Part::Low>);
  small("short_d16_hi", load_small<space, u16, Part::High>);
  t.add(p + "store_dword", {store<space, 4>, Class::Vmem, accepts, stores(1)});
  t.add(p + "store_dwordx2", {store<space, 8>, Class::Vmem, accepts, stores(2)});
  t.add(p + "store_dwordx3", {store<space, 12>, Class::Vmem, accepts, stores(3)});
  t.add(p + "store_dwordx4", {store<space, 16>, Class::Vmem, accepts, stores(4)});
  t.add(p + "store_byte", {store_small<space, u8, Part::Whole>, Class::Vmem, accepts, stores(1)});
  t.add(p + "store_short", {store_small<space, u16, Part::Whole>, Class::Vmem, accepts, stores(1)});
  t.add(p + "store_byte_d16_hi", {store_small<space, u8, Part::High>, Class::Vmem, accepts, stores(1)});
  t.add(p + "store_short_d16_hi", {store_small<space, u16, Part::High>, Class::Vmem, accepts, stores(1)});
}

}  // namespace

void add_global(Table& t) {
  add_loads<Space::Global>(t, "global_", {0, 0}, kOffset | kCache);
  add_loads<Space::Flat>(t, "flat_", {2}, kOffset | kCache);
  add_loads<Space::Scratch>(t, "scratch_", {0, 0}, kOffset | kCache);
  add_loads<Space::Buffer>(t, "buffer_", {0, 4, 0}, kOffset | kCache | kBuffer);
  t.add("global_load_lds_ubyte", {load_lds<Space::Global, 1>, Class::Vmem, kOffset | kCache, {0, 0}});
  t.add("global_load_lds_ushort", {load_lds<Space::Global, 2>, Class::Vmem, kOffset | kCache, {0, 0}});
  t.add("global_load_lds_dword", {load_lds<Space::Global, 4>, Class::Vmem, kOffset | kCache, {0, 0}});
  t.add("global_load_lds_dwordx3", {load_lds<Space::Global, 12>, Class::Vmem, kOffset | kCache, {0, 0}});
  t.add("global_load_lds_dwordx4", {load_lds<Space::Global, 16>, Class::Vmem, kOffset | kCache, {0, 0}});
  for (const char* name : {"buffer_wbl2", "buffer_inv", "buffer_wbinvl1", "buffer_wbinvl1_vol", "buffer_gl0_inv"})
    t.add(name, {[](Wave&, const Instruction&) {}, Class::Control, kCache, {}});
  add_int_atomics<u32, i32>(t, "");
  add_int_atomics<u64, i64>(t, "_x2");
  add_atomic<f32>([](f32 o, f32 d, f32) { return o + d; }, t, "add_f32");
  add_atomic<f64>([](f64 o, f64 d, f64) { return o + d; }, t, "add_f64");
  add_atomic<f64>([](f64 o, f64 d, f64) { return std::fmin(o, d); }, t, "min_f64");
  add_atomic<f64>([](f64 o, f64 d, f64) { return std::fmax(o, d); }, t, "max_f64");
  add_atomic<u32>([](u32 o, u32 d, u32) { return add_pairs_f16(o, d); }, t, "pk_add_f16");
  add_atomic<u32>([](u32 o, u32 d, u32) { return add_pairs_bf16(o, d); }, t, "pk_add_bf16");
}

}  // namespace emu
