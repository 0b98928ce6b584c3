// SPDX-License-Identifier: Apache-2.0
// All that a kernel may use, on every target. A kernel file includes this (and mma.h for matrix tiles) and nothing else.
//
//   GRID_KERNEL(threads) void name(const Params p)   a kernel; at most `threads` per block; one struct as its only parameter
//   GRID_DEVICE                                      a function that kernels call
//   thread_x() num_threads() block_x() block_y() block_z()
//   kWave lane() wave() num_waves()                  kWave is 64 on gfx9, 32 on RDNA and CUDA: never write either number
//   sync() wave_sync()                               barrier of the block; order of LDS accesses within one wave
//   shfl(value, lane) ballot(predicate)              all lanes of the wave must take part
//   shfl_ring<steps>(value)                          the same, in a ring of 16 neighbouring lanes, cheaper
//   GRID_SHARED(type, name, count)                   an array in LDS; GRID_DYNAMIC_SHARED(type, name): the launch's `lds_bytes`
//   atomic_add, atomic_max                           on LDS or memory, integers only: float atomics would not reproduce
//   load_to_lds(from, to) wait_for_lds()             16 bytes per lane past the registers, where kLoadsToLds
//   publish(flag, value) wait_for(flag, least)       order between blocks, launches and GPUs: what was stored before publish is seen
//                                                    after a wait_for that it ended; in_memory(address): a pointer that came as a number
//
// Collectives under divergence are refused on the host, because CUDA and hardware barriers leave them undefined.
#pragma once

#if defined(__HIP__) || defined(__HIPCC__)
#include "amd/prelude.h"
#elif defined(__CUDACC__)
#include "cuda/prelude.h"
#else
#include "host/prelude.h"
#endif

#include "types.h"

#include "wave.h"
