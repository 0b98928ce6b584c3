// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

using namespace grid;

// fp32 rows of 576 would not fit into 64 KiB of LDS.
template <class T>
constexpr int kWidest = sizeof(T) == 4 ? 288 : 576;

template <class T>
constexpr int kWidestLatent = sizeof(T) == 4 ? 256 : 512;

template <class T, bool kCodes, int kRowTiles, bool kExact>
using MlaShape = Shape<T, kWidest<T>, kWidestLatent<T>, true, kCodes, kRowTiles, kExact && kKnowsWidths>;

template <class T, bool kCodes, int kRowTiles, bool kExact>
GRID_KERNEL(256) void mla_decode_kernel(const DecodeParams p) {
    decode_split<MlaShape<T, kCodes, kRowTiles, kExact>>(p);
}

template <class T>
GRID_KERNEL(256) void mla_decode_merge_kernel(const DecodeParams p) {
    merge_splits<T>(p);
}

// kExact: the sizes of DeepSeek-V2, V3 and R1.
template <class T, bool kExact>
int launch_splits(const Args& args, int threads, DecodeParams params, i64 batch, bool codes) {
    constexpr bool kSpecial = kExact && sizeof(T) == 2;
    constexpr int kTiles = kSpecial ? kMostRowTiles : 1;
    i64 rows = params.num_tokens * params.heads, lds_bytes = tile_bytes<MlaShape<T, false, 1, kSpecial>>();
    bool two = kTiles == 2 && rows > kTileRows;
    params.row_blocks = static_cast<int>(ceil_div(rows, two ? 2 * kTileRows : kTileRows));
    auto kernel = codes ? mla_decode_kernel<T, true, 1, kSpecial> : mla_decode_kernel<T, false, 1, kSpecial>;
    if (two) kernel = codes ? mla_decode_kernel<T, true, kTiles, kSpecial> : mla_decode_kernel<T, false, kTiles, kSpecial>;
    return launch(args, kernel, {params.row_blocks, params.num_splits, batch}, threads, params, lds_bytes);
}

// scalars: scale, latent, interleaved, cap, kv_scale
GRID_OP(mla_decode, "o", "partial", "stats", "q", "kv_new", "cache", "page_table", "kv_len", "positions", "table") {
    const Tensor &q = args[3], &kv_new = args[4], &cache = args[5], &page_table = args[6], &positions = args[8], &table = args[9];
    i64 width = q.size[3], latent = args.integer(1), num_tokens = q.size[1], num_heads = q.size[2];
    if (int refused = check_rope_args(args, "kv_new, positions, table", kv_new, positions, table, width - latent)) return refused;
    if (latent < 1 || latent > width) return fail(args, "latent: expected 1 to Q = %lld, got %lld", width, latent);
    int widest = q.type == kF32 ? 288 : 576;
    if (int refused = check_cache(args, "cache", cache, widest)) return refused;
    int widest_latent = widest < 512 ? 256 : 512;
    if (latent % 16 || latent > widest_latent) return fail(args, "latent: expected a multiple of 16 and at most %d, got %lld", widest_latent, latent);
    bool codes = is_fp8(cache);
    DecodeParams params{};
    params.q = q.data;
    params.q_batch_stride = q.stride[0];
    params.q_token_stride = q.stride[1];
    params.q_head_stride = q.stride[2];
    params.k = view_of(cache, 0);
    params.v = params.k;
    params.v.width = static_cast<int>(latent);
    params.type = cache_type(cache, args.real(4));
    params.page_table = page_table.as<int>();
    params.table_stride = page_table.stride[0];
    params.kv_len = args[7].as<int>();
    params.partial = args[1].as<float>();
    params.stats = args[2].as<float>();
    params.o = args[0].data;
    params.page_size = static_cast<int>(cache.size[1]);
    params.num_splits = num_splits_of(page_table, cache.size[1]);
    params.num_tokens = static_cast<int>(num_tokens);
    params.heads = static_cast<int>(num_heads);
    params.num_kv_heads = 1;
    params.scale = args.real(0) * (codes ? args.real(4) : 1.0f) * kLog2E;
    params.cap = args.real(3);
    params.out_scale = codes ? args.real(4) : 1.0f;
    params.cache = cache.data;
    params.latent = static_cast<int>(latent);
    params.rope = rope_of(table, positions, args.integer(2));
    if (kv_new) {
        params.kv_new = kv_new.data;
        params.new_batch_stride = kv_new.stride[0];
        params.new_token_stride = kv_new.stride[1];
        params.positions_stride = positions.stride[0];
    }
    params.wide = aligned(q, width, 16) && aligned(kv_new, width, 16) && params.rope.half % 8 == 0;
    int threads = args.max_threads < 256 ? 128 : 256;
    return by_float_type(args, q, [&](auto element) {
        using T = decltype(element);
        if constexpr (sizeof(T) == 4 && !kHasF32Tiles) {
            return fail(args, "q: expected bfloat16 or float16 on this chip, got float32");
        } else {
            int failed = width == 576 && latent == 512 ? launch_splits<T, true>(args, threads, params, q.size[0], codes)
                                                       : launch_splits<T, false>(args, threads, params, q.size[0], codes);
            if (failed) return failed;
            return launch(args, mla_decode_merge_kernel<T>, {num_tokens * num_heads, q.size[0]}, threads_for(args, latent / kMergeColumns, 256), params);
        }
    });
}
