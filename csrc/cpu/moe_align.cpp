// SPDX-License-Identifier: Apache-2.0
// A counting sort.
#include "vec.h"

namespace cpu {

inline void moe_align(int32_t* sorted_slots, int32_t* block_experts, int32_t* num_padded, const int32_t* ids, Index slots,
                      Index experts, Index block, Index capacity) {
  std::vector<Index> next(experts + 2);
  const auto owner = [&](Index slot) { return ids[slot] >= 0 && ids[slot] < experts ? Index(ids[slot]) : experts; };
  for (Index slot = 0; slot < slots; ++slot) ++next[owner(slot) + 1];
  std::fill(sorted_slots, sorted_slots + capacity * block, int32_t(slots));
  std::fill(block_experts, block_experts + capacity, -1);
  for (Index expert = 0; expert <= experts; ++expert) {
    const Index blocks = (next[expert + 1] + block - 1) / block;
    if (expert < experts) std::fill_n(block_experts + next[expert] / block, blocks, int32_t(expert));
    next[expert + 1] = next[expert] + blocks * block;
  }
  *num_padded = int32_t(next[experts + 1]);
  for (Index slot = 0; slot < slots; ++slot) sorted_slots[next[owner(slot)]++] = int32_t(slot);
}

}  // namespace cpu

EXPORT_AS(moe_align_i32, cpu::moe_align)
