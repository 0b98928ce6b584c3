// SPDX-License-Identifier: Apache-2.0
#include "vec.h"

namespace cpu {

template <class T>
void moe_sum(T* out, const T* y, const T* addend, Index tokens, Index parts, Index width, Index addend_stride, double scale) {
  parallel(tokens, 0.3 * tokens * (parts + 1) * width, [&](Index token) {
    by_vectors(width, [&](Index i, Index n) {
      Floats total = {};
      for (Index k = 0; k < parts; ++k) total += load_some(y + (token * parts + k) * width + i, n);
      total *= float(scale);
      if (addend) total += load_some(addend + token * addend_stride + i, n);
      store_some(out + token * width + i, total, n);
    });
  });
}

}  // namespace cpu

EXPORT(moe_sum)
