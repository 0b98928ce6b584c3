// SPDX-License-Identifier: Apache-2.0
// Split: one row at a time. The unrounded sum is kept in fp32 between the two passes.
#include "norm.h"

namespace cpu {

template <class T>
void add_rms_norm(T* y, const T* x, T* residual, const T* weight, Index rows, Index width, Index x_stride, Index residual_stride,
                  double eps) {
  parallel(rows, 0.4 * rows * width, [&](Index row) {
    const T* added = x + row * x_stride;
    T* kept = residual + row * residual_stride;
    float* total = scratch<0>(width + kLanes);
    by_vectors(width, [&](Index i, Index n) {
      const Floats v = load_some(added + i, n) + load_some(kept + i, n);
      store(total + i, v);
      store_some(kept + i, v, n);
    });
    normalise(y + row * width, weight, width, eps, [=](Index i, Index) { return load(total + i); });
  });
}

}  // namespace cpu

EXPORT(add_rms_norm)
