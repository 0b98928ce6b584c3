// SPDX-License-Identifier: Apache-2.0
#include "grid/abi.h"

using namespace grid;

struct MoeAlignParams {
    const int* ids;       // [T, K]
    int* sorted_slots;    // [num_blocks * block]
    int* block_experts;   // [num_blocks]
    int* num_padded;      // [1]
    int* first_block;     // [E + 2]: where each expert's blocks start, then those of nobody's slots, then the end
    i64 ids_stride;
    int num_slots, top_k, num_experts, block, num_blocks;
};

// The bucket of slot s: its expert, or num_experts if that is not one of ours.
GRID_DEVICE int bucket_of(const MoeAlignParams& p, int slot) {
    int id = p.ids[slot / p.top_k * p.ids_stride + slot % p.top_k];
    return id >= 0 && id < p.num_experts ? id : p.num_experts;
}

// Split: one block. Counts slots per bucket in LDS, then adds up blocks in the order of buckets, a wave at a time.
GRID_KERNEL(1024) void moe_count_kernel(const MoeAlignParams p) {
    GRID_DYNAMIC_SHARED(int, counts);
    int num_buckets = p.num_experts + 1;
    for (int b = thread_x(); b < num_buckets; b += num_threads()) counts[b] = 0;
    sync();
    for (int slot = thread_x(); slot < p.num_slots; slot += num_threads()) atomic_add(&counts[bucket_of(p, slot)], 1);
    sync();
    if (wave() == 0) {
        int done = 0;
        for (int base = 0; base < num_buckets; base += kWave) {
            int b = base + lane();
            int blocks = b < num_buckets ? (counts[b] + p.block - 1) / p.block : 0;
            int before = done + wave_sum_before(blocks);
            if (b < num_buckets) p.first_block[b] = before;
            done += wave_sum(blocks);
        }
        if (lane() == 0) {
            p.first_block[num_buckets] = done;
            p.num_padded[0] = done * p.block;
        }
    }
}

// Split: one wave per bucket, and one more for what lies beyond the last. A wave walks over all slots and keeps its own, so they
// stay in ascending order without any atomic.
GRID_KERNEL(256) void moe_place_kernel(const MoeAlignParams p) {
    int bucket = block_x() * num_waves() + wave();
    if (bucket > p.num_experts + 1) return;
    bool beyond = bucket == p.num_experts + 1;
    int first = p.first_block[bucket], last = beyond ? p.num_blocks : p.first_block[bucket + 1];
    int next = first * p.block;
    if (!beyond && first < last) {
        for (int base = 0; base < p.num_slots; base += kWave) {
            int slot = base + lane();
            bool mine = slot < p.num_slots && bucket_of(p, slot) == bucket;
            u64 all = grid::ballot(mine);
            if (mine) p.sorted_slots[next + popcount(all & ((1ull << lane()) - 1))] = slot;
            next += popcount(all);
        }
    }
    for (int place = next + lane(); place < last * p.block; place += kWave) p.sorted_slots[place] = p.num_slots;
    int owner = bucket < p.num_experts ? bucket : -1;
    for (int b = first + lane(); b < last; b += kWave) p.block_experts[b] = owner;
}

// scalars: num_experts, block
GRID_OP(moe_align, "sorted_slots", "block_experts", "num_padded", "first_block", "ids") {
    const Tensor& ids = args[4];
    i64 num_experts = args.integer(0), block = args.integer(1), num_slots = ids.size[0] * ids.size[1];
    if (block < 1 || num_experts < 1) return fail(args, "block, num_experts: expected positive numbers, got %lld, %lld", block, num_experts);
    if (num_experts > 12 * 1024) return fail(args, "num_experts: expected at most 12288, got %lld", num_experts);
    if (args[0].size[0] > 0x7FFFFFFF) return fail(args, "ids: expected at most 2^31 slots with padding, got %lld", args[0].size[0]);
    MoeAlignParams params{ids.as<int>(),
                          args[0].as<int>(),
                          args[1].as<int>(),
                          args[2].as<int>(),
                          args[3].as<int>(),
                          ids.stride[0],
                          static_cast<int>(num_slots),
                          static_cast<int>(ids.size[1]),
                          static_cast<int>(num_experts),
                          static_cast<int>(block),
                          static_cast<int>(args[1].size[0])};
    if (int failed = launch(args, moe_count_kernel, {1}, threads_for(args, num_slots, 1024), params, (num_experts + 1) * 4)) return failed;
    return launch(args, moe_place_kernel, {ceil_div(num_experts + 2, 128 / kWave)}, 128, params);
}
