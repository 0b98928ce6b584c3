// SPDX-License-Identifier: Apache-2.0
#include "vec.h"

namespace cpu {

template <class T>
void silu_mul(T* y, const T* x, Index rows, Index width, Index x_stride) {
  parallel(rows, 1.0 * rows * width, [&](Index row) {
    const T *gate = x + row * x_stride, *up = gate + width;
    by_vectors(width, [&](Index i, Index n) { store_some(y + row * width + i, silu(load_some(gate + i, n)) * load_some(up + i, n), n); });
  });
}

}  // namespace cpu

EXPORT(silu_mul)
