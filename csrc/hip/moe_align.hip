// SPDX-License-Identifier: Apache-2.0
#include "grid/abi.h"

using namespace grid;

constexpr int kPadLanes = 16;  // threads that write one bucket's padding and blocks

struct MoeAlignParams {
    const int* ids;       // [T, K]
    int* sorted_slots;    // [num_blocks * block]
    int* block_experts;   // [num_blocks]
    int* num_padded;      // [1]
    int* counts;          // [num_chunks, E + 1]: slots of each expert, then those of nobody
    i64 ids_stride;
    int num_slots, top_k, num_experts, block, num_blocks, num_chunks, chunk_len;
};

// The bucket of slot s: its expert, or num_experts if that is not one of ours.
GRID_DEVICE int bucket_of(const MoeAlignParams& p, int slot) {
    i64 place = p.ids_stride == p.top_k ? slot : slot / p.top_k * p.ids_stride + slot % p.top_k;
    int id = p.ids[place];
    return id >= 0 && id < p.num_experts ? id : p.num_experts;
}

// Into LDS; whoever adds first, integers come to the same sum.
GRID_DEVICE void count_chunk(const MoeAlignParams& p, int first, int last, int* counts) {
    for (int b = thread_x(); b <= p.num_experts; b += num_threads()) counts[b] = 0;
    sync();
    for (int slot = first + thread_x(); slot < last; slot += num_threads()) atomic_add(&counts[bucket_of(p, slot)], 1);
    sync();
}

// Split: one block per chunk of slots.
GRID_KERNEL(256) void moe_count_kernel(const MoeAlignParams p) {
    GRID_DYNAMIC_SHARED(int, counts);
    int first = block_x() * p.chunk_len;
    count_chunk(p, first, smaller(first + p.chunk_len, p.num_slots), counts);
    for (int b = thread_x(); b <= p.num_experts; b += num_threads()) p.counts[block_x() * (p.num_experts + 1) + b] = counts[b];
}

// Lanes of the wave whose bucket is this one's.
GRID_DEVICE u64 peers_of(int bucket, bool is_slot, int num_experts) {
    u64 peers = grid::ballot(is_slot);
    for (int bit = 1; bit <= num_experts; bit *= 2) {
        u64 set = grid::ballot((bucket & bit) != 0);
        peers &= bucket & bit ? set : ~set;
    }
    return peers;
}

// Split: one block per chunk of slots; each also writes a share of the padding and of the blocks' experts, and of the unused tail.
// Traffic: ids are read once, the counts by every chunk.
// Needs: LDS for three numbers per bucket.
// Why: waves take turns at a table of each bucket's next place, and lanes their places by ballots, so that slots ascend.
GRID_KERNEL(256) void moe_place_kernel(const MoeAlignParams p) {
    GRID_DYNAMIC_SHARED(int, next);  // [E + 1] the place of each bucket's next slot
    int num_buckets = p.num_experts + 1, chunk = block_x();
    int* end = next + num_buckets;        // [E + 1] behind its last slot, of all chunks
    int* block_end = end + num_buckets;   // [E + 1] behind its last block
    int first = chunk * p.chunk_len, last = smaller(first + p.chunk_len, p.num_slots);
    if (p.num_chunks == 1) count_chunk(p, first, last, end);
    for (int b = thread_x(); b < num_buckets; b += num_threads()) {
        int before = 0, total = p.num_chunks == 1 ? end[b] : 0;
        if (p.num_chunks > 1) {
            for (int c = 0; c < p.num_chunks; ++c) {
                int count = p.counts[c * num_buckets + b];
                total += count;
                before += c < chunk ? count : 0;
            }
        }
        next[b] = before, end[b] = total;
    }
    sync();
    if (wave() == 0) {
        int done = 0;
        for (int base = 0; base < num_buckets; base += kWave) {
            int b = base + lane();
            int blocks = b < num_buckets ? (end[b] + p.block - 1) / p.block : 0;
            int before = done + wave_sum_before(blocks);
            if (b < num_buckets) next[b] += before * p.block, end[b] += before * p.block, block_end[b] = before + blocks;
            done += wave_sum(blocks);
        }
    }
    sync();

    for (int base = first; base < last; base += num_threads()) {
        int slot = base + thread_x(), place = 0;
        bool is_slot = slot < last;
        int bucket = is_slot ? bucket_of(p, slot) : 0;
        u64 peers = peers_of(bucket, is_slot, p.num_experts);
        for (int turn = 0; turn < num_waves() && base + turn * kWave < last; ++turn) {
            if (turn == wave()) {
                if (is_slot) place = next[bucket] + popcount(peers & ((1ull << lane()) - 1));
                wave_sync();
                if (is_slot && peers >> lane() == 1) next[bucket] = place + 1;
            }
            sync();
        }
        if (is_slot) p.sorted_slots[place] = slot;
    }

    int groups = num_threads() / kPadLanes, part = thread_x() % kPadLanes;
    for (int b = chunk * groups + thread_x() / kPadLanes; b < num_buckets; b += p.num_chunks * groups) {
        int last_block = block_end[b];
        for (int place = end[b] + part; place < last_block * p.block; place += kPadLanes) p.sorted_slots[place] = p.num_slots;
        for (int n = (b ? block_end[b - 1] : 0) + part; n < last_block; n += kPadLanes) p.block_experts[n] = b < p.num_experts ? b : -1;
    }
    int used = block_end[p.num_experts], thread = chunk * num_threads() + thread_x(), step = p.num_chunks * num_threads();
    for (int place = used * p.block + thread; place < p.num_blocks * p.block; place += step) p.sorted_slots[place] = p.num_slots;
    for (int n = used + thread; n < p.num_blocks; n += step) p.block_experts[n] = -1;
    if (thread == 0) p.num_padded[0] = used * p.block;
}

// scalars: num_experts, block
GRID_OP(moe_align, "sorted_slots", "block_experts", "num_padded", "counts", "ids") {
    const Tensor& ids = args[4];
    i64 num_experts = args.integer(0), block = args.integer(1), num_slots = ids.size[0] * ids.size[1], num_chunks = args[3].size[0];
    if (block < 1 || num_experts < 1) return fail(args, "block, num_experts: expected positive numbers, got %lld, %lld", block, num_experts);
    if (num_experts > 4 * 1024) return fail(args, "num_experts: expected at most 4096, got %lld", num_experts);
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
                          static_cast<int>(args[1].size[0]),
                          static_cast<int>(num_chunks),
                          static_cast<int>(ceil_div(num_slots, num_chunks))};
    int threads = threads_for(args, 256, 256);
    i64 table_bytes = (num_experts + 1) * 4;
    if (num_chunks > 1)
        if (int failed = launch(args, moe_count_kernel, {num_chunks}, threads, params, table_bytes)) return failed;
    return launch(args, moe_place_kernel, {num_chunks}, threads, params, 3 * table_bytes);
}
