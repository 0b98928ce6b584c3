// SPDX-License-Identifier: Apache-2.0
// Vector compares: v_cmp writes a lane mask, v_cmpx writes EXEC as well.
#include "machine.h"

namespace emu {
namespace {

/// Operands: lane mask, a, b. Lanes that are off give 0.
template <class A, class B, bool to_exec, class F> void compare(Wave& w, const Instruction& in) {
  alignas(64) A a_buf[kLanes];
  alignas(64) B b_buf[kLanes];
  const A* __restrict a = fetch<A>(w, in, 1, a_buf);
  const B* __restrict b = fetch<B>(w, in, 2, b_buf);
  alignas(64) u8 bit[kLanes];
  for (int l = 0; l < kLanes; ++l) bit[l] = F()(a[l], b[l]);
  u64 mask = 0;
  for (int g = 0; g < kLanes; g += 8) {  // gathers eight 0/1 bytes into eight bits
    u64 bytes;
    std::memcpy(&bytes, bit + g, 8);
    mask |= (bytes * 0x0102040810204080ull >> 56) << g;
  }
  mask &= w.exec();
  w.write_scalar64(in.op[0].reg, mask);
  if (to_exec) w.write_scalar64(kExec, mask);
}

template <class T, class F> void add(F, Table& t, const std::string& name, const std::string& type) {
  constexpr u32 accepts = kSdwa | (is_float<T> ? u32(kNegAbs) : 0u);
  t.add("v_cmp_" + name + "_" + type, {compare<T, T, false, F>, Class::Valu, accepts, {2, dwords<T>, dwords<T>}});
  t.add("v_cmpx_" + name + "_" + type, {compare<T, T, true, F>, Class::Valu, accepts, {2, dwords<T>, dwords<T>}});
}

template <class T> void add_float(Table& t, const std::string& type) {
  add<T>([](T, T) { return false; }, t, "f", type);
  add<T>([](T a, T b) { return a < b; }, t, "lt", type);
  add<T>([](T a, T b) { return a == b; }, t, "eq", type);
  add<T>([](T a, T b) { return a <= b; }, t, "le", type);
  add<T>([](T a, T b) { return a > b; }, t, "gt", type);
  add<T>([](T a, T b) { return a < b || a > b; }, t, "lg", type);
  add<T>([](T a, T b) { return a >= b; }, t, "ge", type);
  add<T>([](T a, T b) { return a == a && b == b; }, t, "o", type);
  add<T>([](T a, T b) { return a != a || b != b; }, t, "u", type);
  add<T>([](T a, T b) { return !(a >= b); }, t, "nge", type);
  add<T>([](T a, T b) { return !(a < b || a > b); }, t, "nlg", type);
  add<T>([](T a, T b) { return !(a > b); }, t, "ngt", type);
  add<T>([](T a, T b) { return !(a <= b); }, t, "nle", type);
  add<T>([](T a, T b) { return a != b; }, t, "neq", type);
  add<T>([](T a, T b) { return !(a < b); }, t, "nlt", type);
  add<T>([](T, T) { return true; }, t, "tru", type);
}

template <class T> void add_int(Table& t, const std::string& type) {
  add<T>([](T, T) { return false; }, t, "f", type);
  add<T>([](T a, T b) { return a < b; }, t, "lt", type);
  add<T>([](T a, T b) { return a == b; }, t, "eq", type);
  add<T>([](T a, T b) { return a <= b; }, t, "le", type);
  add<T>([](T a, T b) { return a > b; }, t, "gt", type);
  add<T>([](T a, T b) { return a != b; }, t, "ne", type);
  add<T>([](T a, T b) { return a >= b; }, t, "ge", type);
  add<T>([](T, T) { return true; }, t, "t", type);
}

/// Class bits: 0 signalling NaN, 1 quiet NaN, 2 -inf, 3 -normal, 4 -denormal, 5 -0, 6 +0, 7 +denormal, 8 +normal, 9 +inf.
template <class Bits, int mantissa_bits> bool is_class(Bits x, u32 wanted) {
  constexpr int total = 8 * sizeof(Bits);
  const bool negative = x >> (total - 1) & 1;
  const Bits exponent_max = (Bits(1) << (total - 1 - mantissa_bits)) - 1;
  const Bits exponent = x >> mantissa_bits & exponent_max, mantissa = x & ((Bits(1) << mantissa_bits) - 1);
  int bit;
  if (exponent == exponent_max) bit = mantissa == 0 ? (negative ? 2 : 9) : (mantissa >> (mantissa_bits - 1) & 1) ? 1 : 0;
  else if (exponent == 0) bit = mantissa == 0 ? (negative ? 5 : 6) : (negative ? 4 : 7);
  else bit = negative ? 3 : 8;
  return wanted >> bit & 1;
}
template <class T, class Bits, int mantissa_bits> void add_class(Table& t, const std::string& type) {
  constexpr auto test = [](T a, u32 b) { return is_class<Bits, mantissa_bits>(std::bit_cast<Bits>(a), b); };
  t.add("v_cmp_class_" + type, {compare<T, u32, false, decltype(test)>, Class::Valu, kSdwa | kNegAbs, {2, dwords<T>, 1}});
  t.add("v_cmpx_class_" + type, {compare<T, u32, true, decltype(test)>, Class::Valu, kSdwa | kNegAbs, {2, dwords<T>, 1}});
}

}  // namespace

void add_compare(Table& t) {
  add_float<f16>(t, "f16");
  add_float<f32>(t, "f32");
  add_float<f64>(t, "f64");
  add_int<i16>(t, "i16");
  add_int<u16>(t, "u16");
  add_int<i32>(t, "i32");
  add_int<u32>(t, "u32");
  add_int<i64>(t, "i64");
  add_int<u64>(t, "u64");
  add_class<f16, u16, 10>(t, "f16");
  add_class<f32, u32, 23>(t, "f32");
  add_class<f64, u64, 52>(t, "f64");
}

}  // namespace emu
