// SPDX-License-Identifier: Apache-2.0
// SIMT on one CPU thread: every GPU thread is a fiber; wave collectives and barriers are executed by the scheduler in
// host/run.cpp, which turns lanes that miss one, or meet different ones, into an error with file, line, block and thread. A thread
// that waits for a flag lets other blocks go on; when none can, that is an error too.
#pragma once

#ifndef GRID_WAVE
#define GRID_WAVE 64
#endif

#define GRID_KERNEL(threads) __attribute__((noinline, used, visibility("default")))
#define GRID_DEVICE inline
#define GRID_SITE ::grid::host::Site site = ::grid::host::Site::here()
#define GRID_SITE_AFTER , GRID_SITE
#define GRID_SITE_ARG site
#define GRID_PASS_SITE , site
#define GRID_NO_TSAN __attribute__((no_sanitize("thread")))
#define GRID_SHARED(type, name, count)      \
    static const char name##_tag = 0;       \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>(::grid::host::shared(&name##_tag, sizeof(type) * (count)))
#define GRID_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::grid::host::dynamic_shared())
#define GRID_UNROLL

namespace grid {

constexpr int kWave = GRID_WAVE;
constexpr bool kOnDevice = false;

namespace host {

struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Thread {
    int thread, block[3], num_threads;
    // Loads to LDS that have not arrived yet.
    struct {
        const void* from;
        char* to;
    } loads[32];
    int num_loads;
};

extern Thread* current;

// Runs once for the wave: operands[l] points to what lane l handed in.
using Collective = void (*)(void** operands);

void collective(Collective run, void* operand, const char* what, Site site);
void barrier(Site site);
void wave_order(Site site);
void pause(Site site);
void* shared(const void* tag, unsigned long bytes);
void* dynamic_shared();
float exp(float);
float exp2(float);
float log(float);
float sqrt(float);

}  // namespace host

GRID_NO_TSAN inline int thread_x() { return host::current->thread; }
GRID_NO_TSAN inline int block_x() { return host::current->block[0]; }
GRID_NO_TSAN inline int block_y() { return host::current->block[1]; }
GRID_NO_TSAN inline int block_z() { return host::current->block[2]; }
GRID_NO_TSAN inline int num_threads() { return host::current->num_threads; }
inline int lane() { return thread_x() % kWave; }
inline int wave() { return thread_x() / kWave; }
inline int num_waves() { return (num_threads() + kWave - 1) / kWave; }

inline void sync(GRID_SITE) { host::barrier(site); }
inline void wave_sync(GRID_SITE) { host::wave_order(site); }

template <class T>
struct Shuffle {
    T value;
    int source;
    T result;
    GRID_NO_TSAN static void run(void** lanes) {
        for (int l = 0; l < kWave; ++l) {
            Shuffle& own = *static_cast<Shuffle*>(lanes[l]);
            own.result = static_cast<Shuffle*>(lanes[own.source & (kWave - 1)])->value;
        }
    }
};

template <class T>
inline T shfl(T value, int source GRID_SITE_AFTER) {
    Shuffle<T> operand{value, source, {}};
    host::collective(&Shuffle<T>::run, &operand, "shfl", site);
    return operand.result;
}

template <int kSteps, class T>
inline T shfl_ring(T value GRID_SITE_AFTER) {
    return shfl(value, (lane() & ~15) | ((lane() - kSteps) & 15) GRID_PASS_SITE);
}

struct Ballot {
    bool predicate;
    unsigned long long result;
    GRID_NO_TSAN static void run(void** lanes) {
        unsigned long long bits = 0;
        for (int l = 0; l < kWave; ++l) bits |= static_cast<unsigned long long>(static_cast<Ballot*>(lanes[l])->predicate) << l;
        for (int l = 0; l < kWave; ++l) static_cast<Ballot*>(lanes[l])->result = bits;
    }
};

inline unsigned long long ballot(bool predicate GRID_SITE_AFTER) {
    Ballot operand{predicate, 0};
    host::collective(&Ballot::run, &operand, "ballot", site);
    return operand.result;
}

// One fiber runs at a time, so these are only marked atomic for the race detector.
template <class T>
inline T atomic_add(T* address, T value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
inline T atomic_max(T* address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    if (old < value) __atomic_store_n(address, value, __ATOMIC_RELAXED);
    return old;
}

// Waves of 64 have loads to LDS, as on gfx950; what they bring arrives when it is waited for, not before.
constexpr bool kLoadsToLds = kWave == 64, kTransposedReads = false;
constexpr int kLdsBanks = 32;
inline void load_to_lds(const void* from, void* to) {
    if (host::current->num_loads == 32) __builtin_trap();  // more than any kernel here keeps in flight
    host::current->loads[host::current->num_loads++] = {from, static_cast<char*>(to) + 16 * lane()};
}
inline void wait_for_lds() {
    for (int i = 0; i < host::current->num_loads; ++i) __builtin_memcpy(host::current->loads[i].to, host::current->loads[i].from, 16);
    host::current->num_loads = 0;
}

inline char* in_memory(unsigned long long address) { return reinterpret_cast<char*>(address); }
inline void publish(unsigned long long* flag, unsigned long long value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline void wait_for(const unsigned long long* flag, unsigned long long least GRID_SITE_AFTER) {
    while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) < least) host::pause(site);
}

inline float exp(float x) { return host::exp(x); }
inline float exp2(float x) { return host::exp2(x); }
inline float log(float x) { return host::log(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float rsqrt(float x) { return 1.0f / host::sqrt(x); }
inline float fmax(float a, float b) { return a < b || a != a ? b : a; }
inline float fma(float a, float b, float c) { return a * b + c; }
inline int popcount(unsigned long long bits) { return __builtin_popcountll(bits); }

}  // namespace grid
