// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

using namespace grid;

template <class T, int kMaxWidth, bool kCodes, bool kExact>
using AttnShape = Shape<T, kMaxWidth, kMaxWidth, false, kCodes, 1, kExact && kKnowsWidths>;

template <class T, int kMaxWidth, bool kCodes, bool kExact>
GRID_KERNEL(256) void attn_decode_kernel(const DecodeParams p) {
    decode_split<AttnShape<T, kMaxWidth, kCodes, kExact>>(p);
}

template <class T>
GRID_KERNEL(256) void attn_decode_merge_kernel(const DecodeParams p) {
    merge_splits<T>(p);
}

template <class T, int kMaxWidth, bool kExact>
int launch_splits(const Args& args, Blocks blocks, int threads, const DecodeParams& params, bool codes) {
    auto kernel = codes ? attn_decode_kernel<T, kMaxWidth, true, kExact> : attn_decode_kernel<T, kMaxWidth, false, kExact>;
    return launch(args, kernel, blocks, threads, params, tile_bytes<AttnShape<T, kMaxWidth, false, kExact>>());
}

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
    params.k = view_of(k_cache, k_cache.stride[2]);
    params.v = view_of(v_cache, v_cache.stride[2]);
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
    params.row_blocks = static_cast<int>(ceil_div(params.heads, kTileRows));
    params.scale = args.real(0) * (codes ? args.real(3) : 1.0f) * kLog2E;
    params.window = static_cast<int>(args.integer(1));
    params.cap = args.real(2);
    params.out_scale = codes ? args.real(4) : 1.0f;
    params.wide = aligned(q, q.size[2], 16);
    Blocks splits{num_kv_heads * params.row_blocks, params.num_splits, q.size[0]};
    int threads = args.max_threads < 256 ? 128 : 256;
    return by_float_type(args, q, [&](auto element) {
        using T = decltype(element);
        if constexpr (sizeof(T) == 4 && !kHasF32Tiles) {
            return fail(args, "q: expected bfloat16 or float16 on this chip, got float32");
        } else {
            bool narrow = params.k.width <= 128 && params.v.width <= 128;
            auto launch_fitting = narrow ? launch_splits<T, 128, false> : launch_splits<T, 256, false>;
            if constexpr (sizeof(T) == 2)  // the head size of most models
                if (params.k.width == 128 && params.v.width == 128) launch_fitting = launch_splits<T, 128, true>;
            if (int failed = launch_fitting(args, splits, threads, params, codes)) return failed;
            return launch(args, attn_decode_merge_kernel<T>, {num_heads, q.size[0]}, threads_for(args, params.v.width / kMergeColumns, 256), params);
        }
    });
}
