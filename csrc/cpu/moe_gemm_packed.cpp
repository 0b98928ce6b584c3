// SPDX-License-Identifier: Apache-2.0
// Split: (block of slots of one expert, 4 panels). Rows are multiplied where they are, nothing is gathered.
// Why: a decode step gives an expert one or two rows; its weight streams past once, as in a dense product. Gate and up of an
// element are in the same lane of two panels, so the activation joins the sums before they are stored.
#include "panel.h"

namespace cpu {

template <class T>
void moe_gemm_packed(T* y, const T* x, const T* w, const int32_t* sorted_slots, const int32_t* block_experts,
                     const float* slot_weights, Index blocks, Index block, Index slots, Index slots_per_row, Index columns,
                     Index depth, Index x_stride, Index silu_mul) {
  const Panels<T> layout(w, columns, depth);
  const Index groups = layout.groups(), size = layout.size();
  parallel(blocks * groups, 0.02 * slots * (1 + silu_mul) * columns * depth, [&](Index unit) {
    const int32_t *slot = sorted_slots + unit / groups * block, expert = block_experts[unit / groups];
    const Index group = unit % groups, first = group * kTileColumns * kLanes;
    const Index width = std::min<Index>(kTileColumns * kLanes, columns - first);
    Index count = 0;
    while (count < block && slot[count] < slots) ++count;
    for (Index i = 0; expert < 0 && i < count; ++i) std::fill_n(y + slot[i] * columns + first, width, T{});
    if (expert < 0) return;
    const T* weight = w + expert * (1 + silu_mul) * size;
    const Panels<T> panels(weight, columns, depth), ups(weight + size, columns, depth);
    by_tiles(count, [&](Index start, Index rows) {
      const T* row[kTileRows];
      for (Index m = 0; m < rows; ++m) row[m] = x + slot[start + m] / slots_per_row * x_stride;
      Floats found[kTileRows][kTileColumns];
      panels.multiply(group, rows, row, [&](Index m, Index n, Floats sums, Index) { found[m][(n - first) / kLanes] = sums; });
      if (silu_mul)
        ups.multiply(group, rows, row, [&](Index m, Index n, Floats sums, Index) {
          Floats& gate = found[m][(n - first) / kLanes];
          gate = silu(gate) * sums;
        });
      for (Index m = 0; m < rows; ++m) {
        const Index s = slot[start + m];
        const float factor = slot_weights ? slot_weights[s] : 1;
        for (Index n = 0; n < width; n += kLanes)
          store_some(y + s * columns + first + n, found[m][n / kLanes] * factor, std::min<Index>(kLanes, width - n));
      }
    });
  });
}

}  // namespace cpu

EXPORT(moe_gemm_packed)
