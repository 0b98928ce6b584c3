// SPDX-License-Identifier: Apache-2.0
// The host's stand-in for a GPU. One OS thread runs the blocks of a launch one after the other; the threads of a block are
// fibers. A wave's lanes run until all of them wait at the same collective, which is then executed once; a barrier opens when
// all threads wait at it. Compiled without thread-sanitizer instrumentation: a switch must not look like synchronisation.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <vector>

#include "../abi.h"

#if defined(GRID_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#elif defined(GRID_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Callee-saved registers on the stack, stack pointers exchanged: 10 instructions instead of swapcontext's system call.
asm(R"(
.text
.p2align 4
.type grid_switch, @function
.hidden grid_switch
.globl grid_switch
grid_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size grid_switch, .-grid_switch
)");
constexpr int kSavedWords = 6;
constexpr int kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.type grid_switch, %function
.hidden grid_switch
.globl grid_switch
grid_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size grid_switch, .-grid_switch
)");
constexpr int kSavedWords = 20;
constexpr int kReturnWord = 11;
#else
#error "host build: expected x86-64 or aarch64; the fiber switch is written for these two"
#endif

extern "C" void grid_switch(void** save_here, void* resume);

namespace grid::host {
namespace {

constexpr int kMostThreads = 1024;
constexpr i64 kLdsBytes = 64 * 1024;  // of gfx942, the smallest
#if defined(GRID_ASAN) || defined(GRID_TSAN)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
// Stacks a power of two apart would all share the same cache sets.
constexpr size_t kStackShift = 192;

enum class State { kReady, kCollective, kBarrier, kOrder, kDone };

struct Fiber {
    Thread thread;
    void* stack_pointer;
    char* stack;
    State state;
    Collective run;
    void* operand;
    const char* what;
    Site site;
    void* sanitizer;
    int order_parity;
};

struct Place {
    const void* tag;
    char* address;
};

struct Block {
    const Launch* launch;
    Place places[64];
    int num_places;
    char* dynamic;
    i64 lds_used;
};

// All state of the emulated device. Launches come one at a time: Python holds the interpreter lock.
struct Device {
    std::vector<Fiber> fibers;
    void* scheduler_stack = nullptr;
    void* scheduler_sanitizer = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    Fiber* running = nullptr;
    Block block;
    bool failed = false;
    char error[512];
    u64 order = 0;
    u64 num_launches = 0;
    char barrier_tags[2];
    int barrier_parity = 0;
    char wave_tags[kMostThreads / kWave][2];
    char start_tag, end_tag;
    // No heap: to the race detector an allocation is a write by the thread that asked for it.
    alignas(64) char lds[2 * kLdsBytes];
    i64 lds_top;
    std::vector<int> lane_order, wave_order, block_order;
    std::map<const void*, const char*> names;
};

Device device;

void refuse(const char* format, ...) {
    if (device.failed) return;
    device.failed = true;
    va_list values;
    va_start(values, format);
    vsnprintf(device.error, sizeof(device.error), format, values);
    va_end(values);
}

void to_scheduler(bool last = false) {
    Fiber& self = *device.running;
#if defined(GRID_TSAN)
    __tsan_switch_to_fiber(device.scheduler_sanitizer, 1);
#elif defined(GRID_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, device.scheduler_bottom, device.scheduler_size);
#endif
    grid_switch(&self.stack_pointer, device.scheduler_stack);
#if defined(GRID_ASAN)
    __sanitizer_finish_switch_fiber(fake, &device.scheduler_bottom, &device.scheduler_size);
#endif
    (void)last;
}

void fiber_main() {
#if defined(GRID_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &device.scheduler_bottom, &device.scheduler_size);
#endif
#if defined(GRID_TSAN)
    __tsan_acquire(&device.start_tag);
#endif
    const Launch& launch = *device.block.launch;
    launch.call(launch.kernel, launch.params);
#if defined(GRID_TSAN)
    __tsan_release(&device.end_tag);
#endif
    device.running->state = State::kDone;
    to_scheduler(true);
    __builtin_unreachable();
}

void to_fiber(Fiber& fiber) {
    device.running = &fiber;
    current = &fiber.thread;
#if defined(GRID_TSAN)
    __tsan_switch_to_fiber(fiber.sanitizer, 1);
#elif defined(GRID_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
    grid_switch(&device.scheduler_stack, fiber.stack_pointer);
#if defined(GRID_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void make_fibers() {
    if (!device.fibers.empty()) return;
    device.fibers.resize(kMostThreads);
    for (int i = 0; i < kMostThreads; ++i) {
        void* memory = mmap(nullptr, kStackBytes + 16 * kStackShift, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        device.fibers[i].stack = static_cast<char*>(memory) + (i % 16) * kStackShift;
    }
}

void prepare(Fiber& fiber, const Thread& thread) {
    fiber.thread = thread;
    fiber.state = State::kReady;
    fiber.order_parity = 0;
#if defined(GRID_TSAN)
    if (!fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);
#elif defined(GRID_ASAN)
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
    top = reinterpret_cast<void**>(reinterpret_cast<u64>(top) & ~63ull);
#if defined(__x86_64__)
    top -= 1;  // the stack pointer is 8 beside a multiple of 16 when a function starts
    void** frame = top - (kSavedWords + 1);
#else
    void** frame = top - kSavedWords;
#endif
    memset(static_cast<void*>(frame), 0, kSavedWords * sizeof(void*));
    frame[kReturnWord] = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = frame;
}

// LDS starts as NaN, so reading before writing shows; under ASan it ends in a poisoned strip.
char* make_lds(i64 bytes) {
    constexpr i64 kStrip = 64;
    device.block.lds_used += bytes;
    if (device.block.lds_used > kLdsBytes || device.lds_top + bytes + 2 * kStrip > static_cast<i64>(sizeof(device.lds))) {
        refuse("expected at most %lld bytes of LDS, got %lld", kLdsBytes, device.block.lds_used);
        return device.lds;
    }
    char* place = device.lds + device.lds_top;
    i64 size = (bytes + kStrip - 1) / kStrip * kStrip + kStrip;
    device.lds_top += size;
    volatile char* plain = place;
    for (i64 i = 0; i < bytes; ++i) plain[i] = static_cast<char>(0xFF);
#if defined(GRID_ASAN)
    __asan_poison_memory_region(place + bytes, size - bytes);
#endif
    return place;
}

u64 next_random(u64& state) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return state >> 33;
}

// 0, 1, 2, ... or a permutation that the seed decides; `order` is the caller's buffer.
const std::vector<int>& order_of(std::vector<int>& order, int count, u64& state) {
    if (device.order || static_cast<int>(order.size()) != count) {
        order.resize(count);
        std::iota(order.begin(), order.end(), 0);
    }
    if (device.order)
        for (int i = count - 1; i > 0; --i) std::swap(order[i], order[next_random(state) % (i + 1)]);
    return order;
}

void describe_block(char* text, size_t size) {
    const int* b = device.fibers[0].thread.block;
    snprintf(text, size, "block (%d, %d, %d)", b[0], b[1], b[2]);
}

// Runs the wave's collective if all its lanes wait at the same one; false with an error set if they never will.
bool run_collective(int first, int count) {
    char where[64];
    describe_block(where, sizeof(where));
    Fiber* leader = nullptr;
    for (int l = 0; l < count; ++l)
        if (device.fibers[first + l].state == State::kCollective || device.fibers[first + l].state == State::kOrder) leader = &device.fibers[first + l];
    void* operands[kWave];
    for (int l = 0; l < kWave; ++l) {
        Fiber* own = l < count ? &device.fibers[first + l] : nullptr;
        if (!own || own->state != leader->state) {
            refuse("%s at %s:%d: lane %d of wave %d (thread %d, %s) does not take part", leader->what, leader->site.file, leader->site.line, l, first / kWave,
                   first + l, where);
            return false;
        }
        if (own->run != leader->run || own->site.line != leader->site.line || strcmp(own->site.file, leader->site.file) != 0) {
            refuse("lanes of wave %d (%s) meet different collectives: thread %d %s at %s:%d, thread %d %s at %s:%d", first / kWave, where, leader->thread.thread,
                   leader->what, leader->site.file, leader->site.line, own->thread.thread, own->what, own->site.file, own->site.line);
            return false;
        }
        operands[l] = own->operand;
    }
    if (leader->run) leader->run(operands);
    for (int l = 0; l < count; ++l) device.fibers[first + l].state = State::kReady;
    return true;
}

bool release_barrier(int num_threads) {
    char where[64];
    describe_block(where, sizeof(where));
    Fiber* leader = nullptr;
    for (int t = 0; t < num_threads; ++t)
        if (device.fibers[t].state == State::kBarrier) leader = &device.fibers[t];
    if (!leader) return true;
    for (int t = 0; t < num_threads; ++t) {
        Fiber& own = device.fibers[t];
        if (own.state != State::kBarrier) {
            refuse("sync at %s:%d: thread %d of %s does not arrive; it has ended", leader->site.file, leader->site.line, t, where);
            return false;
        }
        if (own.site.line != leader->site.line || strcmp(own.site.file, leader->site.file) != 0) {
            refuse("threads of %s wait at different barriers: thread %d at %s:%d, thread %d at %s:%d", where, leader->thread.thread, leader->site.file,
                   leader->site.line, t, own.site.file, own.site.line);
            return false;
        }
    }
    for (int t = 0; t < num_threads; ++t) device.fibers[t].state = State::kReady;
    device.barrier_parity ^= 1;
    return true;
}

// Lanes in turn until none can go on. Those that wait at a collective while others wait at a barrier are a divergence.
bool run_wave(int first, int count, u64& random) {
    for (;;) {
        bool waiting = false;
        for (int l : order_of(device.lane_order, count, random))
            if (device.fibers[first + l].state == State::kReady) {
                to_fiber(device.fibers[first + l]);
                if (device.failed) return false;
            }
        for (int l = 0; l < count; ++l) waiting |= device.fibers[first + l].state == State::kCollective || device.fibers[first + l].state == State::kOrder;
        if (!waiting) return true;
        if (!run_collective(first, count)) return false;
    }
}

bool run_block(const Launch& launch, const int (&index)[3], u64& random) {
    device.block.launch = &launch;
    device.block.num_places = 0;
    device.block.lds_used = 0;
    device.lds_top = 0;
#if defined(GRID_ASAN)
    __asan_unpoison_memory_region(device.lds, sizeof(device.lds));
#endif
    device.barrier_parity = 0;
    device.block.dynamic = launch.lds_bytes ? make_lds(launch.lds_bytes) : nullptr;
    for (int t = 0; t < launch.threads; ++t) prepare(device.fibers[t], {t, {index[0], index[1], index[2]}, launch.threads});
#if defined(GRID_TSAN)
    device.scheduler_sanitizer = __tsan_get_current_fiber();
    __tsan_release(&device.start_tag);
#endif
    int num_waves = launch.threads / kWave;
    bool alive = true;
    while (alive && !device.failed) {
        for (int w : order_of(device.wave_order, num_waves, random))
            if (!run_wave(w * kWave, kWave, random)) break;
        if (device.failed) break;
        alive = false;
        for (int t = 0; t < launch.threads; ++t) alive |= device.fibers[t].state != State::kDone;
        if (alive && !release_barrier(launch.threads)) break;
    }
#if defined(GRID_TSAN)
    __tsan_acquire(&device.end_tag);
#endif
    return !device.failed;
}

void wait(State state, Collective run, void* operand, const char* what, Site site) {
    Fiber& self = *device.running;
    self.state = state;
    self.run = run;
    self.operand = operand;
    self.what = what;
    self.site = site;
    to_scheduler();
}

// Where launches go instead of the fibers, if anywhere: a real GPU, or a list.
using Sink = int (*)(void* context, const Args* args, const char* kernel, const Launch* launch);
Sink sink = nullptr;
void* sink_context = nullptr;

// The kernel's mangled name is the same here and in the code object.
const char* symbol_of(const void* kernel) {
    auto found = device.names.find(kernel);
    if (found != device.names.end()) return found->second;
    Dl_info info;
    const char* name = dladdr(kernel, &info) && info.dli_saddr == kernel ? info.dli_sname : nullptr;
    return device.names[kernel] = name;
}

}  // namespace

const Thread* current = nullptr;

void collective(Collective run, void* operand, const char* what, Site site) { wait(State::kCollective, run, operand, what, site); }

void wave_order(Site site) {
#if defined(GRID_TSAN)
    Fiber& self = *device.running;
    char* tag = &device.wave_tags[self.thread.thread / kWave][self.order_parity ^= 1];
    __tsan_release(tag);
#endif
    wait(State::kOrder, nullptr, nullptr, "wave_sync", site);
#if defined(GRID_TSAN)
    __tsan_acquire(tag);
#endif
}

void barrier(Site site) {
#if defined(GRID_TSAN)
    // Two tags in turn: with one, the next barrier's release would hide a race across this one.
    char* tag = &device.barrier_tags[device.barrier_parity];
    __tsan_release(tag);
#endif
    wait(State::kBarrier, nullptr, nullptr, "sync", site);
#if defined(GRID_TSAN)
    __tsan_acquire(tag);
#endif
}

void* shared(const void* tag, unsigned long bytes) {
    Block& block = device.block;
    for (int i = 0; i < block.num_places; ++i)
        if (block.places[i].tag == tag) return block.places[i].address;
    char* address = make_lds(static_cast<i64>(bytes));
    if (block.num_places == static_cast<int>(sizeof(block.places) / sizeof(Place))) {
        refuse("expected at most 64 arrays in LDS");
    } else {
        block.places[block.num_places++] = {tag, address};
    }
    return address;
}

void* dynamic_shared() { return device.block.dynamic; }

float exp(float x) { return std::exp(x); }
float log(float x) { return std::log(x); }
float sqrt(float x) { return std::sqrt(x); }

int launch(const Args& args, const Launch& launch) {
    if (launch.blocks.x * launch.blocks.y * launch.blocks.z == 0) return 0;
    if (sink) {
        const char* name = symbol_of(launch.kernel);
        if (!name) return trouble(args, "the kernel's symbol is not exported by this library");
        return sink(sink_context, &args, name, &launch);
    }
    if (launch.threads % kWave || launch.threads > kMostThreads)
        return fail(args, "expected whole waves of %d and at most %d threads per block, got %d", kWave, kMostThreads, launch.threads);
    make_fibers();
    device.failed = false;
    u64 random = device.order * 7919 + ++device.num_launches;
    int num_blocks = static_cast<int>(launch.blocks.x * launch.blocks.y * launch.blocks.z);
    for (int b : order_of(device.block_order, num_blocks, random)) {
        int x = static_cast<int>(b % launch.blocks.x), rest = static_cast<int>(b / launch.blocks.x);
        int y = static_cast<int>(rest % launch.blocks.y), z = static_cast<int>(rest / launch.blocks.y);
        if (!run_block(launch, {x, y, z}, random)) return trouble(args, "%s", device.error);
    }
    return 0;
}

}  // namespace grid::host

extern "C" {

__attribute__((visibility("default"))) int grid_wave_size() { return grid::kWave; }

// 0: threads, waves and blocks in their natural order. Else every launch runs them in another order, which the seed decides.
__attribute__((visibility("default"))) void grid_set_order(unsigned long long seed) {
    grid::host::device.order = seed;
    grid::host::device.num_launches = 0;
    for (auto* order : {&grid::host::device.lane_order, &grid::host::device.wave_order, &grid::host::device.block_order}) order->clear();
}

__attribute__((visibility("default"))) void grid_set_sink(void* sink, void* context) {
    grid::host::sink = reinterpret_cast<grid::host::Sink>(sink);
    grid::host::sink_context = context;
}
}
