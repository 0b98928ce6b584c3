// SPDX-License-Identifier: Apache-2.0
#include "rope.h"

using namespace grid;

struct StoreMlaParams {
    const void* c;     // [T, latent]
    const void* k_pe;  // [T, width]
    void* cache;       // [N, P, latent + width]
    void* q_pe;        // [T, H, width], or null
    i64 c_stride, k_stride, page_stride, slot_stride, q_stride, q_head_stride;
    const i64* slots;  // [T]
    int latent, width, heads, page_size;
    CacheType type;
    Rope rope;
};

// Split: one token per block; its threads share out the vectors of c, k_pe and q_pe.
// Traffic: the row is read once and written once, rotated already; q_pe is turned in place.
template <class T, int N>
GRID_KERNEL(256) void store_mla_kernel(const StoreMlaParams p) {
    i64 token = block_x(), slot = p.slots[token];
    const float* cosines = p.rope.table ? p.rope.table + p.rope.positions[token] * p.rope.table_stride : nullptr;
    i64 element = slot / p.page_size * p.page_stride + slot % p.page_size * p.slot_stride;
    int item_bytes = p.type.is_fp8 ? 1 : static_cast<int>(sizeof(T));
    char* row = static_cast<char*>(p.cache) + element * item_bytes;
    int c_items = p.latent / N, k_items = row_items(p.width, p.rope.half, N), q_items = p.rope.half / N;
    for (int item = thread_x(); item < c_items + k_items + p.heads * q_items; item += num_threads()) {
        int own = item - c_items - k_items;
        if (own >= 0) {
            T* q = static_cast<T*>(p.q_pe) + token * p.q_stride + own / q_items * p.q_head_stride;
            move_item<T, N>(q, q, {false, false, 1.0f}, own % q_items, cosines, p.rope.half, p.rope.interleaved);
        } else if (slot >= 0 && item < c_items) {
            move_item<T, N>(static_cast<const T*>(p.c) + token * p.c_stride, row, p.type, item, nullptr, 0, false);
        } else if (slot >= 0) {
            move_item<T, N>(static_cast<const T*>(p.k_pe) + token * p.k_stride, row + p.latent * item_bytes, p.type, item - c_items, cosines, p.rope.half, p.rope.interleaved);
        }
    }
}

// scalars: interleaved, kv_scale
GRID_OP(store_mla, "c", "k_pe", "cache", "slots", "q_pe", "positions", "table") {
    const Tensor &c = args[0], &k_pe = args[1], &cache = args[2], &q_pe = args[4], &positions = args[5], &table = args[6];
    i64 latent = c.size[1], width = k_pe.size[1];
    if (int refused = check_rope_args(args, "q_pe, positions, table", q_pe, positions, table, width)) return refused;
    Rope rope = rope_of(table, positions, args.integer(0));
    bool wide = aligned(c, latent, 16) && aligned(k_pe, width, 16) && aligned(q_pe, width, 16);
    return by_float_type(args, c, [&](auto element) {
        using T = decltype(element);
        constexpr int kVector = 16 / sizeof(T);
        wide = wide && aligned(cache, latent + width, is_fp8(cache) ? kVector : 16) && rope.half % kVector == 0;
        return by_vector_width<T>(wide, [&](auto n) {
            constexpr int N = decltype(n)::value;
            StoreMlaParams params{c.data,          k_pe.data,       cache.data,
                                  q_pe.data,       c.stride[0],     k_pe.stride[0],
                                  cache.stride[0], cache.stride[1], q_pe ? q_pe.stride[0] : 0,
                                  q_pe ? q_pe.stride[1] : 0, args[3].as<i64>(), static_cast<int>(latent),
                                  static_cast<int>(width), q_pe ? static_cast<int>(q_pe.size[1]) : 0, static_cast<int>(cache.size[1]),
                                  cache_type(cache, args.real(1)), rope};
            i64 items = (latent + width + params.heads * rope.half) / N;
            return launch(args, store_mla_kernel<T, N>, {c.size[0]}, threads_for(args, items, 256), params);
        });
    });
}
