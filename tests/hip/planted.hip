// SPDX-License-Identifier: Apache-2.0
// Small kernels with one mistake each, to see that the host build and its sanitizers find them. x and y hold one float per thread.
#include "grid/abi.h"

using namespace grid;

struct PlantedParams {
    const float* x;
    float* y;
    int wrong;
};

// Reverses the block through LDS. The mistake: no barrier between writing and reading.
GRID_KERNEL(256) void missing_barrier_kernel(const PlantedParams p) {
    GRID_SHARED(float, tile, 256);
    tile[thread_x()] = p.x[thread_x()];
    if (!p.wrong) sync();
    p.y[thread_x()] = tile[num_threads() - 1 - thread_x()];
}

// Two reductions that share an array. The mistake: no barrier between reading the first and writing the second.
GRID_KERNEL(256) void reused_array_kernel(const PlantedParams p) {
    GRID_SHARED(float, parts, kMaxWaves);
    float sum = block_sum(p.x[thread_x()], parts);
    if (!p.wrong) sync();
    p.y[thread_x()] = sum + block_sum(2.0f * p.x[thread_x()], parts);
}

// The mistake: one element too far in LDS.
GRID_KERNEL(256) void lds_overrun_kernel(const PlantedParams p) {
    GRID_SHARED(float, tile, 64);
    if (thread_x() < 64) tile[thread_x() + p.wrong] = p.x[thread_x()];
    sync();
    p.y[thread_x()] = tile[thread_x() % 64];
}

// The mistake: one element too far in memory.
GRID_KERNEL(256) void memory_overrun_kernel(const PlantedParams p) {
    p.y[thread_x() + p.wrong] = 2.0f * p.x[thread_x()];
}

// The mistake: a shuffle that only half of the lanes reach.
GRID_KERNEL(256) void divergent_collective_kernel(const PlantedParams p) {
    float value = p.x[thread_x()];
    if (!p.wrong || lane() < kWave / 2) value = shfl(value, 0);
    p.y[thread_x()] = value;
}

// The mistake: lanes of a wave at two different shuffles.
GRID_KERNEL(256) void different_collectives_kernel(const PlantedParams p) {
    float value = p.x[thread_x()];
    if (p.wrong && lane() % 2) {
        value = shfl(value, 1);
    } else {
        value = shfl(value, 0);
    }
    p.y[thread_x()] = value;
}

// The mistake: a thread that leaves before the barrier.
GRID_KERNEL(256) void early_return_kernel(const PlantedParams p) {
    if (p.wrong && thread_x() == num_threads() - 1) return;
    sync();
    p.y[thread_x()] = p.x[thread_x()];
}

// The sum of each wave. The mistake: 64 written for the size of a wave.
GRID_KERNEL(256) void wave_of_64_kernel(const PlantedParams p) {
    float value = p.x[thread_x()];
    for (int step = 1; step < (p.wrong ? 64 : kWave); step *= 2) value += shfl(value, (lane() + step) % (p.wrong ? 64 : kWave));
    p.y[thread_x()] = value;
}

// The mistake: LDS that nobody wrote.
GRID_KERNEL(256) void unwritten_lds_kernel(const PlantedParams p) {
    GRID_SHARED(float, tile, 256);
    if (!p.wrong || thread_x() != 5) tile[thread_x()] = p.x[thread_x()];
    sync();
    p.y[thread_x()] = tile[thread_x()];
}

// scalars: threads, wrong
#define PLANTED_OP(name)                                                                                                  \
    GRID_OP(name, "y", "x") {                                                                                             \
        PlantedParams params{args[1].as<float>(), args[0].as<float>(), args.integer(1) != 0}; \
        return launch(args, name##_kernel, {1}, static_cast<int>(args.integer(0)), params);                               \
    }

PLANTED_OP(missing_barrier)
PLANTED_OP(reused_array)
PLANTED_OP(lds_overrun)
PLANTED_OP(memory_overrun)
PLANTED_OP(divergent_collective)
PLANTED_OP(different_collectives)
PLANTED_OP(early_return)
PLANTED_OP(wave_of_64)
PLANTED_OP(unwritten_lds)
