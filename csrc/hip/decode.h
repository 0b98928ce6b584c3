// SPDX-License-Identifier: Apache-2.0
// Attention of a few new tokens per sequence over a paged cache, in splits of a fixed number of tokens and a merge: the core of
// attn_decode and of mla_decode. Source: Dao et al. 2022; split over keys as in Flash-Decoding.
#pragma once

#include "grid/mma.h"
#include "rope.h"

namespace grid {

constexpr int kRows = 16;         // queries per block: one tile high
constexpr int kTokens = 32;       // tokens per step: one tile deep
constexpr int kSplit = 256;       // tokens per block; fixed, so that sums do not depend on what else is in the batch
constexpr int kBlockThreads = 256;
// The race detector can follow fewer threads, so on the host half a block must do.
constexpr int kFewestThreads = kOnDevice ? kBlockThreads : 128;
constexpr int kFewestWaves = kFewestThreads / kWave;
// On RDNA3 a tile of A or B takes 16 registers of every lane: few are left for rows on their way, none for the next ones, nor for
// tiles that are read early, nor for the addresses that the compiler computes ahead when it knows the widths.
#if defined(__GFX11__)
constexpr bool kPrefetch = false, kKnowsWidths = false;
constexpr int kMostTilesAtOnce = 2;
GRID_DEVICE void end_of_tiles() { __builtin_amdgcn_sched_barrier(0); }
#else
constexpr bool kPrefetch = true, kKnowsWidths = true;
constexpr int kMostTilesAtOnce = kTransposedReads ? 4 : 8;
GRID_DEVICE void end_of_tiles() {}
#endif

struct CacheView {
    const void* data;  // [N, P, G, width]
    i64 page_stride, slot_stride, head_stride;
    int width;
};

struct DecodeParams {
    const void* q;  // [B, S, H, width of k]
    i64 q_batch_stride, q_token_stride, q_head_stride;
    CacheView k, v;
    CacheType type;
    const int* page_table;  // [B, W]
    const int* kv_len;      // [B]
    i64 table_stride;
    float* partial;  // [B, splits, rows, width of v]: sums of weight times value
    float* stats;    // [B, splits, rows, 2]: the largest score, the sum of weights
    void* o;         // [B, S, H, width of v]
    const float* sinks;
    int page_size, num_splits, num_tokens, heads, num_kv_heads;  // tokens S; heads per kv head
    float scale, cap, out_scale;
    int window;
    // mla_decode only: rows that are still to be written, and the rotation of the part behind `latent`.
    const void* kv_new;  // [B, S, width of k], or null
    void* cache;
    i64 new_batch_stride, new_token_stride, positions_stride;
    int latent;
    Rope rope;
};

inline int num_splits_of(const Tensor& page_table, i64 page_size) { return static_cast<int>(ceil_div(page_table.size[1] * page_size, kSplit)); }

// Elements between rows of the tile in LDS: whole steps of K, plus 16 bytes so that neighbouring rows start in other banks.
template <class T>
GRID_DEVICE int tile_stride(int width) {
    return (width + 31) / 32 * 32 + 16 / static_cast<int>(sizeof(T));
}

// Rows in LDS. Loads past the registers leave no gaps between rows, so there neighbouring rows keep the chunks of 16 bytes of each
// 128 in other orders instead.
template <class T, bool kSwizzled>
struct Tile {
    T* data;
    int stride;

    static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

    static GRID_DEVICE int order(int row) { return kSwizzled ? row / (kLdsBanks / 32) % 8 : 0; }
    GRID_DEVICE T* at(int row, int column) const {
        return data + row * stride + (column / kChunk ^ order(row)) * kChunk + column % kChunk;
    }
};

struct Block {
    int kv_head, first_row, batch, split;
    int len;        // tokens of the sequence
    int start, end; // tokens of this split that anybody may see
    int num_rows;   // S * heads
};

GRID_DEVICE int query_position(const DecodeParams& p, const Block& block, int row) { return block.len - p.num_tokens + row / p.heads; }

// One element of a row [c | pe] that is rotated behind `latent`, as fp32.
template <class T>
GRID_DEVICE float rotated_element(const DecodeParams& p, const T* row, int column, const float* cosines) {
    if (!p.rope.table || column < p.latent) return to_float(row[column]);
    int half = p.rope.half, j = column - p.latent;
    if (j >= 2 * half) return to_float(row[column]);
    int pair = p.rope.interleaved ? j / 2 : j % half;
    int low = p.latent + (p.rope.interleaved ? 2 * pair : pair), high = p.rope.interleaved ? low + 1 : low + half;
    float a = to_float(row[low]), b = to_float(row[high]);
    rotate(a, b, cosines[pair], cosines[half + pair]);
    return column == low ? a : b;
}

GRID_DEVICE const float* cosines_of(const DecodeParams& p, int batch, int token) {
    return p.rope.table ? p.rope.table + p.rope.positions[batch * p.positions_stride + token] * p.rope.table_stride : nullptr;
}

// The block's queries into LDS, rotated, zeros where there are none.
template <class T, bool kSwizzled>
GRID_DEVICE void stage_queries(const DecodeParams& p, const Block& block, const Tile<T, kSwizzled>& tile) {
    for (int i = thread_x(); i < kRows * tile.stride; i += num_threads()) {
        int row = block.first_row + i / tile.stride, column = i % tile.stride;
        float value = 0.0f;
        if (row < block.num_rows && column < p.k.width) {
            int token = row / p.heads, head = block.kv_head * p.heads + row % p.heads;
            const T* q = static_cast<const T*>(p.q) + block.batch * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
            value = rotated_element(p, q, column, cosines_of(p, block.batch, token));
        }
        *tile.at(i / tile.stride, column) = from_float<T>(value);
    }
}

struct alignas(16) Chunk {
    u32 words[4];
};

// A tile of kTokens cache rows on its way from memory to LDS through registers, so that the loads of the next tile fly while this
// one is worked on. kChunks * threads chunks of 16 bytes hold it. kCodes: the cache may be fp8.
template <class T, int kChunks, bool kCodes>
struct Staged {
    u32 words[kChunks][4];  // not whole chunks: as such the compiler would keep them in scratch memory

    GRID_DEVICE void fetch(const DecodeParams& p, const Block& block, const CacheView& view, int first, int end, const i64* rows, int skip = 0) {
        bool codes = kCodes && p.type.is_fp8;
        int item = codes ? 1 : static_cast<int>(sizeof(T)), per_row = view.width * item / 16;
        GRID_UNROLL for (int i = 0; i < kChunks; ++i) {
            int c = thread_x() + (skip + i) * num_threads(), row = c / per_row, token = first + row;
            Chunk chunk = {};
            if (row < kTokens && token >= block.start && token < end) {
                const char* from = static_cast<const char*>(view.data) + rows[token - block.split * kSplit] * item + (c - row * per_row) * 16;
                chunk = *reinterpret_cast<const Chunk*>(from);
            }
            GRID_UNROLL for (int w = 0; w < 4; ++w) words[i][w] = chunk.words[w];
        }
    }

    template <bool kSwizzled>
    GRID_DEVICE void put(const DecodeParams& p, const CacheView& view, const Tile<T, kSwizzled>& tile, int skip = 0) const {
        bool codes = kCodes && p.type.is_fp8;
        int item = codes ? 1 : static_cast<int>(sizeof(T)), per_row = view.width * item / 16;
        GRID_UNROLL for (int i = 0; i < kChunks; ++i) {
            int c = thread_x() + (skip + i) * num_threads(), row = c / per_row, column = (c - row * per_row) * 16 / item;
            if (row >= kTokens) continue;
            if (!codes) {
                *reinterpret_cast<Chunk*>(tile.at(row, column)) = {words[i][0], words[i][1], words[i][2], words[i][3]};
            } else {
                constexpr int kVector = 16 / sizeof(T);
                GRID_UNROLL for (int j = 0; j < 16; j += kVector) {
                    Vec<T, kVector> wide;
                    GRID_UNROLL for (int n = 0; n < kVector; ++n) {
                        u8 code = static_cast<u8>(words[i][(j + n) / 4] >> 8 * ((j + n) % 4));
                        wide.v[n] = from_float<T>(decode(fp8{code}, p.type.fnuz));
                    }
                    store(tile.at(row, column + j), wide);
                }
            }
        }
    }
};

// The same tile in pieces, each of which is in LDS before the next is asked for.
template <int kChunks, bool kCodes, class T, bool kSwizzled>
GRID_DEVICE void copy_tile(const DecodeParams& p, const Block& block, const CacheView& view, int first, int end, const i64* rows, const Tile<T, kSwizzled>& tile) {
    constexpr int kPiece = 3;
    for (int skip = 0; skip < kChunks; skip += kPiece) {
        Staged<T, kPiece, kCodes> part;
        part.fetch(p, block, view, first, end, rows, skip);
        part.put(p, view, tile, skip);
    }
}

// The same tile straight to LDS, which keeps the registers free for other blocks' work. Rows that nobody may see become zeros.
template <int kWidth, class T>
GRID_DEVICE void load_tile(const Block& block, const CacheView& view, int first, int end, const i64* rows, const Tile<T, true>& tile) {
    constexpr int kChunk = Tile<T, true>::kChunk, kPerRow = kWidth / kChunk;
    GRID_UNROLL for (int i = 0; i < (kTokens * kPerRow + kFewestThreads - 1) / kFewestThreads; ++i) {
        int base = i * num_threads(), place = base + thread_x(), row = place / kPerRow, token = first + row;
        if (row >= kTokens) continue;
        if (token >= block.start && token < end) {
            i64 element = rows[token - block.split * kSplit] + (place % kPerRow ^ tile.order(row)) * kChunk;
            load_to_lds(static_cast<const T*>(view.data) + element, tile.data + (base + wave() * kWave) * kChunk);
        } else {
            *reinterpret_cast<Chunk*>(tile.data + place * kChunk) = {};
        }
    }
    wait_for_lds();
}

// The new rows of the tile, rotated and rounded as the cache holds them; the block of the first queries also writes the cache.
template <class T, bool kSwizzled>
GRID_DEVICE void stage_new_rows(const DecodeParams& p, const Block& block, int first, const Tile<T, kSwizzled>& tile, const i64* rows) {
    int begin = larger(first, block.len - p.num_tokens), end = smaller(first + kTokens, block.end);
    int width = p.k.width;
    for (int i = thread_x(); i < (end - begin) * width; i += num_threads()) {
        int token = begin + i / width, column = i % width, number = token - (block.len - p.num_tokens);
        const T* row = static_cast<const T*>(p.kv_new) + block.batch * p.new_batch_stride + number * p.new_token_stride;
        float value[1] = {rotated_element(p, row, column, cosines_of(p, block.batch, number))};
        i64 element = rows[token - block.split * kSplit] + column;
        T kept = from_float<T>(value[0]);
        if (p.type.is_fp8) {
            value[0] = value[0] / p.type.scale;
            fp8 code = encode(value, p.type.fnuz).v[0];
            kept = from_float<T>(decode(code, p.type.fnuz));
            if (block.first_row == 0) static_cast<fp8*>(p.cache)[element] = code;
        } else if (block.first_row == 0) {
            static_cast<T*>(p.cache)[element] = kept;
        }
        *tile.at(token - first, column) = kept;
    }
}

// Split: a block owns 16 queries of one kv head (heads of a group, or heads and new tokens that share a latent) and kSplit tokens.
// Traffic: each cache row of the split comes from memory once per 16 queries, in 16-byte loads, and once more through LDS.
// A step of 32 tokens: rows to LDS; scores, waves sharing out tokens and K; softmax, 32 lanes per query; weights times values,
// waves sharing out columns. Values overwrite the keys in LDS, unless they are the keys' first columns (kShared).
// kExact: widths are kMaxK and kMaxV and the cache has the type of q; there rows go past the registers where the chip can do that.
// Needs: widths of 16 * n up to kMaxK and kMaxV; cache rows at multiples of 16 bytes.
template <class T, int kMaxK, int kMaxV, bool kShared, bool kExact = false>
GRID_DEVICE void decode_split(const DecodeParams& p) {
    constexpr bool kDirect = kExact && kLoadsToLds;
    constexpr int kChunksK = (kTokens * kMaxK * sizeof(T) / 16 + kFewestThreads - 1) / kFewestThreads;
    constexpr int kChunksV = (kTokens * kMaxV * sizeof(T) / 16 + kFewestThreads - 1) / kFewestThreads;
    constexpr int kGroups = kFewestWaves / 2;
    constexpr int kSteps = ((kMaxK + 31) / 32 + kGroups - 1) / kGroups;
    constexpr int kColumns = (kMaxV / 16 + kFewestWaves - 1) / kFewestWaves;
    constexpr int kAtOnce = kColumns < kMostTilesAtOnce ? kColumns : kMostTilesAtOnce;
    constexpr int kScoreStride = kTokens + 4;
    constexpr int kWeightStride = kTokens + 16 / sizeof(T);
    constexpr int kParts = kBlockThreads / kWave / 2;
    GRID_SHARED(i64, k_rows, kSplit);
    GRID_SHARED(i64, v_rows, kShared ? 1 : kSplit);
    GRID_SHARED(float, scores, kParts * kRows * kScoreStride);
    GRID_SHARED(T, weights, kRows * kWeightStride);
    GRID_SHARED(float, row_max, kRows);
    GRID_SHARED(float, row_sum, kRows);
    GRID_SHARED(float, row_factor, kRows);
    GRID_DYNAMIC_SHARED(T, lds);

    int row_blocks = (p.num_tokens * p.heads + kRows - 1) / kRows;
    Block block{block_x() / row_blocks, block_x() % row_blocks * kRows, block_z(), block_y(), p.kv_len[block_z()], 0, 0, p.num_tokens * p.heads};
    int split_start = block.split * kSplit;
    int first_seen = p.window > 0 ? block.len - p.num_tokens - p.window + 1 : 0;
    block.start = larger(split_start, first_seen);
    block.end = smaller(split_start + kSplit, block.len);
    if (block.start >= block.end) return;

    const int* table = p.page_table + block.batch * p.table_stride;
    for (int i = thread_x(); i < kSplit; i += num_threads()) {
        int token = split_start + i;
        bool used = token >= block.start && token < block.end;
        i64 page = used ? table[token / p.page_size] : 0, slot = used ? token % p.page_size : 0;
        k_rows[i] = page * p.k.page_stride + slot * p.k.slot_stride + block.kv_head * p.k.head_stride;
        if (!kShared) v_rows[i] = page * p.v.page_stride + slot * p.v.slot_stride + block.kv_head * p.v.head_stride;
    }
    for (int r = thread_x(); r < kRows; r += num_threads()) row_max[r] = kMinusInf, row_sum[r] = 0.0f;
    int k_width = kExact ? kMaxK : p.k.width, v_width = kExact ? kMaxV : p.v.width;
    int k_stride = kExact ? kMaxK : tile_stride<T>(k_width), v_stride = kShared ? k_stride : tile_stride<T>(v_width);
    Tile<T, kExact> keys{lds, k_stride}, values{lds, v_stride};
    stage_queries(p, block, keys);
    sync();

    // Scores: even waves take tokens 0..15 of a step, odd waves 16..31; pairs of waves share out the steps along K.
    int waves = kOnDevice ? kFewestWaves : num_waves();
    int half = wave() % 2, group = wave() / 2, num_groups = waves / 2, num_steps = (k_width + 31) / 32;
    Fragment<T> q[kSteps];
    GRID_UNROLL for (int s = 0; s < kSteps; ++s) {
        int step = group + s * num_groups;
        if (step < num_steps) q[s] = load_a<T>([&](int row, int k) { return keys.at(row, step * 32 + k); });
    }
    sync();
    // Columns behind the width are read as K and must be zero; the rows that follow leave them alone.
    for (int i = thread_x(); i < kTokens * (k_stride - k_width); i += num_threads())
        *keys.at(i / (k_stride - k_width), k_width + i % (k_stride - k_width)) = from_float<T>(0.0f);

    int stored_end = p.kv_new ? smaller(block.end, block.len - p.num_tokens) : block.end;
    int first = split_start + (block.start - split_start) / kTokens * kTokens;
    Staged<T, kDirect || !kPrefetch ? 1 : kChunksK, !kExact> staged_keys;
    Staged<T, kShared || !kPrefetch ? 1 : kChunksV, !kExact> staged_values;
    if (kPrefetch && !kDirect) staged_keys.fetch(p, block, p.k, first, stored_end, k_rows);
    if (kPrefetch && !kShared) staged_values.fetch(p, block, p.v, first, stored_end, v_rows);
    Accumulator out[kColumns] = {};

    for (; first < block.end; first += kTokens) {
        if constexpr (kDirect) {
            load_tile<kMaxK>(block, p.k, first, stored_end, k_rows, keys);
        } else if constexpr (kPrefetch) {
            staged_keys.put(p, p.k, keys);
        } else {
            copy_tile<kChunksK, !kExact>(p, block, p.k, first, stored_end, k_rows, keys);
        }
        if (p.kv_new && first + kTokens > block.len - p.num_tokens) {
            sync();
            stage_new_rows(p, block, first, keys, k_rows);
        }
        bool more = kPrefetch && first + kTokens < block.end;
        if (more && !kDirect) staged_keys.fetch(p, block, p.k, first + kTokens, stored_end, k_rows);
        sync();

        Accumulator score = {};
        GRID_UNROLL for (int s = 0; s < kSteps; ++s) {
            int step = group + s * num_groups;
            if (step < num_steps) mma(score, q[s], load_b_columns<T>([&](int column, int k) { return keys.at(half * 16 + column, step * 32 + k); }));
            end_of_tiles();
        }
        GRID_UNROLL for (int i = 0; i < kTileC; ++i)
            scores[(group * kRows + c_row(lane(), i)) * kScoreStride + half * 16 + c_col(lane(), i)] = score.v[i];
        sync();

        int column = thread_x() % kTokens, token = first + column;
        for (int r = thread_x() / kTokens; r < kRows; r += num_threads() / kTokens) {
            int position = query_position(p, block, block.first_row + r);
            bool seen = block.first_row + r < block.num_rows && token >= block.start && token <= position && (p.window <= 0 || token > position - p.window);
            float s = 0.0f;
            for (int g = 0; g < num_groups; ++g) s += scores[(g * kRows + r) * kScoreStride + column];
            s *= p.scale;
            if (p.cap > 0.0f) s = p.cap * (1.0f - 2.0f / (exp(2.0f * s / p.cap) + 1.0f));
            s = seen ? s : kMinusInf;
            float old_max = row_max[r], old_sum = row_sum[r];
            float new_max = larger(old_max, lanes_reduce(s, kTokens, [](float a, float b) { return larger(a, b); }));
            float base = new_max == kMinusInf ? 0.0f : new_max;
            float weight = exp(s - base), factor = exp(old_max - base);
            float sum = lanes_reduce(weight, kTokens, [](float a, float b) { return a + b; });
            weights[r * kWeightStride + column] = from_float<T>(weight);
            wave_sync();
            if (column == 0) row_max[r] = new_max, row_sum[r] = old_sum * factor + sum, row_factor[r] = factor;
        }
        if constexpr (!kShared && kPrefetch) {
            staged_values.put(p, p.v, values);
            if (more) staged_values.fetch(p, block, p.v, first + kTokens, stored_end, v_rows);
        } else if constexpr (!kShared) {
            copy_tile<kChunksV, !kExact>(p, block, p.v, first, stored_end, v_rows, values);
        }
        sync();

        // A wave owns 16 * kColumns neighbouring columns; what lies behind the width is read, but goes nowhere.
        int first_column = wave() * 16 * kColumns;
        if (first_column < v_width) {
            Fragment<T> a = load_a<T>([&](int row, int k) { return weights + row * kWeightStride + k; });
            float factors[kTileC];
            GRID_UNROLL for (int i = 0; i < kTileC; ++i) factors[i] = row_factor[c_row(lane(), i)];
            GRID_UNROLL for (int n = 0; n < kColumns; n += kAtOnce) {
                Fragment<T> b[kAtOnce];
                load_b_rows<kColumns>(b, n, [&](int k, int c) { return values.at(k, first_column + c); });
                GRID_UNROLL for (int t = 0; t < kAtOnce; ++t) {
                    GRID_UNROLL for (int i = 0; i < kTileC; ++i) out[n + t].v[i] *= factors[i];
                    mma(out[n + t], a, b[t]);
                }
                end_of_tiles();
            }
        }
        sync();
        // Values were wider than keys, or narrower: what K reads behind its width must be zero again.
        if (!kShared && k_width % 32 && first + kTokens < block.end)
            for (int i = thread_x(); i < kTokens * 16; i += num_threads()) *keys.at(i / 16, k_width + i % 16) = from_float<T>(0.0f);
    }

    i64 place = (static_cast<i64>(block.batch) * p.num_splits + block.split) * p.num_kv_heads * block.num_rows + block.kv_head * block.num_rows + block.first_row;
    int rows = smaller(kRows, block.num_rows - block.first_row), first_column = wave() * 16 * kColumns;
    GRID_UNROLL for (int i = 0; i < kTileC; ++i) {
        int r = c_row(lane(), i);
        GRID_UNROLL for (int n = 0; n < kColumns; ++n) {
            int c = first_column + spread_column<T, kColumns>(c_col(lane(), i), n);
            if (r < rows && c < v_width) p.partial[(place + r) * v_width + c] = out[n].v[i];
        }
    }
    for (int r = thread_x(); r < rows; r += num_threads()) {
        p.stats[(place + r) * 2] = row_max[r];
        p.stats[(place + r) * 2 + 1] = row_sum[r];
    }
}

// Split: one query and head per block, a thread per column. Traffic: the partial sums once.
template <class T>
GRID_DEVICE void merge_splits(const DecodeParams& p) {
    int num_rows = p.num_tokens * p.heads, kv_head = block_x() / num_rows, row = block_x() % num_rows, batch = block_y();
    int token = row / p.heads, head = kv_head * p.heads + row % p.heads, len = p.kv_len[batch];
    int first_seen = p.window > 0 ? larger(0, len - p.num_tokens - p.window + 1) : 0;
    int first = first_seen / kSplit, last = (len + kSplit - 1) / kSplit;
    i64 rows_per_split = static_cast<i64>(p.num_kv_heads) * num_rows;
    i64 place = (static_cast<i64>(batch) * p.num_splits + first) * rows_per_split + block_x();
    float top = p.sinks ? p.sinks[head] : kMinusInf;
    for (int s = first; s < last; ++s) top = larger(top, p.stats[(place + (s - first) * rows_per_split) * 2]);
    if (top == kMinusInf) top = 0.0f;
    float total = p.sinks ? exp(p.sinks[head] - top) : 0.0f;
    for (int s = first; s < last; ++s) {
        const float* stats = p.stats + (place + (s - first) * rows_per_split) * 2;
        total += stats[1] * exp(stats[0] - top);
    }
    i64 query = (static_cast<i64>(batch) * p.num_tokens + token) * p.num_kv_heads * p.heads + head;
    for (int column = thread_x(); column < p.v.width; column += num_threads()) {
        float sum = 0.0f;
        for (int s = first; s < last; ++s) {
            i64 own = place + (s - first) * rows_per_split;
            sum += p.partial[own * p.v.width + column] * exp(p.stats[own * 2] - top);
        }
        float value = total > 0.0f ? sum / total * p.out_scale : 0.0f;
        static_cast<T*>(p.o)[query * p.v.width + column] = from_float<T>(value);
    }
}

inline int check_cache(const Args& args, const char* name, const Tensor& cache, int most) {
    int last = cache.rank - 1;
    if (cache.size[last] % 16 || cache.size[last] > most)
        return fail(args, "%s: expected a width that is a multiple of 16 and at most %d, got %lld", name, most, cache.size[last]);
    if (!aligned(cache, cache.size[last], 16)) return fail(args, "%s: expected rows that start at multiples of 16 bytes", name);
    return 0;
}

// LDS for a tile; the last row is read up to the widest value row that the kernel is made for.
template <class T>
i64 tile_bytes(const DecodeParams& p, int most_v) {
    int widest = p.k.width > p.v.width ? p.k.width : p.v.width;
    i64 stride = (widest + 31) / 32 * 32 + 16 / static_cast<int>(sizeof(T));
    return (kTokens * stride + (most_v > stride ? most_v - stride : 0)) * static_cast<i64>(sizeof(T));
}

}  // namespace grid
