// SPDX-License-Identifier: Apache-2.0
// Reductions over a wave and over a block. Their order depends on the number of threads alone, so results reproduce.
#pragma once

namespace grid {

constexpr float kMinusInf = -__builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;

template <class T>
GRID_DEVICE T larger(T a, T b) {
    return a > b ? a : b;
}
template <class T>
GRID_DEVICE T smaller(T a, T b) {
    return a < b ? a : b;
}

// Over `width` neighbouring lanes, a power of two; every lane receives the result.
template <class T, class Combine>
GRID_DEVICE T lanes_reduce(T value, int width, Combine combine GRID_SITE_AFTER) {
    for (int step = 1; step < width; step *= 2) value = combine(value, shfl(value, lane() ^ step GRID_PASS_SITE));
    return value;
}

// Over 16 neighbouring lanes; every lane receives the result.
template <class T, class Combine>
GRID_DEVICE T ring_reduce(T value, Combine combine GRID_SITE_AFTER) {
    value = combine(value, shfl_ring<8>(value GRID_PASS_SITE));
    value = combine(value, shfl_ring<4>(value GRID_PASS_SITE));
    value = combine(value, shfl_ring<2>(value GRID_PASS_SITE));
    return combine(value, shfl_ring<1>(value GRID_PASS_SITE));
}

// Over the wave; every lane receives the result.
template <class T, class Combine>
GRID_DEVICE T wave_reduce(T value, Combine combine GRID_SITE_AFTER) {
    value = ring_reduce(value, combine GRID_PASS_SITE);
    GRID_UNROLL for (int step = 16; step < kWave; step *= 2) value = combine(value, shfl(value, lane() ^ step GRID_PASS_SITE));
    return value;
}

template <class T>
GRID_DEVICE T wave_sum(T value GRID_SITE_AFTER) {
    return wave_reduce(value, [](T a, T b) { return a + b; } GRID_PASS_SITE);
}

template <class T>
GRID_DEVICE T wave_max(T value GRID_SITE_AFTER) {
    return wave_reduce(value, [](T a, T b) { return larger(a, b); } GRID_PASS_SITE);
}

// The sum over the lanes before this one.
template <class T>
GRID_DEVICE T wave_sum_before(T value GRID_SITE_AFTER) {
    T total = value;
    for (int step = 1; step < kWave; step *= 2) {
        T other = shfl(total, lane() >= step ? lane() - step : lane() GRID_PASS_SITE);
        if (lane() >= step) total += other;
    }
    return total - value;
}

// LDS is sized for the smallest wave: the host half of a launch does not know which chip it is for.
constexpr int kMaxWaves = 32;

// Over the block; every thread receives the result. `parts` may be used again after the next sync(). `neutral(value of the wave)` may
// be combined with any part without changing the result.
template <class T, class Combine, class Neutral>
GRID_DEVICE T block_reduce(T value, T (&parts)[kMaxWaves], Combine combine, Neutral neutral GRID_SITE_AFTER) {
    constexpr int kReach = 1024 / kWave;  // waves of the largest block
    value = wave_reduce(value, combine GRID_PASS_SITE);
    if (num_waves() == 1) return value;
    if (lane() == 0) parts[wave()] = value;
    sync(GRID_SITE_ARG);
    int own = lane() % kReach;
    value = own < num_waves() ? parts[own] : neutral(value);
    value = ring_reduce(value, combine GRID_PASS_SITE);
    return kReach > 16 ? combine(value, shfl(value, lane() ^ 16 GRID_PASS_SITE)) : value;
}

template <class T>
GRID_DEVICE T block_sum(T value, T (&parts)[kMaxWaves] GRID_SITE_AFTER) {
    return block_reduce(value, parts, [](T a, T b) { return a + b; }, [](T) { return T{}; } GRID_PASS_SITE);
}

template <class T>
GRID_DEVICE T block_max(T value, T (&parts)[kMaxWaves] GRID_SITE_AFTER) {
    return block_reduce(value, parts, [](T a, T b) { return larger(a, b); }, [](T own) { return own; } GRID_PASS_SITE);
}

}  // namespace grid
