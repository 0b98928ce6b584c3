// SPDX-License-Identifier: Apache-2.0
// Vectors of floats, numbers as they lie in memory, and loops over threads: all that the CPU kernels use.
// GCC's vector types serve every instruction set; the one intrinsic multiplies pairs of bf16.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// The instances of an op that Python looks up by name.
#define EXPORT_AS(name, ...)                                                           \
  extern "C" {                                                                         \
  __attribute__((visibility("default"))) auto* name = &cpu::Packed<&__VA_ARGS__>::run; \
  }
#define EXPORT(op)                         \
  EXPORT_AS(op##_bf16, cpu::op<cpu::bf16>) \
  EXPORT_AS(op##_f32, cpu::op<float>)

namespace cpu {

using Index = int64_t;

// A function as Python calls it: its arguments one after the other in 8 bytes each. ctypes converts a single one, which is
// several times as fast as converting all.
template <auto function>
struct Packed;
template <class... Types, void (*function)(Types...)>
struct Packed<function> {
  static void run(const char* packed) { call(packed, std::index_sequence_for<Types...>{}); }

 private:
  template <class Type>
  static Type read(const char* from) {
    static_assert(sizeof(Type) == 8, "a pointer, an Index or a double");
    Type value;
    std::memcpy(&value, from, 8);
    return value;
  }
  template <size_t... I>
  static void call(const char* packed, std::index_sequence<I...>) {
    function(read<Types>(packed + 8 * I)...);
  }
};

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 6;  // 24 sums, 4 + 1 operands: 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 2;  // 8 sums, 4 + 1 operands: 16 registers
#else
constexpr int kLanes = 4, kTileRows = 4;
#endif
constexpr int kTileColumns = 4;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Floats load(const bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Floats v) {
  Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  Words nan = bits >> 16 | 0x40;
  Halves h = __builtin_convertvector(v == v ? rounded : nan, Halves);
  std::memcpy(p, &h, sizeof h);
}
// The first `count` < kLanes of a vector; the others read as zero.
template <class T>
inline Floats load(const T* p, Index count) {
  T part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}
template <class T>
inline void store(T* p, Floats v, Index count) {
  T part[kLanes];
  store(part, v);
  std::memcpy(p, part, count * sizeof(T));
}

// body(offset, count): once per vector of a row, whose last may be short.
template <class Body>
inline void by_vectors(Index width, const Body& body) {
  Index i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, Index(kLanes));
  if (i < width) body(i, width - i);
}
template <class T>
inline Floats load_some(const T* p, Index count) {
  return count == kLanes ? load(p) : load(p, count);
}
template <class T>
inline void store_some(T* p, Floats v, Index count) {
  if (count == kLanes)
    store(p, v);
  else
    store(p, v, count);
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline float largest(Floats v) {
  float found = v[0];
  for (int i = 1; i < kLanes; ++i) found = std::max(found, v[i]);
  return found;
}

// e^x to 2 ulp; 0 and infinity beyond the range of floats, NaN stays.
inline Floats exp(Floats x) {
  Floats bounded = x < -104.0f ? splat(-104.0f) : x;
  bounded = bounded > 89.0f ? splat(89.0f) : bounded;
  Floats shifted = bounded * 1.44269504f + 12582912.0f;  // the integer lands in the low bits
  Floats n = shifted - 12582912.0f;
  Floats r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  p = p * r * r + r + 1.0f;
  Ints e = (Ints)shifted - 0x4b400000, half = e >> 1;  // in two steps: 2^128 and subnormals are results too
  Floats y = p * (Floats)((half + 127) << 23) * (Floats)((e - half + 127) << 23);
  return x != x ? x : y;
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// What one multiplication takes: `kStep` values of a row, products summed in fp32, always in the same order.
template <class T>
struct Operand;
template <>
struct Operand<float> {
  static constexpr int kStep = kLanes;
  Floats v;
  Operand() = default;
  explicit Operand(const float* p) : v(load(p)) {}
  Floats add(Floats sum, Operand o) const { return sum + v * o.v; }
};
template <>
struct Operand<bf16> {
  static constexpr int kStep = 2 * kLanes;
  Words v;
  Operand() = default;
  explicit Operand(const bf16* p) { std::memcpy(&v, p, sizeof v); }
  Floats add(Floats sum, Operand o) const {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)v, (__m512bh)o.v);
#else
    sum = sum + (Floats)(v << 16) * (Floats)(o.v << 16);
    return sum + (Floats)(v & 0xffff0000u) * (Floats)(o.v & 0xffff0000u);
#endif
  }
};
template <class T>
inline Operand<T> operand(const T* p, Index count) {
  T part[Operand<T>::kStep] = {};
  std::memcpy(part, p, count * sizeof(T));
  return Operand<T>(part);
}

// Of two vectors, in each 128 bits: a0 b0 a1 b1 (or 2, 3), in units of Unit floats.
template <int Unit, int High, int... I>
inline Floats zip(Floats a, Floats b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      a, b, (I / 4 * 4 + (Unit == 1 ? I % 4 / 2 + 2 * High + I % 2 * kLanes : I % 2 + 2 * High + I % 4 / 2 * kLanes))...);
}

typedef float Four __attribute__((vector_size(16)));

// The sums of the lanes of four vectors; every one by the same tree.
inline Four sums(const Floats (&v)[kTileColumns]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  Floats ab = zip<1, 0>(v[0], v[1], lanes) + zip<1, 1>(v[0], v[1], lanes);
  Floats cd = zip<1, 0>(v[2], v[3], lanes) + zip<1, 1>(v[2], v[3], lanes);
  Floats abcd = zip<2, 0>(ab, cd, lanes) + zip<2, 1>(ab, cd, lanes);
  Four parts[kLanes / 4];
  std::memcpy(parts, &abcd, sizeof parts);
  for (int step = kLanes / 8; step; step /= 2)
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  return parts[0];
}

// found[m] = products of row x[m] with the rows w[0..3], over `depth` values. Any M gives a row the same bits.
template <int M, class T>
inline void tile(const T* const* x, const T* const* w, Index depth, Four* found) {
  Floats total[M][kTileColumns] = {};
  const T *a[M], *b[kTileColumns];
  for (int m = 0; m < M; ++m) a[m] = x[m];
  for (int n = 0; n < kTileColumns; ++n) b[n] = w[n];
  const auto step = [&](const auto& get) {
    const Operand<T> column[kTileColumns] = {get(b[0]), get(b[1]), get(b[2]), get(b[3])};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Operand<T> row = get(a[m]);
#pragma GCC unroll 4
      for (int n = 0; n < kTileColumns; ++n) total[m][n] = row.add(total[m][n], column[n]);
    }
  };
  Index k = 0;
  for (; k + Operand<T>::kStep <= depth; k += Operand<T>::kStep) step([k](const T* p) { return Operand<T>(p + k); });
  if (k < depth) step([k, depth](const T* p) { return operand(p + k, depth - k); });
  for (int m = 0; m < M; ++m) found[m] = sums(total[m]);
}

template <int M = kTileRows, class T>
inline void tile(Index rows, const T* const* x, const T* const* w, Index depth, Four* found) {
  if (rows == M)
    tile<M>(x, w, depth, found);
  else if constexpr (M > 1)
    tile<M - 1>(rows, x, w, depth, found);
}

// body(first, count): rows in tiles of nearly equal height.
template <class Body>
inline void by_tiles(Index rows, const Body& body) {
  const Index tiles = (rows + kTileRows - 1) / kTileRows;
  for (Index t = 0; t < tiles; ++t) body(rows * t / tiles, rows * (t + 1) / tiles - rows * t / tiles);
}

// The threads of torch, so that there is one pool: GNU's entry points of its OpenMP library, set by the loader.
struct Threads {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int (*count)();
};
extern Threads threads;

// body(i) for all i below count, on all threads where `work` (about nanoseconds) is worth waking them.
template <class Body>
inline void parallel(Index count, double work, const Body& body) {
  std::atomic<Index> next{0};
  const auto some = [&] {
    for (Index i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  };
  if (count < 2 || work < 20000 || !threads.run || threads.count() < 2) return some();
  threads.run([](void* p) { (*static_cast<decltype(some)*>(p))(); }, const_cast<void*>(static_cast<const void*>(&some)), 0, 0);
}

// Memory of a thread that keeps its size between calls.
template <int Use>
inline float* scratch(Index count) {
  thread_local std::vector<float> memory;
  if (Index(memory.size()) < count) memory.resize(count);
  return memory.data();
}

}  // namespace cpu
