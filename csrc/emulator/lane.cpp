// SPDX-License-Identifier: Apache-2.0
// What moves data between lanes: DPP and SDWA operand paths, readlane and friends, permlane swaps.
#include "machine.h"

namespace emu {

void fetch_special(Wave& w, const Instruction& in, const Operand& o, int dword, bool high_half, Row& out) {
  if (o.kind != Kind::Vector) {
    const u32 x = o.kind == Kind::Literal ? (dword ? u32(o.bits64 >> 32) : o.bits32) : w.s[o.reg + dword];
    for (int l = 0; l < kLanes; ++l) out[l] = x;
  } else {
    const Row& row = w.v[o.reg + dword];
    const bool moved = in.dpp && &o == &in.op[in.first_source];
    const u64 exec = w.exec();
    for (int l = 0; l < kLanes; ++l) {
      const int from = moved ? in.dpp->source[l] : l;
      out[l] = !moved ? row[l] : from < 0 || !(exec >> from & 1) ? 0u : row[from];
    }
  }
  if (high_half) for (int l = 0; l < kLanes; ++l) out[l] >>= 16;
  if (o.select < 4) {
    for (int l = 0; l < kLanes; ++l) {
      const u32 byte = out[l] >> (8 * o.select) & 0xff;
      out[l] = o.sext ? u32(i32(i8(byte))) : byte;
    }
  } else if (o.select < 6) {
    for (int l = 0; l < kLanes; ++l) {
      const u32 word = out[l] >> (16 * (o.select - 4)) & 0xffff;
      out[l] = o.sext ? u32(i32(i16(word))) : word;
    }
  }
}

/// SDWA destination selection, and DPP lanes that must keep their old value.
void commit_special(Wave& w, const Instruction& in, const Operand& dst, const u32* out) {
  const Row& old = w.v[dst.reg];
  Row row;
  for (int l = 0; l < kLanes; ++l) {
    u32 x = out[l];
    if (in.dst_sel < 6) {
      const int shift = in.dst_sel < 4 ? 8 * in.dst_sel : 16 * (in.dst_sel - 4), bits = in.dst_sel < 4 ? 8 : 16;
      const u32 mask = ((1u << bits) - 1) << shift;
      const u32 placed = x << shift & mask;
      if (in.dst_unused == 2) x = (old[l] & ~mask) | placed;
      else if (in.dst_unused == 0) x = placed;
      else x = u32(i32(placed << (32 - bits - shift)) >> (32 - bits - shift));
    }
    row[l] = x;
  }
  if (in.dpp) {
    const u64 exec = w.exec();
    for (int l = 0; l < kLanes; ++l) {
      const int from = in.dpp->source[l];
      const bool invalid = from < 0 || !(exec >> from & 1);
      if (!(in.dpp->write >> l & 1) || (invalid && !in.dpp->bound_zero)) row[l] = old[l];
    }
  }
  store_masked(w, dst.reg, row.lane);
}

namespace {

int first_lane(const Wave& w) { return w.exec() ? std::countr_zero(w.exec()) : 0; }

void readfirstlane(Wave& w, const Instruction& in) { w.write_scalar(in.op[0].reg, w.v[in.op[1].reg][first_lane(w)]); }
void readlane(Wave& w, const Instruction& in) {
  w.write_scalar(in.op[0].reg, w.v[in.op[1].reg][scalar<u32>(w, in.op[2]) & 63]);
}
void writelane(Wave& w, const Instruction& in) {
  w.v[in.op[0].reg][int(scalar<u32>(w, in.op[2]) & 63)] = scalar<u32>(w, in.op[1]);
}

/// Population count of the mask below this lane, plus an addend. Low half counts lanes 0-31, high half 32-63.
template <bool high> void mbcnt(Wave& w, const Instruction& in) {
  u32 a_buf[kLanes], b_buf[kLanes], out[kLanes];
  const u32 *a = fetch<u32>(w, in, 1, a_buf), *b = fetch<u32>(w, in, 2, b_buf);
  for (int l = 0; l < kLanes; ++l) {
    const u64 below = (u64(1) << l) - 1;
    out[l] = u32(std::popcount(a[l] & u32(high ? below >> 32 : below))) + b[l];
  }
  commit(w, in, out);
}

/// v_permlane{16,32}_swap: odd rows of the first register trade with even rows of the second.
template <int row_lanes> void permlane_swap(Wave& w, const Instruction& in) {
  const Row a = w.v[in.op[0].reg], b = w.v[in.op[1].reg];
  Row x = a, y = b;
  for (int l = 0; l < kLanes; ++l) {
    if (l / row_lanes % 2) x[l] = b[l - row_lanes];
    else y[l] = a[l + row_lanes];
  }
  store_masked(w, in.op[0].reg, x.lane);
  store_masked(w, in.op[1].reg, y.lane);
}

}  // namespace

void add_lane(Table& t) {
  t.add("v_readfirstlane_b32", {readfirstlane, Class::Valu, 0, {1, 1}});
  t.add("v_readlane_b32", {readlane, Class::Valu, 0, {1, 1, 1}});
  t.add("v_writelane_b32", {writelane, Class::Valu, 0, {1, 1, 1}});
  t.add("v_mbcnt_lo_u32_b32", {mbcnt<false>, Class::Valu, 0, {1, 1, 1}});
  t.add("v_mbcnt_hi_u32_b32", {mbcnt<true>, Class::Valu, 0, {1, 1, 1}});
  t.add("v_permlane16_swap_b32", {permlane_swap<16>, Class::Valu, 0, {1, 1}});
  t.add("v_permlane32_swap_b32", {permlane_swap<32>, Class::Valu, 0, {1, 1}});
}

}  // namespace emu
