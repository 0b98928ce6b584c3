// SPDX-License-Identifier: Apache-2.0
// Matrix core (MFMA). Layouts follow AMD's public matrix instruction calculator.
//
// A (M x K) and B (K x N), M = N, `blocks` independent products. With g = M lanes per group:
//   element j of lane l holds row l % M, k = (l / M) * (elements per lane) + j;  blocked shapes: block l / M, k = j.
//   result register r of lane l: column l % M, row 4 * (64 / M) * (r / 4) + 4 * (l / M) + r % 4 (4x4: row r, block l / 4).
// Sums run over k in order with fused multiply-add in f32; the hardware's internal order and rounding are not public.
#include "formats.h"

namespace emu {
namespace {

/// How an operand stores its elements: decode(dwords of a lane) for element j.
struct Bf16 { static constexpr int bits = 16; static f32 decode(u32 x) { return from_bf16(x); } };
struct F16 { static constexpr int bits = 16; static f32 decode(u32 x) { return f32(std::bit_cast<f16>(u16(x))); } };
struct F32 { static constexpr int bits = 32; static f32 decode(u32 x) { return std::bit_cast<f32>(x); } };
struct Xf32 {  // 10 mantissa bits; rounded to nearest even here, the hardware's rounding is not public
  static constexpr int bits = 32;
  static f32 decode(u32 x) {
    const u32 rounded = (x + 0xfff + (x >> 13 & 1)) & ~0x1fffu;
    return std::bit_cast<f32>((x & 0x7f800000) == 0x7f800000 ? x : rounded);
  }
};
struct I8 { static constexpr int bits = 8; static i32 decode(u32 x) { return i8(x); } };
template <const Format& f> struct Small {
  static constexpr int bits = 8;
  static f32 decode(u32 x) { return decoded<f>()[x]; }
};

template <class T> T multiply_add(T a, T b, T c) {
  if constexpr (std::is_same_v<T, f32>) return std::fma(a, b, c);
  else return T(u32(a) * u32(b) + u32(c));
}

template <int M, int K, int blocks> struct Shape {
  static constexpr int groups = kLanes / M;              // groups of M lanes
  static constexpr int k_groups = groups / blocks;       // of them, those that share a block
  static constexpr int per_lane = K / k_groups;          // elements of A and B in a lane
  static constexpr int results = M * M * blocks / kLanes;
};

/// out[group * per_lane + j][row]: element j of lanes group * M + row.
template <class T, class E, int M, int n> void unpack(const Wave& w, int reg, E (*out)[M]) {
  constexpr int groups = kLanes / M, per_dword = 32 / T::bits;
  for (int j = 0; j < n; ++j) {
    const u32* row = w.v[reg + j / per_dword].lane;
    const int shift = T::bits * (j % per_dword);
    constexpr u32 mask = T::bits == 32 ? ~0u : (1u << (T::bits % 32)) - 1;
    for (int g = 0; g < groups; ++g)
      for (int m = 0; m < M; ++m) out[g * n + j][m] = T::decode(row[g * M + m] >> shift & mask);
  }
}

/// The result rows, starting from operand 3 (registers or a constant).
template <class E, int results> void load_accumulator(const Wave& w, const Operand& c, E (*acc)[kLanes]) {
  for (int r = 0; r < results; ++r)
    for (int l = 0; l < kLanes; ++l) acc[r][l] = std::bit_cast<E>(c.kind == Kind::Vector ? w.v[c.reg + r][l] : c.bits32);
}

/// acc rows += A B for all blocks. a and b: [group * per_lane + j][row].
template <class E, int M, int K, int blocks> void multiply(const E (*a)[M], const E (*b)[M], E (*acc)[kLanes]) {
  using S = Shape<M, K, blocks>;
  for (int block = 0; block < blocks; ++block) {
    const int k0 = block * S::k_groups * S::per_lane;  // rows of a and b that belong to this block
    for (int row = 0; row < M; ++row) {
      E* target;
      if constexpr (M == 4) {
        target = &acc[row][block * 4];
      } else {
        const int within = row % (4 * S::groups);
        target = &acc[block * (S::results / blocks) + 4 * (row / (4 * S::groups)) + within % 4][within / 4 * M];
      }
      E sum[M];
      for (int n = 0; n < M; ++n) sum[n] = target[n];
      for (int k = 0; k < K; ++k) {
        const E x = a[k0 + k][row];
        for (int n = 0; n < M; ++n) sum[n] = multiply_add<E>(x, b[k0 + k][n], sum[n]);
      }
      for (int n = 0; n < M; ++n) target[n] = sum[n];
    }
  }
}

template <class E, int results> void store_result(Wave& w, int reg, const E (*acc)[kLanes]) {
  for (int r = 0; r < results; ++r)  // matrix instructions ignore EXEC
    for (int l = 0; l < kLanes; ++l) w.v[reg + r][l] = std::bit_cast<u32>(acc[r][l]);
}

template <class A, class B, class E, int M, int K, int blocks> void mfma(Wave& w, const Instruction& in) {
  using S = Shape<M, K, blocks>;
  alignas(64) E a[S::groups * S::per_lane][M];
  alignas(64) E b[S::groups * S::per_lane][M];
  alignas(64) E acc[S::results][kLanes];
  unpack<A, E, M, S::per_lane>(w, in.op[1].reg, a);
  unpack<B, E, M, S::per_lane>(w, in.op[2].reg, b);
  load_accumulator<E, S::results>(w, in.op[3], acc);
  multiply<E, M, K, blocks>(a, b, acc);
  store_result<E, S::results>(w, in.op[0].reg, acc);
}

/// cycles: of one instruction on one matrix core, from the flops per cycle of a compute unit's four cores.
template <class A, class B, class E, int M, int K, int blocks = 1> Entry entry(int flops_per_cycle) {
  using S = Shape<M, K, blocks>;
  const u64 flops = u64(2) * M * M * K * blocks;
  const i8 a = std::max(1, S::per_lane * A::bits / 32), b = std::max(1, S::per_lane * B::bits / 32);
  return {mfma<A, B, E, M, K, blocks>, Class::Mfma, 0, {i8(S::results), a, b, i8(S::results)}, 1, flops, u32(flops / flops_per_cycle)};
}

/// All shapes of one 16-bit type.
template <class T> void add_16bit(Table& t, const std::string& name, Arch arch) {
  const std::string p = "v_mfma_f32_";
  const int rate = 512 * (arch == Arch::gfx950 ? 2 : 1), old_rate = 512;
  t.add(p + "32x32x4_2b_" + name, entry<T, T, f32, 32, 4, 2>(old_rate));
  t.add(p + "16x16x4_4b_" + name, entry<T, T, f32, 16, 4, 4>(old_rate));
  t.add(p + "4x4x4_16b_" + name, entry<T, T, f32, 4, 4, 16>(old_rate));
  t.add(p + "32x32x8_" + name, entry<T, T, f32, 32, 8>(old_rate));
  t.add(p + "16x16x16_" + name, entry<T, T, f32, 16, 16>(old_rate));
  if (arch == Arch::gfx950) {
    t.add(p + "32x32x16_" + name, entry<T, T, f32, 32, 16>(rate));
    t.add(p + "16x16x32_" + name, entry<T, T, f32, 16, 32>(rate));
  }
}

template <const Format& fp8, const Format& bf8> void add_8bit(Table& t) {
  const auto both = [&](const std::string& names, auto a, auto b) {
    using A = decltype(a);
    using B = decltype(b);
    t.add("v_mfma_f32_16x16x32_" + names, entry<A, B, f32, 16, 32>(1024));
    t.add("v_mfma_f32_32x32x16_" + names, entry<A, B, f32, 32, 16>(1024));
  };
  both("fp8_fp8", Small<fp8>{}, Small<fp8>{});
  both("fp8_bf8", Small<fp8>{}, Small<bf8>{});
  both("bf8_fp8", Small<bf8>{}, Small<fp8>{});
  both("bf8_bf8", Small<bf8>{}, Small<bf8>{});
}

// --------------------------------------------------------------------------- gfx950: scaled fp8, fp6 and fp4 products

const Format& f8f6f4(Wave& w, const Instruction& in, int code) {
  static const Format* const formats[] = {&kE4M3Fn, &kE5M2, &kE2M3, &kE3M2, &kE2M1};
  if (code > 4) fail(w, in, "unknown matrix format code " + std::to_string(code));
  return *formats[code];
}

/// 32 elements per lane. fp6 and fp4: k = 32 * (l / M) + j. 8-bit: two runs of 16, at 16 * (l / M) and K / 2 further on.
template <int M, int K> void unpack_small(Wave& w, int reg, const Format& f, f32 (*out)[M]) {
  constexpr int groups = kLanes / M;
  const int n = f.bits();
  const u32 mask = (1u << n) - 1;
  f32 table[256];
  for (u32 i = 0; i <= mask; ++i) table[i] = f.decode(i);
  for (int j = 0; j < 32; ++j) {
    const int dword = j * n / 32, shift = j * n % 32;
    const Row &lo = w.v[reg + dword], &hi = w.v[reg + (shift + n > 32 ? dword + 1 : dword)];
    for (int g = 0; g < groups; ++g) {
      const int k = n == 8 ? 16 * g + j % 16 + (K / 2) * (j / 16) : 32 * g + j;
      for (int m = 0; m < M; ++m) {
        const int l = g * M + m;
        out[k][m] = table[(lo[l] | u64(hi[l]) << 32) >> shift & mask];
      }
    }
  }
}

/// Multiplies by the e8m0 scales: the lane of group g scales k in [32 g, 32 g + 32) of its row.
template <int M, int K> void apply_scale(Wave& w, const Instruction& in, int operand, f32 (*x)[M]) {
  const Operand& o = in.op[operand];
  const int i = operand - 4, byte = (in.op_sel >> i & 1) + 2 * (in.op_sel_hi >> i & 1);
  for (int k = 0; k < K; ++k) {
    for (int m = 0; m < M; ++m) {
      const int l = k / 32 * M + m;
      const u32 raw = o.kind == Kind::Vector ? w.v[o.reg][l] : o.kind == Kind::Literal ? o.bits32 : w.s[o.reg];
      const u32 e = raw >> (8 * byte) & 0xff;
      x[k][m] *= e == 255 ? std::numeric_limits<f32>::quiet_NaN() : std::ldexp(1.f, int(e) - 127);
    }
  }
}

template <int M, int K, bool scaled> void mfma_f8f6f4(Wave& w, const Instruction& in) {
  constexpr int results = M * M / kLanes;
  alignas(64) f32 a[K][M];
  alignas(64) f32 b[K][M];
  alignas(64) f32 acc[results][kLanes];
  const Format &fa = f8f6f4(w, in, in.cbsz), &fb = f8f6f4(w, in, in.blgp);
  if (in.op[1].count != fa.bits() || in.op[2].count != fb.bits()) fail(w, in, "operand width does not fit the format");
  unpack_small<M, K>(w, in.op[1].reg, fa, a);
  unpack_small<M, K>(w, in.op[2].reg, fb, b);
  if (scaled) {
    apply_scale<M, K>(w, in, 4, a);
    apply_scale<M, K>(w, in, 5, b);
  }
  load_accumulator<f32, results>(w, in.op[3], acc);
  multiply<f32, M, K, 1>(a, b, acc);
  store_result<f32, results>(w, in.op[0].reg, acc);
}

template <int M, int K> void add_f8f6f4(Table& t, const std::string& shape) {
  constexpr i8 results = M * M / kLanes;
  const u64 flops = u64(2) * M * M * K;
  const u32 cycles = u32(flops / 2048);  // the rate of 8-bit inputs; 6 and 4 bits are twice as fast
  t.add("v_mfma_f32_" + shape, {mfma_f8f6f4<M, K, false>, Class::Mfma, kMatrix, {results, 0, 0, results}, 1, flops, cycles});
  t.add("v_mfma_scale_f32_" + shape, {mfma_f8f6f4<M, K, true>, Class::Mfma, kMatrix | kMixed, {results, 0, 0, results, 1, 1}, 1, flops, cycles});
}

}  // namespace

void add_matrix(Table& t, Arch arch) {
  add_16bit<F16>(t, "f16", arch);
  add_16bit<Bf16>(t, "bf16", arch);
  t.add("v_mfma_f32_32x32x1_2b_f32", entry<F32, F32, f32, 32, 1, 2>(64));
  t.add("v_mfma_f32_16x16x1_4b_f32", entry<F32, F32, f32, 16, 1, 4>(64));
  t.add("v_mfma_f32_4x4x1_16b_f32", entry<F32, F32, f32, 4, 1, 16>(64));
  t.add("v_mfma_f32_32x32x2_f32", entry<F32, F32, f32, 32, 2>(64));
  t.add("v_mfma_f32_16x16x4_f32", entry<F32, F32, f32, 16, 4>(64));
  t.add("v_mfma_i32_32x32x4_2b_i8", entry<I8, I8, i32, 32, 4, 2>(512));
  t.add("v_mfma_i32_16x16x4_4b_i8", entry<I8, I8, i32, 16, 4, 4>(512));
  t.add("v_mfma_i32_4x4x4_16b_i8", entry<I8, I8, i32, 4, 4, 16>(512));
  t.add("v_mfma_i32_32x32x16_i8", entry<I8, I8, i32, 32, 16>(1024));
  t.add("v_mfma_i32_16x16x32_i8", entry<I8, I8, i32, 16, 32>(1024));
  if (arch == Arch::gfx942) {
    add_8bit<kE4M3Fnuz, kE5M2Fnuz>(t);
    t.add("v_mfma_f32_16x16x8_xf32", entry<Xf32, Xf32, f32, 16, 8>(256));
    t.add("v_mfma_f32_32x32x4_xf32", entry<Xf32, Xf32, f32, 32, 4>(256));
  } else {
    add_8bit<kE4M3Fn, kE5M2>(t);
    t.add("v_mfma_i32_32x32x32_i8", entry<I8, I8, i32, 32, 32>(2048));
    t.add("v_mfma_i32_16x16x64_i8", entry<I8, I8, i32, 16, 64>(2048));
    add_f8f6f4<16, 128>(t, "16x16x128_f8f6f4");
    add_f8f6f4<32, 64>(t, "32x32x64_f8f6f4");
  }
}

}  // namespace emu
