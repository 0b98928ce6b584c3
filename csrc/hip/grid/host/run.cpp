// SPDX-License-Identifier: Apache-2.0
// The host's stand-in for GPUs. One OS thread runs the blocks of a launch one after the other; the threads of a block are
// fibers. A wave's lanes run until all of them wait at the same collective, which is then executed once; a barrier opens when
// all threads wait at it. A block whose threads wait for a flag stays, and others run beside it. Launches can be queued in
// streams that run beside each other, as those of several GPUs do. Compiled without thread-sanitizer instrumentation: a switch must not look like synchronisation.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <string>
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

// Turns without any progress after which those who wait are told that nobody will come.
constexpr int kPatience = 1000;

enum class State { kReady, kCollective, kBarrier, kOrder, kPaused, kDone };

struct Block;

struct Fiber {
    Thread thread;
    Block* block;
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

// What the launches of a stream take and leave for those after them. Streams share none of it: to the race detector, whoever uses
// a thread or LDS again comes after its former user.
struct Home {
    std::vector<Fiber*> fibers;
    std::vector<Block*> blocks;
    char tag;
    void* sanitizer;  // of nobody's thread, which carries the end of a block to the start of the next
};

// A launch in a stream, with its own copy of the parameters.
struct Queued {
    Launch launch;
    std::string op, params;
    Home* home;
    std::vector<int> order;  // of its blocks
    size_t num_started = 0, num_ended = 0;
};

using Stream = std::deque<Queued>;

// A block that has started. Kept for another one when it has ended.
struct Block {
    Queued* queued;
    std::vector<Fiber*> fibers;
    Place places[64];
    int num_places;
    char* dynamic;
    i64 lds_used, lds_top;
    int barrier_parity;
    char end_tag;
    char barrier_tags[2];
    char wave_tags[kMostThreads / kWave][2];
    char* lds;
};

constexpr i64 kLdsArea = 2 * kLdsBytes;

// All state of the emulated devices. Launches come one at a time: Python holds the interpreter lock.
struct Device {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::unique_ptr<Block>> blocks;
    Home homes[16];
    std::map<int, Stream> queues;
    int queue = -1;
    void* scheduler_stack = nullptr;
    void* scheduler_sanitizer = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    Fiber* running = nullptr;
    bool failed = false;
    char error[512];
    u64 order = 0;
    u64 num_launches = 0;
    char start_tag, end_tag;
    std::vector<int> lane_order, wave_order;
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
    Block& block = *device.running->block;
#if defined(GRID_TSAN)
    // Blocks that run beside each other are ordered by flags alone; one that starts later in a stream comes after those that ended.
    __tsan_acquire(&device.start_tag);
    __tsan_acquire(&block.queued->home->tag);
#endif
    const Launch& launch = block.queued->launch;
    launch.call(launch.kernel, launch.params);
#if defined(GRID_TSAN)
    __tsan_release(&block.end_tag);
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

// The race detector takes memory from a heap for a write by the thread that asked for it.
char* fresh_memory(size_t bytes) {
    return static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

Fiber* take_fiber(Home& home) {
    if (home.fibers.empty()) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack = fresh_memory(kStackBytes + 16 * kStackShift) + (device.fibers.size() % 16) * kStackShift;
        home.fibers.push_back(fiber.get());
        device.fibers.push_back(std::move(fiber));
    }
    Fiber* fiber = home.fibers.back();
    home.fibers.pop_back();
    return fiber;
}

Block* take_block(Home& home) {
    if (home.blocks.empty()) {
        auto block = std::make_unique<Block>();
        block->lds = fresh_memory(kLdsArea);
        home.blocks.push_back(block.get());
        device.blocks.push_back(std::move(block));
    }
    Block* block = home.blocks.back();
    home.blocks.pop_back();
    return block;
}

void prepare(Fiber& fiber, Block& block, const Thread& thread) {
    fiber.thread = thread;
    fiber.block = &block;
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
char* make_lds(Block& block, i64 bytes) {
    constexpr i64 kStrip = 64;
    block.lds_used += bytes;
    if (block.lds_used > kLdsBytes || block.lds_top + bytes + 2 * kStrip > kLdsArea) {
        refuse("expected at most %lld bytes of LDS, got %lld", kLdsBytes, block.lds_used);
        return block.lds;
    }
    char* place = block.lds + block.lds_top;
    i64 size = (bytes + kStrip - 1) / kStrip * kStrip + kStrip;
    block.lds_top += size;
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

std::string name_of(const Block& block) {
    char text[64];
    const int* b = block.fibers[0]->thread.block;
    snprintf(text, sizeof(text), "block (%d, %d, %d)", b[0], b[1], b[2]);
    return text;
}

bool waits_for_wave(const Fiber& fiber) { return fiber.state == State::kCollective || fiber.state == State::kOrder; }

// Runs the wave's collective if all its lanes wait at the same one; false with an error set if they never will.
bool run_collective(Block& block, int first) {
    Fiber* leader = nullptr;
    for (int l = 0; l < kWave; ++l)
        if (waits_for_wave(*block.fibers[first + l])) leader = block.fibers[first + l];
    void* operands[kWave];
    for (int l = 0; l < kWave; ++l) {
        Fiber* own = block.fibers[first + l];
        if (own->state != leader->state) {
            refuse("%s at %s:%d: lane %d of wave %d (thread %d, %s) does not take part", leader->what, leader->site.file, leader->site.line, l, first / kWave,
                   first + l, name_of(block).c_str());
            return false;
        }
        if (own->run != leader->run || own->site.line != leader->site.line || strcmp(own->site.file, leader->site.file) != 0) {
            refuse("lanes of wave %d (%s) meet different collectives: thread %d %s at %s:%d, thread %d %s at %s:%d", first / kWave, name_of(block).c_str(),
                   leader->thread.thread, leader->what, leader->site.file, leader->site.line, own->thread.thread, own->what, own->site.file, own->site.line);
            return false;
        }
        operands[l] = own->operand;
    }
    if (leader->run) leader->run(operands);
    for (int l = 0; l < kWave; ++l) block.fibers[first + l]->state = State::kReady;
    return true;
}

bool release_barrier(Block& block) {
    Fiber* leader = nullptr;
    for (Fiber* fiber : block.fibers)
        if (fiber->state == State::kBarrier) leader = fiber;
    if (!leader) return true;
    for (Fiber* own : block.fibers) {
        if (own->state != State::kBarrier) {
            refuse("sync at %s:%d: thread %d of %s does not arrive; it has ended", leader->site.file, leader->site.line, own->thread.thread, name_of(block).c_str());
            return false;
        }
        if (own->site.line != leader->site.line || strcmp(own->site.file, leader->site.file) != 0) {
            refuse("threads of %s wait at different barriers: thread %d at %s:%d, thread %d at %s:%d", name_of(block).c_str(), leader->thread.thread, leader->site.file,
                   leader->site.line, own->thread.thread, own->site.file, own->site.line);
            return false;
        }
    }
    for (Fiber* fiber : block.fibers) fiber->state = State::kReady;
    block.barrier_parity ^= 1;
    return true;
}

// Lanes in turn until none can go on. Those that wait at a collective while others wait at a barrier are a divergence.
bool run_wave(Block& block, int first, u64& random, bool& moved) {
    for (;;) {
        bool waiting = false, paused = false;
        for (int l : order_of(device.lane_order, kWave, random)) {
            Fiber& fiber = *block.fibers[first + l];
            if (fiber.state != State::kReady) continue;
            to_fiber(fiber);
            if (device.failed) return false;
            moved |= fiber.state != State::kPaused;
        }
        for (int l = 0; l < kWave; ++l) {
            waiting |= waits_for_wave(*block.fibers[first + l]);
            paused |= block.fibers[first + l]->state == State::kPaused;
        }
        if (!waiting || paused) return true;
        if (!run_collective(block, first)) return false;
    }
}

// Runs the block until it has ended, or all that is left of it waits for a flag. moved: whether a thread got anywhere.
enum class Turn { kFailed, kWaits, kEnded };

Turn run_block(Block& block, u64& random, bool& moved) {
    for (Fiber* fiber : block.fibers)
        if (fiber->state == State::kPaused) fiber->state = State::kReady;
    int num_waves = static_cast<int>(block.fibers.size()) / kWave;
    for (;;) {
        for (int w : order_of(device.wave_order, num_waves, random))
            if (!run_wave(block, w * kWave, random, moved)) return Turn::kFailed;
        bool alive = false, paused = false;
        for (Fiber* fiber : block.fibers) {
            alive |= fiber->state != State::kDone;
            paused |= fiber->state == State::kPaused;
        }
        if (!alive) return Turn::kEnded;
        if (paused) return Turn::kWaits;
        if (!release_barrier(block)) return Turn::kFailed;
        moved = true;
    }
}

Block* start_block(Queued& queued) {
    const Launch& launch = queued.launch;
    int b = queued.order[queued.num_started++];
    int x = static_cast<int>(b % launch.blocks.x), rest = static_cast<int>(b / launch.blocks.x);
    int y = static_cast<int>(rest % launch.blocks.y), z = static_cast<int>(rest / launch.blocks.y);
    Block* block = take_block(*queued.home);
    block->queued = &queued;
    block->num_places = 0;
    block->lds_used = block->lds_top = 0;
    block->barrier_parity = 0;
#if defined(GRID_ASAN)
    __asan_unpoison_memory_region(block->lds, kLdsArea);
#endif
    block->dynamic = launch.lds_bytes ? make_lds(*block, launch.lds_bytes) : nullptr;
    block->fibers.clear();
    for (int t = 0; t < launch.threads; ++t) {
        block->fibers.push_back(take_fiber(*queued.home));
        prepare(*block->fibers.back(), *block, {t, {x, y, z}, launch.threads, {}, 0});
    }
    return block;
}

void end_block(Block* block) {
#if defined(GRID_TSAN)
    Home& home = *block->queued->home;
    if (!home.sanitizer) home.sanitizer = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(home.sanitizer, 1);
    __tsan_acquire(&block->end_tag);
    __tsan_release(&home.tag);
    __tsan_switch_to_fiber(device.scheduler_sanitizer, 1);
#endif
    // The first thread of the next block gets the first fiber again: its stack is warm.
    for (auto fiber = block->fibers.rbegin(); fiber != block->fibers.rend(); ++fiber) block->queued->home->fibers.push_back(*fiber);
    block->queued->home->blocks.push_back(block);
    ++block->queued->num_ended;
}

void refuse_to_wait(const Block& block) {
    for (const Fiber* fiber : block.fibers)
        if (fiber->state == State::kPaused)
            return refuse("%s at %s:%d: thread %d of %s waits for a flag that nobody sets", fiber->what, fiber->site.file, fiber->site.line, fiber->thread.thread,
                          name_of(block).c_str());
}

// The launch that comes next in its stream and still has blocks to start, or null.
Queued* next_of(Stream& stream) {
    while (!stream.empty() && stream.front().num_ended == stream.front().order.size()) stream.pop_front();
    return stream.empty() || stream.front().num_started == stream.front().order.size() ? nullptr : &stream.front();
}

// Everything that is queued. In the natural order a block starts only when those before it have ended or wait; else whoever goes
// on, or starts, is drawn at each turn.
bool run_streams(std::vector<Stream>& streams, u64& random, std::string& op) {
#if defined(GRID_TSAN)
    device.scheduler_sanitizer = __tsan_get_current_fiber();
    __tsan_release(&device.start_tag);
#endif
    device.failed = false;
    std::vector<Block*> resident;
    size_t turn = 0;
    for (size_t idle = 0; !device.failed;) {
        std::vector<Queued*> startable;
        for (Stream& stream : streams)
            if (Queued* queued = next_of(stream)) startable.push_back(queued);
        if (resident.empty() && startable.empty()) break;
        bool stuck = idle >= resident.size();
        size_t choice = device.order ? next_random(random) % (resident.size() + startable.size()) : stuck && !startable.empty() ? resident.size() : turn++ % resident.size();
        bool moved = choice >= resident.size();
        if (moved) resident.push_back(start_block(*startable[choice - resident.size()]));
        Block* block = resident[choice = smaller(choice, resident.size() - 1)];
        op = block->queued->op;
        Turn end = device.failed ? Turn::kFailed : run_block(*block, random, moved);
        if (end == Turn::kEnded) {
            end_block(block);
            resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(choice));
        }
        idle = moved ? 0 : idle + 1;
        if (end == Turn::kWaits && startable.empty() && idle > kPatience * resident.size()) refuse_to_wait(*block);
    }
    for (Block* block : resident) end_block(block);
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

Queued queued_launch(const Args& args, const Launch& launch, u64& random) {
    std::string params(static_cast<const char*>(launch.params), static_cast<size_t>(launch.params_bytes));
    Queued queued{launch, args.op, params, &device.homes[(device.queue + 1) % 16], {}};
    std::vector<int> order;
    queued.order = order_of(order, static_cast<int>(launch.blocks.x * launch.blocks.y * launch.blocks.z), random);
    return queued;
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

Thread* current = nullptr;

void collective(Collective run, void* operand, const char* what, Site site) { wait(State::kCollective, run, operand, what, site); }

void wave_order(Site site) {
#if defined(GRID_TSAN)
    Fiber& self = *device.running;
    char* tag = &self.block->wave_tags[self.thread.thread / kWave][self.order_parity ^= 1];
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
    Block& block = *device.running->block;
    char* tag = &block.barrier_tags[block.barrier_parity];
    __tsan_release(tag);
#endif
    wait(State::kBarrier, nullptr, nullptr, "sync", site);
#if defined(GRID_TSAN)
    __tsan_acquire(tag);
#endif
}

void pause(Site site) { wait(State::kPaused, nullptr, nullptr, "wait_for", site); }

void* shared(const void* tag, unsigned long bytes) {
    Block& block = *device.running->block;
    for (int i = 0; i < block.num_places; ++i)
        if (block.places[i].tag == tag) return block.places[i].address;
    char* address = make_lds(block, static_cast<i64>(bytes));
    if (block.num_places == static_cast<int>(sizeof(block.places) / sizeof(Place))) {
        refuse("expected at most 64 arrays in LDS");
    } else {
        block.places[block.num_places++] = {tag, address};
    }
    return address;
}

void* dynamic_shared() { return device.running->block->dynamic; }

float exp(float x) { return std::exp(x); }
float exp2(float x) { return std::exp2(x); }
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
    u64 random = device.order * 7919 + ++device.num_launches;
    Queued queued = queued_launch(args, launch, random);
    if (device.queue >= 0) {
        device.queues[device.queue].push_back(std::move(queued));
        return 0;
    }
    std::vector<Stream> streams(1);
    streams[0].push_back(std::move(queued));
    streams[0].front().launch.params = streams[0].front().params.data();
    std::string op;
    return run_streams(streams, random, op) ? 0 : trouble(args, "%s", device.error);
}

}  // namespace grid::host

extern "C" {

__attribute__((visibility("default"))) int grid_wave_size() { return grid::kWave; }

// 0: threads, waves and blocks in their natural order. Else every launch runs them in another order, which the seed decides.
__attribute__((visibility("default"))) void grid_set_order(unsigned long long seed) {
    grid::host::device.order = seed;
    grid::host::device.num_launches = 0;
    for (auto* order : {&grid::host::device.lane_order, &grid::host::device.wave_order}) order->clear();
}

// Launches that follow wait in this stream until grid_run_queued; -1: they run at once, as at the start.
__attribute__((visibility("default"))) void grid_queue(int stream) { grid::host::device.queue = stream; }

// Runs the streams beside each other, each in its order. Non-zero with a text in `error` if a kernel failed.
__attribute__((visibility("default"))) int grid_run_queued(char* error, int error_size) {
    using namespace grid::host;
    std::vector<Stream> streams;
    for (auto& [number, stream] : device.queues) streams.push_back(std::move(stream));
    device.queues.clear();
    device.queue = -1;
    for (Stream& stream : streams)
        for (Queued& queued : stream) queued.launch.params = queued.params.data();
    grid::u64 random = device.order * 7919 + ++device.num_launches;
    std::string op;
    if (run_streams(streams, random, op)) return 0;
    snprintf(error, static_cast<size_t>(error_size), "%s: %s", op.c_str(), device.error);
    return grid::kTrouble;
}

__attribute__((visibility("default"))) void grid_set_sink(void* sink, void* context) {
    grid::host::sink = reinterpret_cast<grid::host::Sink>(sink);
    grid::host::sink_context = context;
}
}
