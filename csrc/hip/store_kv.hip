// SPDX-License-Identifier: Apache-2.0
#include "rope.h"

using namespace grid;

struct Heads {
    const void* from;  // [T, heads, width]
    i64 row_stride, head_stride;
    int heads, width, half;
};

struct CacheRows {
    void* to;  // [N, P, heads, width]
    i64 page_stride, slot_stride, head_stride;
    CacheType type;
};

struct StoreKvParams {
    Heads k, v, q;
    CacheRows k_cache, v_cache;
    const i64* slots;  // [T]
    int page_size;
    Rope rope;
};

GRID_DEVICE char* cache_row(const CacheRows& rows, i64 slot, int page_size, int head, int item_bytes) {
    i64 page = slot / page_size, offset = slot % page_size;
    i64 element = page * rows.page_stride + offset * rows.slot_stride + head * rows.head_stride;
    return static_cast<char*>(rows.to) + element * (rows.type.is_fp8 ? 1 : item_bytes);
}

// Split: one token per block; its threads share out the vectors of q, k and v.
// Traffic: k and v are read once and written once, where they stay; q is turned in place.
template <class T, int N>
GRID_KERNEL(256) void store_kv_kernel(const StoreKvParams p) {
    i64 token = block_x(), slot = p.slots[token];
    const float* cosines = p.rope.table ? p.rope.table + p.rope.positions[token] * p.rope.table_stride : nullptr;
    int k_items = row_items(p.k.width, p.k.half, N), v_items = p.v.width / N, q_items = p.k.half / N;
    int of_k = p.k.heads * k_items, of_v = p.v.heads * v_items, of_q = p.q.heads * q_items;
    for (int item = thread_x(); item < of_q + of_k + of_v; item += num_threads()) {
        if (item < of_q) {
            int head = item / q_items;
            T* row = static_cast<T*>(const_cast<void*>(p.q.from)) + token * p.q.row_stride + head * p.q.head_stride;
            move_item<T, N>(row, row, {false, false, 1.0f}, item % q_items, cosines, p.q.half, p.rope.interleaved);
        } else if (slot >= 0) {
            bool is_k = item < of_q + of_k;
            const Heads& from = is_k ? p.k : p.v;
            const CacheRows& cache = is_k ? p.k_cache : p.v_cache;
            int own = item - of_q - (is_k ? 0 : of_k), items = is_k ? k_items : v_items, head = own / items;
            const T* row = static_cast<const T*>(from.from) + token * from.row_stride + head * from.head_stride;
            move_item<T, N>(row, cache_row(cache, slot, p.page_size, head, sizeof(T)), cache.type, own % items, cosines, from.half, p.rope.interleaved);
        }
    }
}

static Heads heads_of(const Tensor& t, int half) {
    if (!t) return {};
    return {t.data, t.stride[0], t.stride[1], static_cast<int>(t.size[1]), static_cast<int>(t.size[2]), half};
}

static CacheRows cache_rows(const Tensor& t, float scale) { return {t.data, t.stride[0], t.stride[1], t.stride[2], cache_type(t, scale)}; }

// scalars: interleaved, k_scale, v_scale
GRID_OP(store_kv, "k", "v", "k_cache", "v_cache", "slots", "q", "positions", "table") {
    const Tensor &k = args[0], &v = args[1], &k_cache = args[2], &v_cache = args[3], &q = args[5], &positions = args[6], &table = args[7];
    if (int refused = check_rope_args(args, "q, positions, table", q, positions, table, k.size[2])) return refused;
    Rope rope = rope_of(table, positions, args.integer(0));
    int rest = static_cast<int>(k.size[2]) - 2 * rope.half;
    bool wide = aligned(k, k.size[2], 16) && aligned(v, v.size[2], 16) && aligned(q, k.size[2], 16);
    return by_float_type(args, k, [&](auto element) {
        using T = decltype(element);
        constexpr int kVector = 16 / sizeof(T);
        int cache_bytes = is_fp8(k_cache) ? kVector : 16;
        wide = wide && aligned(k_cache, k.size[2], cache_bytes) && aligned(v_cache, v.size[2], cache_bytes) && rope.half % kVector == 0 && rest % kVector == 0;
        return by_vector_width<T>(wide, [&](auto n) {
            StoreKvParams params{heads_of(k, rope.half), heads_of(v, 0), heads_of(q, rope.half), cache_rows(k_cache, args.real(1)), cache_rows(v_cache, args.real(2)),
                                 args[4].as<i64>(), static_cast<int>(k_cache.size[1]), rope};
            i64 items = (k.size[1] * k.size[2] + v.size[1] * v.size[2] + (q ? q.size[1] * rope.half : 0)) / decltype(n)::value;
            return launch(args, store_kv_kernel<T, decltype(n)::value>, {k.size[0]}, threads_for(args, items, 256), params);
        });
    });
}
