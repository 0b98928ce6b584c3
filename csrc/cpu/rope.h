// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "vec.h"

namespace cpu {

// One head of `width` values: the first `turned` of them rotated by angles (cos | sin), the rest copied. to may be from.
template <class T>
inline void rotate(T* to, const T* from, const float* angles, Index turned, Index width, bool interleaved) {
  const Index half = turned / 2;
  const float *cos = angles, *sin = angles + half;
  if (interleaved) {
    for (Index i = 0; i < half; ++i) {
      const float a = widen(from[2 * i]), b = widen(from[2 * i + 1]);
      to[2 * i] = narrow<T>(a * cos[i] - b * sin[i]);
      to[2 * i + 1] = narrow<T>(b * cos[i] + a * sin[i]);
    }
  } else {
    by_vectors(half, [&](Index i, Index n) {
      const Floats a = load_some(from + i, n), b = load_some(from + half + i, n);
      const Floats c = load_some(cos + i, n), s = load_some(sin + i, n);
      store_some(to + i, a * c - b * s, n);
      store_some(to + half + i, b * c + a * s, n);
    });
  }
  if (to != from) std::copy(from + turned, from + width, to + turned);
}

}  // namespace cpu
