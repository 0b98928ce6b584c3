// SPDX-License-Identifier: Apache-2.0
// Split: (block of slots of one expert, 16 columns). Rows are multiplied where they are, nothing is gathered.
// Why: a decode step gives an expert one or two rows; its weight streams past once, as in a dense product.
#include "vec.h"

namespace cpu {

constexpr Index kGroup = 16;

template <class T>
void moe_gemm(T* y, const T* x, const T* w, const int32_t* sorted_slots, const int32_t* block_experts, const float* slot_weights,
              Index blocks, Index block, Index slots, Index slots_per_row, Index columns, Index depth, Index x_stride,
              Index silu_mul) {
  const Index width = silu_mul ? columns / 2 : columns, groups = (width + kGroup - 1) / kGroup;
  parallel(blocks * groups, 0.02 * slots * columns * depth, [&](Index unit) {
    const int32_t *slot = sorted_slots + unit / groups * block, expert = block_experts[unit / groups];
    const Index first = unit % groups * kGroup, stop = std::min(width, first + kGroup);
    Index count = 0;
    while (count < block && slot[count] < slots) ++count;
    if (expert < 0) {
      for (Index i = 0; i < count; ++i) std::fill(y + slot[i] * width + first, y + slot[i] * width + stop, T{});
      return;
    }
    const T* weight = w + expert * columns * depth;
    const auto product = [&](const T* const* row, Index rows, Index n, Index limit, Four* found) {
      const T* column[kTileColumns];
      for (Index j = 0; j < kTileColumns; ++j) column[j] = weight + std::min(n + j, limit - 1) * depth;
      tile(rows, row, column, depth, found);
    };
    for (Index t = 0; t < count; t += kTileRows) {
      const Index rows = std::min<Index>(kTileRows, count - t);
      const T* row[kTileRows];
      for (Index m = 0; m < rows; ++m) row[m] = x + slot[t + m] / slots_per_row * x_stride;
      for (Index n = first; n < stop; n += kTileColumns) {
        Four found[kTileRows], up[kTileRows];
        product(row, rows, n, width, found);
        if (silu_mul) product(row, rows, width + n, columns, up);
        for (Index m = 0; m < rows; ++m)
          for (Index j = 0; j < std::min<Index>(kTileColumns, stop - n); ++j) {
            const float value = silu_mul ? found[m][j] / (1 + std::exp(-found[m][j])) * up[m][j] : found[m][j];
            y[slot[t + m] * width + n + j] = narrow<T>(slot_weights ? value * slot_weights[slot[t + m]] : value);
          }
      }
    }
  });
}

}  // namespace cpu

EXPORT(moe_gemm)
