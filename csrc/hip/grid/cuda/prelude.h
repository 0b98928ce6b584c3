// SPDX-License-Identifier: Apache-2.0
// The same kernels on NVIDIA GPUs, for development where no AMD GPU is at hand.
#pragma once

#define GRID_KERNEL(threads) __global__ __launch_bounds__(threads)
#define GRID_DEVICE __device__ __forceinline__
#define GRID_SITE
#define GRID_SITE_AFTER
#define GRID_SITE_ARG
#define GRID_PASS_SITE
#define GRID_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define GRID_DYNAMIC_SHARED(type, name)                     \
    extern __shared__ __align__(16) char grid_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(grid_dynamic_shared)
#define GRID_UNROLL _Pragma("unroll")

namespace grid {

constexpr int kWave = 32;
constexpr bool kOnDevice = true;

GRID_DEVICE int thread_x() { return threadIdx.x; }
GRID_DEVICE int block_x() { return blockIdx.x; }
GRID_DEVICE int block_y() { return blockIdx.y; }
GRID_DEVICE int block_z() { return blockIdx.z; }
GRID_DEVICE int num_threads() { return blockDim.x; }
GRID_DEVICE int lane() { return threadIdx.x % kWave; }
GRID_DEVICE int wave() { return threadIdx.x / kWave; }
GRID_DEVICE int num_waves() { return (blockDim.x + kWave - 1) / kWave; }
GRID_DEVICE void sync() { __syncthreads(); }
GRID_DEVICE void wave_sync() { __syncwarp(); }

template <class T>
GRID_DEVICE T shfl(T value, int source) {
    static_assert(sizeof(T) % 4 == 0, "shfl moves whole 32-bit words");
    int words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    for (int& word : words) word = __shfl_sync(~0u, word, source);
    memcpy(&value, words, sizeof(T));
    return value;
}

template <int kSteps, class T>
GRID_DEVICE T shfl_ring(T value) {
    return shfl(value, (lane() & ~15) | ((lane() - kSteps) & 15));
}

GRID_DEVICE unsigned long long ballot(bool predicate) { return __ballot_sync(~0u, predicate); }

template <class T>
GRID_DEVICE T atomic_add(T* address, T value) {
    return atomicAdd(address, value);
}
template <class T>
GRID_DEVICE T atomic_max(T* address, T value) {
    return atomicMax(address, value);
}

constexpr bool kLoadsToLds = false, kTransposedReads = false;
constexpr int kLdsBanks = 32;
GRID_DEVICE void load_to_lds(const void*, void*) {}
GRID_DEVICE void wait_for_lds() {}

GRID_DEVICE char* in_memory(unsigned long long address) { return reinterpret_cast<char*>(address); }
GRID_DEVICE void publish(unsigned long long* flag, unsigned long long value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
GRID_DEVICE void wait_for(const unsigned long long* flag, unsigned long long least) {
    unsigned long long seen = 0;
    for (;;) {
        asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
        if (seen >= least) return;
        __nanosleep(20);
    }
}

GRID_DEVICE float exp(float x) { return expf(x); }
GRID_DEVICE float exp2(float x) { return exp2f(x); }
GRID_DEVICE float log(float x) { return logf(x); }
GRID_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
GRID_DEVICE float rsqrt(float x) { return rsqrtf(x); }
GRID_DEVICE float fmax(float a, float b) { return fmaxf(a, b); }
GRID_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
GRID_DEVICE int popcount(unsigned long long bits) { return __popcll(bits); }

}  // namespace grid
