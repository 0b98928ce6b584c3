// SPDX-License-Identifier: Apache-2.0
// What the loader sets and asks.
#include "vec.h"

namespace cpu {
Threads threads{};
}

extern "C" {
__attribute__((visibility("default"))) void use_threads(void (*run)(void (*)(void*), void*, unsigned, unsigned), int (*count)()) {
  cpu::threads = {run, count};
}
__attribute__((visibility("default"))) int lanes() { return cpu::kLanes; }
}
