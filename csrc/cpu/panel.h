// SPDX-License-Identifier: Apache-2.0
// Products with a weight in panels, laid out by `pack` of rocm_infer/ops/gemm_packed.py.
#pragma once

#include "vec.h"

namespace cpu {

// The values of one row that a step multiplies with a panel, in every lane.
inline Operand<float> spread(const float* p, Index) {
  Operand<float> o;
  o.v = splat(*p);
  return o;
}
inline Operand<bf16> spread(const bf16* p, Index left) {
  uint32_t pair = 0;
  if (left > 1)
    std::memcpy(&pair, p, 4);
  else
    std::memcpy(&pair, p, 2);
  Operand<bf16> o;
  o.v = pair - Words{};
  return o;
}

template <class T>
class Panels {
 public:
  Panels(const T* data, Index columns, Index depth)
      : data_(data), columns_(columns), depth_(depth), stride_((depth + kPack - 1) / kPack * kPack * kLanes) {}

  Index size() const { return (columns_ + kLanes - 1) / kLanes * stride_; }
  Index groups() const { return (columns_ + kGroup - 1) / kGroup; }

  // put(m, column, sums, width) for the columns of one group and `rows` rows, 1 to kTileRows.
  template <class Put>
  void multiply(Index group, Index rows, const T* const* row, const Put& put) const {
    multiply_rows<kTileRows>(group, rows, row, put);
  }

 private:
  static constexpr Index kPack = Operand<T>::kStep / kLanes;
  static constexpr Index kGroup = kTileColumns * kLanes;

  template <int M, class Put>
  void multiply_rows(Index group, Index rows, const T* const* row, const Put& put) const {
    if (rows == M)
      tile<M>(group, row, put);
    else if constexpr (M > 1)
      multiply_rows<M - 1>(group, rows, row, put);
  }

  template <int M, class Put>
  void tile(Index group, const T* const* row, const Put& put) const {
    const T *a[M], *b[kTileColumns];
    for (int m = 0; m < M; ++m) a[m] = row[m];
    const Index last = (columns_ - 1) / kLanes;
    for (int n = 0; n < kTileColumns; ++n) b[n] = data_ + std::min(group * kTileColumns + n, last) * stride_;
    Floats total[M][kTileColumns] = {};
    const auto step = [&](Index k, Index left) {
      Operand<T> panel[kTileColumns];
      for (int n = 0; n < kTileColumns; ++n) panel[n] = Operand<T>(b[n] + k * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Operand<T> value = spread(a[m] + k, left);
#pragma GCC unroll 4
        for (int n = 0; n < kTileColumns; ++n) total[m][n] = panel[n].add(total[m][n], value);
      }
    };
    Index k = 0;
    for (; k + kPack <= depth_; k += kPack) step(k, kPack);
    if (k < depth_) step(k, depth_ - k);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < kTileColumns; ++n) {
        const Index column = group * kGroup + n * kLanes;
        if (column < columns_) put(m, column, total[m][n], std::min<Index>(kLanes, columns_ - column));
      }
  }

  const T* data_;
  Index columns_, depth_, stride_;
};

}  // namespace cpu
