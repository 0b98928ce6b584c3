// SPDX-License-Identifier: Apache-2.0
// y = x W^T + b, on weights in panels: kLanes columns side by side, and of each the values that one multiplication takes.
// Split: threads take 4 panels at a time; a tile is up to 6 rows by 4 panels, whose sums fill the registers.
// Why: every load of W is a whole vector from one of 4 running streams, and no sum crosses lanes. A sum has the same order
// whatever the number of rows, so a token does not depend on its neighbours.
#include "panel.h"

namespace cpu {

template <class T>
void gemm_packed(T* y, const T* x, const T* w, const T* bias, Index rows, Index columns, Index depth, Index x_stride) {
  const Panels<T> panels(w, columns, depth);
  parallel(panels.groups(), 0.02 * rows * columns * depth, [&](Index group) {
    by_tiles(rows, [&](Index first, Index count) {
      const T* row[kTileRows];
      for (Index m = 0; m < count; ++m) row[m] = x + (first + m) * x_stride;
      panels.multiply(group, count, row, [&](Index m, Index n, Floats found, Index width) {
        store_some(y + (first + m) * columns + n, bias ? found + load_some(bias + n, width) : found, width);
      });
    });
  });
}

template <class T>
void bmm_packed(T* y, const T* x, const T* w, Index rows, Index heads, Index columns, Index depth, Index x_row, Index x_head) {
  const Index per_head = Panels<T>(w, columns, depth).groups(), size = Panels<T>(w, columns, depth).size();
  parallel(heads * per_head, 0.02 * rows * heads * columns * depth, [&](Index unit) {
    const Index head = unit / per_head;
    const Panels<T> panels(w + head * size, columns, depth);
    by_tiles(rows, [&](Index first, Index count) {
      const T* row[kTileRows];
      for (Index m = 0; m < count; ++m) row[m] = x + (first + m) * x_row + head * x_head;
      panels.multiply(unit % per_head, count, row, [&](Index m, Index n, Floats found, Index width) {
        store_some(y + ((first + m) * heads + head) * columns + n, found, width);
      });
    });
  });
}

}  // namespace cpu

EXPORT(gemm_packed)
EXPORT(bmm_packed)
