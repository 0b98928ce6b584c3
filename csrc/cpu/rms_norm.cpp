// SPDX-License-Identifier: Apache-2.0
// Split: one row at a time, by vectors; the sum of squares is held in the lanes of one vector.
#include "norm.h"

namespace cpu {

template <class T>
void rms_norm(T* y, const T* x, const T* weight, Index rows, Index width, Index x_stride, double eps) {
  parallel(rows, 0.3 * rows * width, [&](Index row) {
    const T* values = x + row * x_stride;
    normalise(y + row * width, weight, width, eps, [=](Index i, Index n) { return load_some(values + i, n); });
  });
}

}  // namespace cpu

EXPORT(rms_norm)
