// SPDX-License-Identifier: Apache-2.0
// Ranking numbers with their ids as integers, so that a maximum also settles ties.
#pragma once

#include "grid/abi.h"

namespace grid {

// Orders like the number; 0 stays below every number but NaN.
GRID_DEVICE u32 rank_order(float value) {
    u32 bits = bits_of<u32>(value + 0.0f);  // -0 becomes 0
    return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

GRID_DEVICE float order_value(u32 order) { return bits_of<float>(order & 0x80000000u ? order & 0x7FFFFFFFu : ~order); }

// Orders by the number, of equal ones by the lowest id. No number gives 0.
GRID_DEVICE u64 rank_key(float value, int id) { return static_cast<u64>(rank_order(value)) << 32 | (0xFFFFFFFFu - static_cast<u32>(id)); }

GRID_DEVICE int key_id(u64 key) { return static_cast<int>(0xFFFFFFFFu - static_cast<u32>(key)); }

GRID_DEVICE float key_value(u64 key) { return order_value(static_cast<u32>(key >> 32)); }

}  // namespace grid
