// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "machine.h"

namespace emu {

enum class Touch { Read, Write, Atomic };

/// Bounds and race check of one lane's LDS access. data: what a Write is about to store.
void touch_lds(Wave& w, const Instruction& in, u32 address, u32 size, const u8* data, Touch touch);

}  // namespace emu
