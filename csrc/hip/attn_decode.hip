// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

using namespace grid;

template <class T, int kMaxWidth>
GRID_KERNEL(256) void attn_decode_kernel(const DecodeParams p) {
    decode_split<T, kMaxWidth, kMaxWidth, false>(p);
}

template <class T>
GRID_KERNEL(256) void attn_decode_merge_kernel(const DecodeParams p) {
    merge_splits<T>(p);
}

static CacheView view_of(const Tensor& cache) { return {cache.data, cache.stride[0], cache.stride[1], cache.stride[2], static_cast<int>(cache.size[3])}; }

// scalars: scale, window, cap, k_scale, v_scale
GRID_OP(attn_decode, "o", "partial", "stats", "q", "k_cache", "v_cache", "page_table", "kv_len", "sinks") {
    const Tensor &o = args[0], &q = args[3], &k_cache = args[4], &v_cache = args[5], &page_table = args[6];
    i64 num_heads = q.size[1], num_kv_heads = k_cache.size[2];
    if (num_kv_heads == 0 || num_heads % num_kv_heads) return fail(args, "q: expected heads a multiple of the %lld kv heads, got %lld", num_kv_heads, num_heads);
    if (int refused = check_cache(args, "k_cache", k_cache, 256)) return refused;
    if (int refused = check_cache(args, "v_cache", v_cache, 256)) return refused;
    bool codes = is_fp8(k_cache);
    DecodeParams params{};
    params.q = q.data;
    params.q_batch_stride = q.stride[0];
    params.q_head_stride = q.stride[1];
    params.k = view_of(k_cache);
    params.v = view_of(v_cache);
    params.type = cache_type(k_cache, 1.0f);
    params.page_table = page_table.as<int>();
    params.table_stride = page_table.stride[0];
    params.kv_len = args[7].as<int>();
    params.partial = args[1].as<float>();
    params.stats = args[2].as<float>();
    params.o = o.data;
    params.sinks = args[8].as<float>();
    params.page_size = static_cast<int>(k_cache.size[1]);
    params.num_splits = num_splits_of(page_table, k_cache.size[1]);
    params.num_tokens = 1;
    params.heads = static_cast<int>(num_heads / num_kv_heads);
    params.num_kv_heads = static_cast<int>(num_kv_heads);
    params.scale = args.real(0) * (codes ? args.real(3) : 1.0f);
    params.window = static_cast<int>(args.integer(1));
    params.cap = args.real(2);
    params.out_scale = codes ? args.real(4) : 1.0f;
    Blocks splits{num_kv_heads * ceil_div(params.heads, kRows), params.num_splits, q.size[0]};
    int threads = args.max_threads < 256 ? 128 : 256;
    return by_float_type(args, q, [&](auto element) {
        using T = decltype(element);
        if constexpr (sizeof(T) == 4 && !kHasF32Tiles) {
            return fail(args, "q: expected bfloat16 or float16 on this chip, got float32");
        } else {
            bool narrow = params.k.width <= 128 && params.v.width <= 128;
            auto kernel = narrow ? attn_decode_kernel<T, 128> : attn_decode_kernel<T, 256>;
            if (int failed = launch(args, kernel, splits, threads, params, tile_bytes<T>(params, narrow ? 128 : 256))) return failed;
            return launch(args, attn_decode_merge_kernel<T>, {num_heads, q.size[0]}, threads_for(args, params.v.width, 256), params);
        }
    });
}
