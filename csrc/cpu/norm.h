// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "vec.h"

namespace cpu {

// y = v / sqrt(mean(v^2) + eps) * weight for one row, whose vector at i is value(i, count).
template <class T, class Value>
inline void normalise(T* y, const T* weight, Index width, double eps, const Value& value) {
  Floats squares = {};
  by_vectors(width, [&](Index i, Index n) {
    const Floats v = value(i, n);
    squares += v * v;
  });
  const float factor = 1.0f / std::sqrt(sum(squares) / float(width) + float(eps));
  by_vectors(width, [&](Index i, Index n) { store_some(y + i, value(i, n) * factor * load_some(weight + i, n), n); });
}

}  // namespace cpu
