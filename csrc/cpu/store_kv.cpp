// SPDX-License-Identifier: Apache-2.0
// Split: one token at a time. q and k are turned where they are read; a row of the cache is written once.
#include "rope.h"

namespace cpu {

template <class T>
void store_kv(const T* k, const T* v, T* k_cache, T* v_cache, const Index* slots, T* q, const Index* positions, const float* table,
              Index tokens, Index kv_heads, Index k_width, Index v_width, Index heads, Index turned, Index k_stride,
              Index v_stride, Index q_stride, Index interleaved) {
  parallel(tokens, 1.0 * tokens * (heads + kv_heads) * (k_width + v_width), [&](Index token) {
    const float* angles = table ? table + positions[token] * turned : nullptr;
    for (Index head = 0; angles && head < heads; ++head) {
      T* row = q + token * q_stride + head * k_width;
      rotate(row, row, angles, turned, k_width, interleaved);
    }
    if (slots[token] < 0) return;
    for (Index head = 0; head < kv_heads; ++head) {
      const T* row = k + token * k_stride + head * k_width;
      rotate(k_cache + (slots[token] * kv_heads + head) * k_width, row, angles, angles ? turned : 0, k_width, interleaved);
    }
    const T* row = v + token * v_stride;
    std::copy(row, row + kv_heads * v_width, v_cache + slots[token] * kv_heads * v_width);
  });
}

}  // namespace cpu

EXPORT(store_kv)
