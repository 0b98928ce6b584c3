// SPDX-License-Identifier: Apache-2.0
// Split: one token at a time; experts are chosen by repeated search, which for 8 of 256 costs less than a sort.
#include "vec.h"

namespace cpu {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// The index of the largest that is not taken, of equals the first; marks it.
inline Index take(const float* choice, std::vector<char>& taken, Index count) {
  Index best = -1;
  for (Index i = 0; i < count; ++i)
    if (!taken[i] && (best < 0 || choice[i] > choice[best])) best = i;
  taken[best] = 1;
  return best;
}

inline void keep_best_groups(float* choice, Index experts, Index groups, Index kept, bool by_two) {
  const Index size = experts / groups;
  std::vector<float> value(groups);
  for (Index g = 0; g < groups; ++g) {
    float first = kLowest, second = kLowest;
    for (Index i = g * size; i < (g + 1) * size; ++i) {
      second = std::max(second, std::min(first, choice[i]));
      first = std::max(first, choice[i]);
    }
    value[g] = by_two && size > 1 ? first + second : first;
  }
  std::vector<char> taken(groups);
  for (Index i = 0; i < kept; ++i) take(value.data(), taken, groups);
  for (Index i = 0; i < experts; ++i)
    if (!taken[i / size]) choice[i] = kLowest;
}

template <class T>
void moe_route(float* weights, int32_t* ids, const T* logits, const float* bias, Index tokens, Index experts, Index stride,
               Index top_k, Index groups, Index top_groups, Index softmax, Index renormalise, double scale, Index shared) {
  parallel(tokens, 10.0 * tokens * experts * top_k, [&](Index token) {
    const Index padded = experts + kLanes;
    float *score = scratch<0>(2 * padded), *choice = score + padded;
    const T* row = logits + token * stride;
    float top = kLowest, total = 0;
    for (Index i = 0; i < experts; ++i) top = std::max(top, widen(row[i]));
    by_vectors(experts, [&](Index i, Index n) {
      const Floats x = load_some(row + i, n);
      store(score + i, softmax ? exp(x - top) : 1.0f / (1.0f + exp(-x)));
    });
    for (Index i = 0; softmax && i < experts; ++i) total += score[i];
    for (Index i = 0; i < experts; ++i) {
      if (softmax) score[i] /= total;
      const float value = bias ? score[i] + bias[i] : widen(row[i]);
      choice[i] = value == value ? value : kLowest;
    }
    if (groups > 1) keep_best_groups(choice, experts, groups, top_groups, bias != nullptr);
    std::vector<char> taken(experts);
    float* weight = weights + token * (top_k + shared);
    int32_t* id = ids + token * (top_k + shared);
    float chosen = 0;
    for (Index i = 0; i < top_k; ++i) {
      id[i] = int32_t(take(choice, taken, experts));
      weight[i] = score[id[i]];
      chosen += weight[i];
    }
    for (Index i = 0; i < top_k; ++i) weight[i] = (renormalise ? weight[i] / (chosen + 1e-20f) : weight[i]) * float(scale);
    for (Index i = 0; i < shared; ++i) {
      weight[top_k + i] = 1;
      id[top_k + i] = int32_t(experts + i);
    }
  });
}

}  // namespace cpu

EXPORT(moe_route)
