// SPDX-License-Identifier: Apache-2.0
#include "grid/abi.h"

using namespace grid;

constexpr int kMostRanks = 8;
constexpr int kMostBlocks = 64;  // fewer than any chip's compute units: blocks that wait for each other must all be running
constexpr i64 kOneShotBytes = 256 * 1024;

// The memory of one rank that all ranks reach: counters, then two halves of data that calls use in turn.
struct Region {
    u64 calls[kMostBlocks];                 // made by the owner; one per block, so that no block reads what another one writes
    u64 arrived[kMostBlocks][kMostRanks];   // marks that the ranks leave here
};

struct AllReduceParams {
    const void* x;       // [L, N]
    void* y;             // [L, N]
    char* shared;        // [L, S]
    const u64* regions;  // [W]: addresses
    i64 x_stride, y_stride, shared_stride, num_vectors, half_bytes;
    int world, rank, num_slices, num_blocks;
};

// Block b of every rank has stored what it owes and waits for block b of the others: b owns the same vectors everywhere.
GRID_DEVICE void meet(const AllReduceParams& p, Region* own, int rank, u64 mark) {
    sync();
    int peer = thread_x();
    if (peer < p.world) {
        publish(&reinterpret_cast<Region*>(in_memory(p.regions[peer]))->arrived[block_y()][rank], mark);
        wait_for(&own->arrived[block_y()][peer], mark);
    }
    sync();
}

// The vector of all ranks' data, added in the order of the ranks.
template <class T, int N>
GRID_DEVICE Vec<T, N> sum_of_ranks(const AllReduceParams& p, i64 offset) {
    Vec<T, N> terms[kMostRanks];
    GRID_UNROLL for (int r = 0; r < kMostRanks; ++r)
        if (r < p.world) terms[r] = load<N>(reinterpret_cast<const T*>(in_memory(p.regions[r]) + offset));
    float total[N] = {};
    GRID_UNROLL for (int r = 0; r < kMostRanks; ++r)
        if (r < p.world) GRID_UNROLL for (int i = 0; i < N; ++i) total[i] = r == 0 ? to_float(terms[r].v[i]) : total[i] + to_float(terms[r].v[i]);
    Vec<T, N> rounded;
    GRID_UNROLL for (int i = 0; i < N; ++i) rounded.v[i] = from_float<T>(total[i]);
    return rounded;
}

// Split: block_x() is the rank played, block_y() a share of the vectors of every slice. One slice: every rank adds up everything.
// One slice per rank: each adds up its own and the others fetch the sums.
// Traffic per rank: one shot reads W * N over the links; two shots read 2 * N and meet twice.
// Why: a call uses the half of the region that the previous one did not, so nobody waits for readers: who meets here has ended the
// previous call, and so the readers of the half before it are gone. Marks only grow, so nothing is ever reset and a captured graph
// can be replayed.
// Needs: zeroed regions that other GPUs see without caching (fine-grained or uncached); all ranks make the same calls.
// Source: the custom all-reduce of vLLM and SGLang; Thakur et al. 2005 for the two shots.
template <class T>
GRID_KERNEL(512) void all_reduce_kernel(const AllReduceParams p) {
    constexpr int N = 16 / sizeof(T);
    int local = block_x(), rank = p.rank + local, block = block_y(), num_blocks = p.num_blocks;
    char* shared = p.shared + local * p.shared_stride;
    Region* own = reinterpret_cast<Region*>(shared);
    u64 call = own->calls[block];
    sync();
    for (int b = block + thread_x() * num_blocks; b < kMostBlocks; b += num_threads() * num_blocks) own->calls[b] = call + 1;
    i64 half = static_cast<i64>(sizeof(Region)) + (call % 2 ? p.half_bytes : 0);

    const T* x = static_cast<const T*>(p.x) + local * p.x_stride;
    T* y = static_cast<T*>(p.y) + local * p.y_stride;
    i64 slice = (p.num_vectors + p.num_slices - 1) / p.num_slices, step = static_cast<i64>(num_blocks) * num_threads();
    i64 first = static_cast<i64>(block) * num_threads() + thread_x();
    auto each = [&](int s, auto body) {
        i64 end = smaller((s + 1) * slice, p.num_vectors);
        for (i64 v = s * slice + first; v < end; v += step) body(v);
    };
    for (int s = 0; s < p.num_slices; ++s) each(s, [&](i64 v) { store(reinterpret_cast<T*>(shared + half) + v * N, load<N>(x + v * N)); });
    meet(p, own, rank, 2 * call + 1);
    if (p.num_slices == 1) {
        each(0, [&](i64 v) { store(y + v * N, sum_of_ranks<T, N>(p, half + v * 16)); });
        return;
    }
    each(rank, [&](i64 v) { store(reinterpret_cast<T*>(shared + half) + v * N, sum_of_ranks<T, N>(p, half + v * 16)); });
    meet(p, own, rank, 2 * call + 2);
    for (int s = 0; s < p.num_slices; ++s)
        each(s, [&](i64 v) { store(y + v * N, load<N>(reinterpret_cast<const T*>(in_memory(p.regions[s]) + half) + v * N)); });
}

// scalars: rank, shots
GRID_OP(all_reduce, "y", "x", "shared", "regions") {
    const Tensor &y = args[0], &x = args[1], &shared = args[2], &regions = args[3];
    i64 local = x.size[0], bytes = x.size[1] * item_size(x.type), world = regions.size[0], rank = args.integer(0), shots = args.integer(1);
    if (world % 2 || world < 2 || world > kMostRanks) return fail(args, "regions: expected 2, 4, 6 or 8 ranks, got %lld", world);
    if (rank < 0 || rank + local > world) return fail(args, "rank: expected x to hold ranks within 0 to %lld, got %lld to %lld", world - 1, rank, rank + local - 1);
    if (shots < 0 || shots > 2) return fail(args, "shots: expected 1, 2, or 0 to choose by size, got %lld", shots);
    if (bytes % 16) return fail(args, "x: expected rows of a multiple of 16 bytes, got %lld bytes", bytes);
    i64 half_bytes = (shared.size[1] - static_cast<i64>(sizeof(Region))) / 32 * 16;
    if (bytes > half_bytes)
        return fail(args, "shared: expected at least %lld bytes for rows of %lld bytes, got %lld", static_cast<i64>(sizeof(Region)) + 2 * bytes, bytes, shared.size[1]);
    for (int t = 0; t < 3; ++t)
        if (bytes && !aligned(args[t], t == 2 ? 16 : x.size[1], 16)) return fail(args, "%s: expected rows that start at multiples of 16 bytes", all_reduce_tensors[t]);
    AllReduceParams params{};
    params.x = x.data;
    params.y = y.data;
    params.shared = shared.as<char>();
    params.regions = regions.as<u64>();
    params.x_stride = x.stride[0];
    params.y_stride = y.stride[0];
    params.shared_stride = shared.stride[0];
    params.num_vectors = bytes / 16;
    params.half_bytes = half_bytes;
    params.world = static_cast<int>(world);
    params.rank = static_cast<int>(rank);
    bool one_shot = shots == 1 || (shots == 0 && (world == 2 || bytes <= kOneShotBytes));
    params.num_slices = one_shot ? 1 : params.world;
    i64 slice = ceil_div(params.num_vectors, params.num_slices);
    int threads = threads_for(args, slice, 512);
    i64 blocks = ceil_div(slice, threads);
    params.num_blocks = static_cast<int>(blocks < kMostBlocks ? blocks : kMostBlocks);
    return by_float_type(args, x, [&](auto element) {
        using T = decltype(element);
        return launch(args, all_reduce_kernel<T>, {local, params.num_blocks}, threads, params);
    });
}
