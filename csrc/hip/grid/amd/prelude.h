// SPDX-License-Identifier: Apache-2.0
// What kernels need of HIP, for a clang that has AMDGPU and no ROCm file at all. With GRID_USE_ROCM_HEADERS the same sources
// compile against the real hip_runtime.h instead.
#pragma once

#ifdef GRID_USE_ROCM_HEADERS
#include <hip/hip_runtime.h>
#else
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#endif

// The second number is waves per SIMD at least: 1 leaves the whole register file to the kernel.
#define GRID_KERNEL(threads) \
    __global__ __attribute__((amdgpu_flat_work_group_size(1, threads), visibility("protected")))
#define GRID_DEVICE __device__ inline __attribute__((always_inline))
#define GRID_SITE
#define GRID_SITE_AFTER
#define GRID_PASS_SITE
#define GRID_SITE_ARG
#define GRID_SHARED(type, name, count) __shared__ __attribute__((aligned(16))) type name[count]
#define GRID_DYNAMIC_SHARED(type, name)                                         \
    extern __shared__ __attribute__((aligned(16))) char grid_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(grid_dynamic_shared)
#define GRID_UNROLL _Pragma("unroll")

namespace grid {

#if defined(__GFX9__)
constexpr int kWave = 64;
#else
constexpr int kWave = 32;
#endif
constexpr bool kOnDevice = true;

GRID_DEVICE int thread_x() { return __builtin_amdgcn_workitem_id_x(); }
GRID_DEVICE int block_x() { return __builtin_amdgcn_workgroup_id_x(); }
GRID_DEVICE int block_y() { return __builtin_amdgcn_workgroup_id_y(); }
GRID_DEVICE int block_z() { return __builtin_amdgcn_workgroup_id_z(); }
GRID_DEVICE int num_threads() { return __builtin_amdgcn_workgroup_size_x(); }
GRID_DEVICE int lane() { return __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u)) & (kWave - 1); }
// Blocks are one-dimensional, so a wave's number is the same in all its lanes: say so, and addresses become scalar.
GRID_DEVICE int wave() { return __builtin_amdgcn_readfirstlane(thread_x() / kWave); }
GRID_DEVICE int num_waves() { return (num_threads() + kWave - 1) / kWave; }

GRID_DEVICE void sync() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// LDS accesses of one wave happen in program order; only the compiler has to be held back.
GRID_DEVICE void wave_sync() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

template <class T>
GRID_DEVICE T shfl(T value, int source) {
    static_assert(sizeof(T) % 4 == 0, "shfl moves whole 32-bit words");
    int words[sizeof(T) / 4];
    __builtin_memcpy(words, &value, sizeof(T));
    for (int& word : words) word = __builtin_amdgcn_ds_bpermute(source * 4, word);
    __builtin_memcpy(&value, words, sizeof(T));
    return value;
}

// From the lane `kSteps` places before in the ring of 16 neighbouring lanes: one instruction per word, not through LDS.
template <int kSteps, class T>
GRID_DEVICE T shfl_ring(T value) {
    static_assert(sizeof(T) % 4 == 0, "shfl_ring moves whole 32-bit words");
    int words[sizeof(T) / 4];
    __builtin_memcpy(words, &value, sizeof(T));
    for (int& word : words) word = __builtin_amdgcn_mov_dpp(word, 0x120 + kSteps, 0xF, 0xF, true);  // row_ror
    __builtin_memcpy(&value, words, sizeof(T));
    return value;
}

GRID_DEVICE unsigned long long ballot(bool predicate) {
#if defined(__GFX9__)
    return __builtin_amdgcn_ballot_w64(predicate);
#else
    return __builtin_amdgcn_ballot_w32(predicate);
#endif
}

template <class T>
GRID_DEVICE T atomic_add(T* address, T value) {
    return __hip_atomic_fetch_add(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
template <class T>
GRID_DEVICE T atomic_max(T* address, T value) {
    return __hip_atomic_fetch_max(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

// 16 bytes per lane from memory to LDS, past the registers: lane l's bytes land at `to` + 16 * l. They are there after
// wait_for_lds(), for the wave that asked.
#if defined(__gfx950__)
constexpr bool kLoadsToLds = true, kTransposedReads = true;
constexpr int kLdsBanks = 64;
GRID_DEVICE void load_to_lds(const void* from, void* to) {
    __builtin_amdgcn_global_load_lds((__attribute__((address_space(1))) void*)from, (__attribute__((address_space(3))) void*)to, 16, 0, 0);
}
#else
constexpr bool kLoadsToLds = false, kTransposedReads = false;
constexpr int kLdsBanks = 32;
GRID_DEVICE void load_to_lds(const void*, void*) {}
#endif
GRID_DEVICE void wait_for_lds() { __builtin_amdgcn_s_waitcnt(0x0F70); }  // vmcnt(0)

// An address that was read as a number, told to be of device memory: as a generic one it would be accessed by flat instructions.
GRID_DEVICE char* in_memory(unsigned long long address) { return (char*)(__attribute__((address_space(1))) char*)address; }

// Release and acquire write back and invalidate what caches hold of other GPUs' memory, so that only the flag itself is polled.
GRID_DEVICE void publish(unsigned long long* flag, unsigned long long value) {
    __hip_atomic_store(flag, value, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_SYSTEM);
}
GRID_DEVICE void wait_for(const unsigned long long* flag, unsigned long long least) {
    while (__hip_atomic_load(flag, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM) < least) __builtin_amdgcn_s_sleep(1);
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "");
}

GRID_DEVICE float exp(float x) { return __builtin_expf(x); }
GRID_DEVICE float exp2(float x) { return __builtin_amdgcn_exp2f(x); }
GRID_DEVICE float log(float x) { return __builtin_logf(x); }
GRID_DEVICE float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }
GRID_DEVICE float rsqrt(float x) { return __builtin_amdgcn_rsqf(x); }
GRID_DEVICE float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
GRID_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GRID_DEVICE int popcount(unsigned long long bits) { return __builtin_popcountll(bits); }

}  // namespace grid
