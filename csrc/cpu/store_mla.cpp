// SPDX-License-Identifier: Apache-2.0
// Split: one token at a time.
#include "rope.h"

namespace cpu {

template <class T>
void store_mla(const T* c, const T* k_pe, T* cache, const Index* slots, T* q_pe, const Index* positions, const float* table,
               Index tokens, Index latent, Index turned, Index heads, Index c_stride, Index k_stride, Index q_stride,
               Index q_head_stride, Index interleaved) {
  parallel(tokens, 1.0 * tokens * (latent + turned * (heads + 1)), [&](Index token) {
    const float* angles = table ? table + positions[token] * turned : nullptr;
    for (Index head = 0; angles && head < heads; ++head) {
      T* row = q_pe + token * q_stride + head * q_head_stride;
      rotate(row, row, angles, turned, turned, interleaved);
    }
    if (slots[token] < 0) return;
    T* row = cache + slots[token] * (latent + turned);
    std::copy(c + token * c_stride, c + token * c_stride + latent, row);
    rotate(row + latent, k_pe + token * k_stride, angles, angles ? turned : 0, turned, interleaved);
  });
}

}  // namespace cpu

EXPORT(store_mla)
