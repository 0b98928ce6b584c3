// SPDX-License-Identifier: Apache-2.0
// Local data share: reads, writes, atomics, transposing reads, lane permutes; race detection between barriers.
#include <algorithm>

#include "lds.h"

namespace emu {

namespace {

std::string hex(u64 x) {
  char buf[24];
  std::snprintf(buf, sizeof buf, "0x%llx", static_cast<unsigned long long>(x));
  return buf;
}

/// Two accesses of one dword race if one writes, they come from different waves, and no barrier lies between them. Writing the
/// value that is already there is tolerated. mask: bytes of the dword; data: what a Write is about to store in the first of them.
void check_dword(Wave& w, const Instruction& in, LdsShadow& s, u32 byte, u32 n, u8 mask, const u8* data, Touch touch) {
  Group& g = *w.group;
  const bool other_wrote = s.writer >= 0 && s.writer != w.id && (s.written & mask);
  if (touch == Touch::Read) {
    if (other_wrote) fail(w, in, "LDS race at " + hex(byte) + ": wave " + std::to_string(w.id) + " reads what wave " + std::to_string(s.writer) + " wrote since the last barrier");
    s.readers |= u16(1u << w.id);
    s.read |= mask;
    return;
  }
  const bool both_atomic = touch == Touch::Atomic && s.atomic;
  const bool same = touch == Touch::Write && std::memcmp(&g.lds[byte], data, n) == 0;
  const bool other_read = (s.readers & ~(1u << w.id)) && (s.read & mask);
  if (!both_atomic && !same && (other_wrote || other_read))
    fail(w, in, "LDS race at " + hex(byte) + ": wave " + std::to_string(w.id) + " writes what another wave " + (other_wrote ? "wrote" : "read") + " since the last barrier");
  if (!same || s.writer < 0) s.writer = i8(w.id);
  s.written |= mask;
  s.atomic = touch == Touch::Atomic;
}

void check_race(Wave& w, const Instruction& in, u32 address, u32 size, const u8* data, Touch touch) {
  Group& g = *w.group;
  const u16 me = u16(1u << w.id);
  for (u32 byte = address; byte < address + size;) {
    LdsShadow& s = g.shadow[byte / 4];
    const u32 n = std::min(4 - byte % 4, address + size - byte);
    const u8 mask = u8(((1u << n) - 1) << (byte % 4));
    if (s.epoch != g.epoch) {  // the first access since the barrier: nothing to compare with
      s = touch == Touch::Read ? LdsShadow{g.epoch, -1, 0, mask, false, me} : LdsShadow{g.epoch, i8(w.id), mask, 0, touch == Touch::Atomic, 0};
    } else if (touch == Touch::Read && s.writer < 0) {
      s.readers |= me;
      s.read |= mask;
    } else {
      check_dword(w, in, s, byte, n, mask, data + (byte - address), touch);
    }
    byte += n;
  }
}

/// Extra cycles: lanes are served in groups of 128 bytes; a group takes as many cycles as its fullest bank has distinct dwords.
void count_conflicts(Wave& w, const u32* address, u32 size, u64 active) {
  const int banks = w.group->launch->program->arch == Arch::gfx950 ? 64 : 32;
  const int per_group = size <= 4 ? 32 : int(128 / size);
  for (int first = 0; first < kLanes; first += per_group) {
    std::vector<u32> words;
    for (int l = first; l < std::min(first + per_group, kLanes); ++l)
      if (active >> l & 1) for (u32 b = 0; b < size; b += 4) words.push_back((address[l] + b) / 4);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int load[64] = {}, worst = 0;
    for (u32 word : words) worst = std::max(worst, ++load[word % banks]);
    const int ideal = (int(words.size()) + banks - 1) / banks;
    w.group->counters->lds_conflicts += u64(std::max(0, worst - ideal));
  }
}

}  // namespace

void touch_lds(Wave& w, const Instruction& in, u32 address, u32 size, const u8* data, Touch touch) {
  Group& g = *w.group;
  if (u64(address) + size > g.lds.size())
    fail(w, in, "LDS overrun: address " + hex(address) + " + " + std::to_string(size) + " bytes, allocated " + std::to_string(g.lds.size()));
  if (g.launch->checks.races) check_race(w, in, address, size, data, touch);
}

namespace {

void lane_addresses(Wave& w, const Instruction& in, int op, u32 offset, u32* out) {
  const Row& base = w.v[in.op[op].reg];
  for (int l = 0; l < kLanes; ++l) out[l] = base[l] + offset;
}

void account(Wave& w, const u32* address, u32 size) {
  Group& g = *w.group;
  g.counters->lds_bytes += u64(std::popcount(w.exec())) * size;
  if (g.launch->checks.bank_conflicts) count_conflicts(w, address, size, w.exec());
}

/// Reads size bytes per lane into dword rows starting at register reg.
template <u32 size> void read_rows(Wave& w, const Instruction& in, const u32* address, int reg) {
  account(w, address, size);
  const u64 exec = w.exec();
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    touch_lds(w, in, address[l], size, nullptr, Touch::Read);
    u32 data[size / 4];
    std::memcpy(data, &w.group->lds[address[l]], size);
    for (u32 i = 0; i < size / 4; ++i) w.v[reg + i][l] = data[i];
  }
}
template <u32 size> void write_rows(Wave& w, const Instruction& in, const u32* address, int reg) {
  account(w, address, size);
  const u64 exec = w.exec();
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    u32 data[size / 4];
    for (u32 i = 0; i < size / 4; ++i) data[i] = w.v[reg + i][l];
    touch_lds(w, in, address[l], size, reinterpret_cast<u8*>(data), Touch::Write);
    std::memcpy(&w.group->lds[address[l]], data, size);
  }
}

template <u32 size> void read(Wave& w, const Instruction& in) {
  u32 address[kLanes];
  lane_addresses(w, in, 1, u32(in.offset), address);
  read_rows<size>(w, in, address, in.op[0].reg);
}
template <u32 size> void write(Wave& w, const Instruction& in) {
  u32 address[kLanes];
  lane_addresses(w, in, 0, u32(in.offset), address);
  write_rows<size>(w, in, address, in.op[1].reg);
}
template <u32 size, u32 unit> void read2(Wave& w, const Instruction& in) {
  u32 first[kLanes], second[kLanes];  // both before the result may overwrite the address register
  lane_addresses(w, in, 1, in.offset0 * unit, first);
  lane_addresses(w, in, 1, in.offset1 * unit, second);
  read_rows<size>(w, in, first, in.op[0].reg);
  read_rows<size>(w, in, second, in.op[0].reg + int(size / 4));
}
template <u32 size, u32 unit> void write2(Wave& w, const Instruction& in) {
  u32 address[kLanes];
  lane_addresses(w, in, 0, in.offset0 * unit, address);
  write_rows<size>(w, in, address, in.op[1].reg);
  lane_addresses(w, in, 0, in.offset1 * unit, address);
  write_rows<size>(w, in, address, in.op[2].reg);
}

enum class Part { Whole, Low, High };  // d16: only one half of the register is written or read

template <class T, Part part> void read_small(Wave& w, const Instruction& in) {
  u32 address[kLanes];
  lane_addresses(w, in, 1, u32(in.offset), address);
  account(w, address, sizeof(T));
  const u64 exec = w.exec();
  Row& dst = w.v[in.op[0].reg];
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    touch_lds(w, in, address[l], sizeof(T), nullptr, Touch::Read);
    T x;
    std::memcpy(&x, &w.group->lds[address[l]], sizeof x);
    const u32 wide = u32(i32(x));
    dst[l] = part == Part::Whole ? wide : part == Part::Low ? (dst[l] & 0xffff0000) | (wide & 0xffff) : (dst[l] & 0xffff) | wide << 16;
  }
}
template <class T, Part part> void write_small(Wave& w, const Instruction& in) {
  u32 address[kLanes];
  lane_addresses(w, in, 0, u32(in.offset), address);
  account(w, address, sizeof(T));
  const u64 exec = w.exec();
  const Row& src = w.v[in.op[1].reg];
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    const T x = T(part == Part::High ? src[l] >> 16 : src[l]);
    touch_lds(w, in, address[l], sizeof x, reinterpret_cast<const u8*>(&x), Touch::Write);
    std::memcpy(&w.group->lds[address[l]], &x, sizeof x);
  }
}

template <class T> T lane_value(const Wave& w, int reg, int l) {
  if constexpr (sizeof(T) == 8) return std::bit_cast<T>(w.v[reg][l] | u64(w.v[reg + 1][l]) << 32);
  else return std::bit_cast<T>(w.v[reg][l]);
}
template <class T> void set_lane(Wave& w, int reg, int l, T x) {
  if constexpr (sizeof(T) == 8) {
    const u64 b = std::bit_cast<u64>(x);
    w.v[reg][l] = u32(b), w.v[reg + 1][l] = u32(b >> 32);
  } else {
    w.v[reg][l] = std::bit_cast<u32>(x);
  }
}

/// new = F()(old, data, data2). Lanes run in order. Operands: [old,] address, data [, data2].
template <class T, bool returns, class F> void atomic(Wave& w, const Instruction& in) {
  const int base = returns ? 1 : 0;
  u32 address[kLanes];
  lane_addresses(w, in, base, u32(in.offset), address);
  account(w, address, sizeof(T));
  const u64 exec = w.exec();
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    touch_lds(w, in, address[l], sizeof(T), nullptr, Touch::Atomic);
    const T data = lane_value<T>(w, in.op[base + 1].reg, l);
    const T data2 = in.op.size() > size_t(base) + 2 ? lane_value<T>(w, in.op[base + 2].reg, l) : T();
    T old;
    std::memcpy(&old, &w.group->lds[address[l]], sizeof old);
    const T fresh = F()(old, data, data2);
    std::memcpy(&w.group->lds[address[l]], &fresh, sizeof fresh);
    if (returns) set_lane(w, in.op[0].reg, l, old);
  }
}

template <class T, bool pair = false, class F> void add_atomic(F, Table& t, const std::string& name, const std::string& type, const std::string& returning) {
  const i8 n = sizeof(T) / 4;
  std::vector<i8> plain = {1, n}, with_result = {n, 1, n};
  if (pair) plain.push_back(n), with_result.push_back(n);
  t.add("ds_" + name + "_" + type, {atomic<T, false, F>, Class::Lds, kOffset, plain});
  t.add("ds_" + returning + "_" + type, {atomic<T, true, F>, Class::Lds, kOffset, with_result});
}

template <class U, class I> void add_int_atomics(Table& t, const std::string& n) {
  add_atomic<U>([](U o, U d, U) { return U(o + d); }, t, "add", "u" + n, "add_rtn");
  add_atomic<U>([](U o, U d, U) { return U(o - d); }, t, "sub", "u" + n, "sub_rtn");
  add_atomic<U>([](U o, U d, U) { return U(d - o); }, t, "rsub", "u" + n, "rsub_rtn");
  add_atomic<U>([](U o, U d, U) { return o >= d ? U(0) : U(o + 1); }, t, "inc", "u" + n, "inc_rtn");
  add_atomic<U>([](U o, U d, U) { return o == 0 || o > d ? d : U(o - 1); }, t, "dec", "u" + n, "dec_rtn");
  add_atomic<U>([](U o, U d, U) { return std::min(o, d); }, t, "min", "u" + n, "min_rtn");
  add_atomic<U>([](U o, U d, U) { return std::max(o, d); }, t, "max", "u" + n, "max_rtn");
  add_atomic<I>([](I o, I d, I) { return std::min(o, d); }, t, "min", "i" + n, "min_rtn");
  add_atomic<I>([](I o, I d, I) { return std::max(o, d); }, t, "max", "i" + n, "max_rtn");
  add_atomic<U>([](U o, U d, U) { return o & d; }, t, "and", "b" + n, "and_rtn");
  add_atomic<U>([](U o, U d, U) { return o | d; }, t, "or", "b" + n, "or_rtn");
  add_atomic<U>([](U o, U d, U) { return o ^ d; }, t, "xor", "b" + n, "xor_rtn");
  add_atomic<U>([](U, U d, U) { return d; }, t, "wrxchg", "b" + n, "wrxchg_rtn");
  add_atomic<U, true>([](U o, U d, U s) { return o == d ? s : o; }, t, "cmpst", "b" + n, "cmpst_rtn");
}

// ----------------------------------------------------------------------------- lane permutes (no LDS memory involved)

void bpermute(Wave& w, const Instruction& in) {  // result lane reads the data of the lane named by its address / 4
  const Row address = w.v[in.op[1].reg], data = w.v[in.op[2].reg];
  const u64 exec = w.exec();
  Row out;
  for (int l = 0; l < kLanes; ++l) {
    const int from = int((address[l] + u32(in.offset)) / 4 % kLanes);
    out[l] = (exec >> from & 1) ? data[from] : 0;
  }
  store_masked(w, in.op[0].reg, out.lane);
}
void permute(Wave& w, const Instruction& in) {   // each lane sends its data to the lane named by its address / 4
  const Row address = w.v[in.op[1].reg], data = w.v[in.op[2].reg];
  Row out = {};
  for (int l = 0; l < kLanes; ++l)
    if (w.exec() >> l & 1) out[int((address[l] + u32(in.offset)) / 4 % kLanes)] = data[l];
  store_masked(w, in.op[0].reg, out.lane);
}
void swizzle(Wave& w, const Instruction& in) {
  const Row data = w.v[in.op[1].reg];
  const u32 o = u32(in.offset);
  const u64 exec = w.exec();
  Row out;
  for (int l = 0; l < kLanes; ++l) {
    const int from = (o & 0x8000) ? (l & ~3) | int(o >> (2 * (l & 3)) & 3)
                                  : (l & 32) | int((((u32(l) & 31) & (o & 31)) | (o >> 5 & 31)) ^ (o >> 10 & 31));
    out[l] = (exec >> from & 1) ? data[from] : 0;
  }
  store_masked(w, in.op[0].reg, out.lane);
}

/// gfx950 transposing read: 16 lanes read 8 bytes each, seen as a matrix of 16 columns; lane i receives column i.
template <int bits> void read_transposed(Wave& w, const Instruction& in) {
  u32 address[kLanes];
  lane_addresses(w, in, 1, u32(in.offset), address);
  account(w, address, 8);
  if (!w.full) fail(w, in, "transposing LDS read with some lanes off");
  u64 data[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    touch_lds(w, in, address[l], 8, nullptr, Touch::Read);
    std::memcpy(&data[l], &w.group->lds[address[l]], 8);
  }
  constexpr int per_lane = 64 / bits;
  constexpr u64 mask = (u64(1) << bits) - 1;
  for (int l = 0; l < kLanes; ++l) {
    u64 out = 0;
    for (int j = 0; j < per_lane; ++j) {
      const int flat = j * 16 + l % 16;
      out |= (data[l / 16 * 16 + flat / per_lane] >> (bits * (flat % per_lane)) & mask) << (bits * j);
    }
    w.v[in.op[0].reg][l] = u32(out);
    w.v[in.op[0].reg + 1][l] = u32(out >> 32);
  }
}

}  // namespace

void add_lds(Table& t) {
  t.add("ds_read_b32", {read<4>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_b64", {read<8>, Class::Lds, kOffset, {2, 1}});
  t.add("ds_read_b96", {read<12>, Class::Lds, kOffset, {3, 1}});
  t.add("ds_read_b128", {read<16>, Class::Lds, kOffset, {4, 1}});
  t.add("ds_write_b32", {write<4>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_write_b64", {write<8>, Class::Lds, kOffset, {1, 2}});
  t.add("ds_write_b96", {write<12>, Class::Lds, kOffset, {1, 3}});
  t.add("ds_write_b128", {write<16>, Class::Lds, kOffset, {1, 4}});
  t.add("ds_read2_b32", {read2<4, 4>, Class::Lds, kTwoOffsets, {2, 1}});
  t.add("ds_read2_b64", {read2<8, 8>, Class::Lds, kTwoOffsets, {4, 1}});
  t.add("ds_read2st64_b32", {read2<4, 256>, Class::Lds, kTwoOffsets, {2, 1}});
  t.add("ds_read2st64_b64", {read2<8, 512>, Class::Lds, kTwoOffsets, {4, 1}});
  t.add("ds_write2_b32", {write2<4, 4>, Class::Lds, kTwoOffsets, {1, 1, 1}});
  t.add("ds_write2_b64", {write2<8, 8>, Class::Lds, kTwoOffsets, {1, 2, 2}});
  t.add("ds_write2st64_b32", {write2<4, 256>, Class::Lds, kTwoOffsets, {1, 1, 1}});
  t.add("ds_write2st64_b64", {write2<8, 512>, Class::Lds, kTwoOffsets, {1, 2, 2}});
  t.add("ds_read_u8", {read_small<u8, Part::Whole>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_i8", {read_small<i8, Part::Whole>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_u16", {read_small<u16, Part::Whole>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_i16", {read_small<i16, Part::Whole>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_u8_d16", {read_small<u8, Part::Low>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_u8_d16_hi", {read_small<u8, Part::High>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_i8_d16", {read_small<i8, Part::Low>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_i8_d16_hi", {read_small<i8, Part::High>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_u16_d16", {read_small<u16, Part::Low>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_u16_d16_hi", {read_small<u16, Part::High>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_write_b8", {write_small<u8, Part::Whole>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_write_b16", {write_small<u16, Part::Whole>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_write_b8_d16_hi", {write_small<u8, Part::High>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_write_b16_d16_hi", {write_small<u16, Part::High>, Class::Lds, kOffset, {1, 1}});
  t.add("ds_read_b64_tr_b16", {read_transposed<16>, Class::Lds, kOffset, {2, 1}});
  t.add("ds_read_b64_tr_b8", {read_transposed<8>, Class::Lds, kOffset, {2, 1}});
  t.add("ds_read_b64_tr_b4", {read_transposed<4>, Class::Lds, kOffset, {2, 1}});
  add_int_atomics<u32, i32>(t, "32");
  add_int_atomics<u64, i64>(t, "64");
  add_atomic<f32>([](f32 o, f32 d, f32) { return o + d; }, t, "add", "f32", "add_rtn");
  add_atomic<f32>([](f32 o, f32 d, f32) { return std::fmin(o, d); }, t, "min", "f32", "min_rtn");
  add_atomic<f32>([](f32 o, f32 d, f32) { return std::fmax(o, d); }, t, "max", "f32", "max_rtn");
  add_atomic<f64>([](f64 o, f64 d, f64) { return o + d; }, t, "add", "f64", "add_rtn");
  t.add("ds_bpermute_b32", {bpermute, Class::Lds, kOffset, {1, 1, 1}});
  t.add("ds_permute_b32", {permute, Class::Lds, kOffset, {1, 1, 1}});
  t.add("ds_swizzle_b32", {swizzle, Class::Lds, kOffset, {1, 1}});
}

}  // namespace emu
