// SPDX-License-Identifier: Apache-2.0
// Attention of a few new tokens per sequence over a paged cache, in splits of a fixed number of tokens and a merge: the core of
// attn_decode and of mla_decode. Source: Dao et al. 2022; split over keys as in Flash-Decoding.
#pragma once

#include "grid/mma.h"
#include "rope.h"

namespace grid {

constexpr int kTileRows = 16;     // queries of a matrix tile
constexpr int kTokens = 32;       // tokens per step: one tile deep
constexpr int kSplit = 256;       // tokens per block; fixed, so that sums do not depend on what else is in the batch
constexpr int kBlockThreads = 256;
// The race detector can follow fewer threads, so on the host half a block must do.
constexpr int kFewestThreads = kOnDevice ? kBlockThreads : 128;
constexpr int kFewestWaves = kFewestThreads / kWave;
constexpr int kRowThreads = kFewestThreads / kTokens;  // that move a cache row, 16 bytes each at a time
constexpr int kScoreThreads = 16;                      // that share the scores of a query: a ring
constexpr int kScores = kTokens / kScoreThreads;       // of each of them
// Two tiles of queries share a pass over the cache where a lane has the registers for both.
constexpr int kMostRowTiles = kWave == 64 ? 2 : 1;
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
    i64 page_bytes, slot_bytes, head_bytes;  // from one to the next
    int width, chunks;                       // elements of a row; its parts of 16 bytes
};

inline CacheView view_of(const Tensor& cache, i64 head_stride) {
    i64 item = item_size(cache.type), width = cache.size[cache.rank - 1];
    return {cache.data, cache.stride[0] * item, cache.stride[1] * item, head_stride * item, static_cast<int>(width), static_cast<int>(width * item / 16)};
}

struct DecodeParams {
    const void* q;  // [B, S, H, width of k]
    i64 q_batch_stride, q_token_stride, q_head_stride;
    CacheView k, v;
    CacheType type;
    const int* page_table;  // [B, W]
    const int* kv_len;      // [B]
    i64 table_stride;
    float* partial;  // [B, splits, rows, width of v]: sums of weight times value
    float* stats;    // [B, splits, rows, 2]: the largest score, in base 2, and the sum of weights
    void* o;         // [B, S, H, width of v]
    const float* sinks;
    int page_size, num_splits, num_tokens, heads, num_kv_heads, row_blocks;  // tokens S; heads per kv head; blocks of their rows
    float scale, cap, out_scale;                                            // scores times scale are in base 2
    int window;
    bool wide;  // rows of q and of kv_new can be read in vectors, none of which is rotated in part
    // mla_decode only: rows that are still to be written, and the rotation of the part behind `latent`.
    const void* kv_new;  // [B, S, width of k], or null
    void* cache;
    i64 new_batch_stride, new_token_stride, positions_stride;
    int latent;
    Rope rope;
};

inline int num_splits_of(const Tensor& page_table, i64 page_size) { return static_cast<int>(ceil_div(page_table.size[1] * page_size, kSplit)); }

// What a kernel is compiled for. kShared: values are the keys' first columns. kCodes: the cache is fp8. kRowTiles: tiles of queries
// of a block. kExact: widths are kMaxK and kMaxV, not less.
template <class Element, int kMaxK_, int kMaxV_, bool kShared_, bool kCodes_, int kRowTiles_ = 1, bool kExact_ = false>
struct Shape {
    using T = Element;
    static constexpr int kMaxK = kMaxK_, kMaxV = kMaxV_, kRowTiles = kRowTiles_;
    static constexpr bool kShared = kShared_, kCodes = kCodes_, kExact = kExact_;
    static constexpr int kRows = kTileRows * kRowTiles;
    static constexpr int kPaddedK = (kMaxK + 31) / 32 * 32;  // whole steps along K
    static constexpr int kStride = (kPaddedK > kMaxV ? kPaddedK : kMaxV) + 16 / static_cast<int>(sizeof(T));
    static constexpr bool kDirect = kExact && kShared && !kCodes && kLoadsToLds;  // rows go past the registers
    static constexpr int kItem = kCodes ? 1 : sizeof(T);
    static constexpr int kChunksK = (kPaddedK * kItem / 16 + kRowThreads - 1) / kRowThreads;
    static constexpr int kChunksV = (kMaxV * kItem / 16 + kRowThreads - 1) / kRowThreads;
    static constexpr int kGroups = kFewestWaves / 2;  // of waves, that share out the steps along K
    static constexpr int kSteps = (kPaddedK / 32 + kGroups - 1) / kGroups;
    static constexpr int kColumns = (kMaxV / 16 + kFewestWaves - 1) / kFewestWaves;
    static constexpr int kAtOnce = kColumns < kMostTilesAtOnce ? kColumns : kMostTilesAtOnce;
    static constexpr int kScoreStride = kTokens + 4;
    static constexpr int kWeightStride = kTokens + 16 / static_cast<int>(sizeof(T));
    static constexpr int kParts = kBlockThreads / kWave / 2;
    static constexpr int kPasses = kRows * kScoreThreads / kFewestThreads;
};

// LDS for a tile of rows, or for the queries.
template <class S>
constexpr i64 tile_bytes() {
    return static_cast<i64>(kTokens) * S::kStride * sizeof(typename S::T);
}

// Rows in LDS, with 16 bytes between them so that neighbours start in other banks. Loads past the registers leave no gaps: for them a
// tile is in blocks of 128 bytes of every row, and neighbouring rows keep the chunks of a block in other orders.
template <class T, int kStride, bool kBlocked>
struct Tile {
    T* data;

    static constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kBlock = 8 * kChunk;

    static GRID_DEVICE int order(int row) { return row / (kLdsBanks / 32) % 8; }
    GRID_DEVICE T* at(int row, int column) const {
        if (!kBlocked) return data + row * kStride + column;
        return data + (column / kBlock * kTokens + row) * kBlock + (column / kChunk % 8 ^ order(row)) * kChunk + column % kChunk;
    }
};

template <class S>
using QueryTile = Tile<typename S::T, S::kStride, false>;
template <class S>
using CacheTile = Tile<typename S::T, S::kStride, S::kDirect>;

struct Block {
    int kv_head, first_row, batch, split;
    int len;         // tokens of the sequence
    int start, end;  // tokens of this split that anybody may see
    int num_rows;    // S * heads

    GRID_DEVICE int split_start() const { return split * kSplit; }
};

template <class S>
GRID_DEVICE Block this_block(const DecodeParams& p) {
    int kv_head = p.row_blocks == 1 ? block_x() : block_x() / p.row_blocks;
    Block block{kv_head, (block_x() - kv_head * p.row_blocks) * S::kRows, block_z(), block_y(), p.kv_len[block_z()], 0, 0, p.num_tokens * p.heads};
    int first_seen = p.window > 0 ? block.len - p.num_tokens - p.window + 1 : 0;
    block.start = larger(block.split_start(), first_seen);
    block.end = smaller(block.split_start() + kSplit, block.len);
    return block;
}

// Which of the new tokens is a row's.
GRID_DEVICE int token_of(const DecodeParams& p, int row) { return p.num_tokens == 1 ? 0 : row / p.heads; }

// Known when a kernel for the device is compiled, so that what each thread does once is no loop.
GRID_DEVICE int block_threads() { return kOnDevice ? kBlockThreads : num_threads(); }

// Where the rows of the split's tokens are in the cache; nothing for tokens that nobody sees.
template <bool kShared>
GRID_DEVICE void find_rows(const DecodeParams& p, const Block& block, i64* k_rows, i64* v_rows) {
    const int* table = p.page_table + block.batch * p.table_stride;
    for (int i = thread_x(); i < kSplit; i += block_threads()) {
        int token = block.split_start() + i;
        if (token < block.start || token >= block.end) continue;
        u32 place = static_cast<u32>(token) / static_cast<u32>(p.page_size), slot = token - place * p.page_size;
        i64 page = table[place];
        k_rows[i] = page * p.k.page_bytes + slot * p.k.slot_bytes + block.kv_head * p.k.head_bytes;
        if (!kShared) v_rows[i] = page * p.v.page_bytes + slot * p.v.slot_bytes + block.kv_head * p.v.head_bytes;
    }
}

// N neighbouring columns of a row [c | pe], rotated behind `latent`, as fp32.
template <class T, int N>
GRID_DEVICE void load_rotated(float (&values)[N], const DecodeParams& p, const T* row, int column, const float* cosines) {
    load_wide<T, N>(values, row + column);
    int half = p.rope.half, j = column - p.latent;
    if (!cosines || j < 0 || j >= 2 * half) return;
    if (N > 1 && p.rope.interleaved) {
        GRID_UNROLL for (int i = 0; i < N / 2; ++i) rotate(values[2 * i], values[2 * i + 1], cosines[j / 2 + i], cosines[half + j / 2 + i]);
        return;
    }
    int pair = p.rope.interleaved ? j / 2 : j % half, distance = p.rope.interleaved ? 1 : half;
    bool is_low = j == (p.rope.interleaved ? 2 * pair : pair);
    float other[N];
    load_wide<T, N>(other, row + column + (is_low ? distance : -distance));
    GRID_UNROLL for (int i = 0; i < N; ++i) {
        float a = is_low ? values[i] : other[i], b = is_low ? other[i] : values[i];
        rotate(a, b, cosines[pair + i], cosines[half + pair + i]);
        values[i] = is_low ? a : b;
    }
}

GRID_DEVICE const float* cosines_of(const DecodeParams& p, int batch, int token) {
    return p.rope.table ? p.rope.table + p.rope.positions[batch * p.positions_stride + token] * p.rope.table_stride : nullptr;
}

// The block's queries into LDS, rotated, zeros where there are none.
template <class S, int N>
GRID_DEVICE void stage_queries(const DecodeParams& p, const Block& block, const QueryTile<S>& tile) {
    using T = typename S::T;
    constexpr int kPerRow = S::kPaddedK / N;
    for (int i = thread_x(); i < S::kRows * kPerRow; i += block_threads()) {
        int r = i / kPerRow, column = (i - r * kPerRow) * N, row = block.first_row + r;
        Vec<T, N> vec = {};
        if (row < block.num_rows && column < p.k.width) {
            int token = token_of(p, row), head = block.kv_head * p.heads + row - token * p.heads;
            const T* q = static_cast<const T*>(p.q) + block.batch * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
            if (S::kShared && column >= p.latent) {
                float values[N];
                load_rotated<T, N>(values, p, q, column, cosines_of(p, block.batch, token));
                vec = rounded<T, N>(values);
            } else {
                vec = load<N>(q + column);
            }
        }
        store(tile.at(r, column), vec);
    }
}

struct alignas(16) Chunk {
    u32 words[4];
};

// A row's place among the threads that move it: each takes the chunks `lane`, `lane` + kRowThreads, ...
struct Mover {
    int row, lane;

    GRID_DEVICE bool is_idle() const { return !kOnDevice && row >= kTokens; }
};

GRID_DEVICE Mover this_mover() { return {thread_x() / kRowThreads, thread_x() % kRowThreads}; }

// kTokens cache rows on their way from memory to LDS through registers, so that the loads of the next rows fly while these are worked on.
template <class S, int kChunks, int kWidth>
struct Staged {
    static constexpr int kRowChunks = kWidth * S::kItem / 16;  // at most

    u32 words[kChunks][4];  // not whole chunks: as such the compiler would keep them in scratch memory

    // A row that is not to be read leaves what is there: one that all queries see, or zeros.
    GRID_DEVICE void fetch(const Block& block, const CacheView& view, int first, int end, const i64* rows, int skip = 0) {
        Mover mover = this_mover();
        int token = first + mover.row;
        if (mover.is_idle() || token < block.start || token >= end) return;
        const char* row = static_cast<const char*>(view.data) + rows[token - block.split_start()] + mover.lane * 16;
        GRID_UNROLL for (int i = 0; i < kChunks; ++i) {
            int c = (skip + i) * kRowThreads;
            if (!(S::kExact && c + kRowThreads <= kRowChunks) && c + mover.lane >= view.chunks) continue;
            Chunk chunk = *reinterpret_cast<const Chunk*>(row + c * 16);
            GRID_UNROLL for (int w = 0; w < 4; ++w) words[i][w] = chunk.words[w];
        }
    }

    template <class Tile>
    GRID_DEVICE void put(const DecodeParams& p, const Tile& tile, int skip = 0) const {
        if constexpr (S::kCodes) {
            if (kHasFp8 && p.type.fnuz == kFnuzHere) return put_codes<true>(p.type.fnuz, tile, skip);
            return put_codes<false>(p.type.fnuz, tile, skip);
        } else {
            Mover mover = this_mover();
            if (mover.is_idle()) return;
            GRID_UNROLL for (int i = 0; i < kChunks; ++i) {
                int column = (mover.lane + (skip + i) * kRowThreads) * Tile::kChunk;
                if (column < S::kStride - Tile::kChunk) *reinterpret_cast<Chunk*>(tile.at(mover.row, column)) = {words[i][0], words[i][1], words[i][2], words[i][3]};
            }
        }
    }

  private:
    template <bool kNative, class Tile>
    GRID_DEVICE void put_codes(bool fnuz, const Tile& tile, int skip) const {
        using T = typename S::T;
        constexpr int kVector = Tile::kChunk, kWords = kVector / 4;
        Mover mover = this_mover();
        if (mover.is_idle()) return;
        GRID_UNROLL for (int i = 0; i < kChunks; ++i) {
            int column = (mover.lane + (skip + i) * kRowThreads) * 16;
            if (column >= S::kStride - kVector) continue;
            GRID_UNROLL for (int w = 0; w < 4; w += kWords) {
                Vec<T, kVector> vec;
                GRID_UNROLL for (int n = 0; n < kVector; n += 4) {
                    Vec<T, 4> four = decode_word<T, kNative>(words[i][w + n / 4], fnuz);
                    GRID_UNROLL for (int j = 0; j < 4; ++j) vec.v[n + j] = four.v[j];
                }
                store(tile.at(mover.row, column + 4 * w), vec);
            }
        }
    }
};

// The same rows in pieces, each of which is in LDS before the next is asked for.
template <class S, int kChunks, int kWidth, class Tile>
GRID_DEVICE void copy_tile(const DecodeParams& p, const Block& block, const CacheView& view, int first, int end, const i64* rows, const Tile& tile) {
    constexpr int kPiece = 3;
    for (int skip = 0; skip < kChunks; skip += kPiece) {
        Staged<S, kPiece, kWidth> part = {};
        part.fetch(block, view, first, end, rows, skip);
        part.put(p, tile, skip);
    }
}

// The same rows straight to LDS, which keeps the registers free for other blocks' work. Those that nobody may see become zeros.
template <class S>
GRID_DEVICE void load_tile(const Block& block, const CacheView& view, int first, int end, const i64* rows, const CacheTile<S>& tile) {
    constexpr int kBlock = CacheTile<S>::kBlock, kChunk = CacheTile<S>::kChunk, kBlocks = S::kMaxK / kBlock;
    for (int pass = 0; pass < kTokens * 8 / kFewestThreads; ++pass) {
        int base = pass * block_threads(), row = (base + thread_x()) / 8, token = first + row;
        if (row >= kTokens) continue;
        typename S::T* to = tile.data + (base + wave() * kWave) * kChunk;
        if (token >= block.start && token < end) {
            const char* from = static_cast<const char*>(view.data) + rows[token - block.split_start()] + (thread_x() % 8 ^ tile.order(row)) * 16;
            GRID_UNROLL for (int b = 0; b < kBlocks; ++b) load_to_lds(from + b * 128, to + b * kTokens * kBlock);
        } else {
            GRID_UNROLL for (int b = 0; b < kBlocks; ++b) *reinterpret_cast<Chunk*>(to + b * kTokens * kBlock + lane() * kChunk) = {};
        }
    }
    wait_for_lds();
}

// The new rows of the tile, rotated and rounded as the cache holds them; the block of the first queries also writes the cache.
template <class S, int N, class Tile>
GRID_DEVICE void stage_new_rows(const DecodeParams& p, const Block& block, int first, const Tile& tile, const i64* rows) {
    using T = typename S::T;
    int begin = larger(first, block.len - p.num_tokens), end = smaller(first + kTokens, block.end), per_row = p.k.width / N;
    for (int i = thread_x(); i < (end - begin) * per_row; i += block_threads()) {
        int token = begin + i / per_row, column = i % per_row * N, number = token - (block.len - p.num_tokens);
        const T* row = static_cast<const T*>(p.kv_new) + block.batch * p.new_batch_stride + number * p.new_token_stride;
        float values[N];
        load_rotated<T, N>(values, p, row, column, cosines_of(p, block.batch, number));
        char* kept = static_cast<char*>(p.cache) + rows[token - block.split_start()];
        if constexpr (S::kCodes) {
            GRID_UNROLL for (int n = 0; n < N; ++n) values[n] = values[n] / p.type.scale;
            Vec<fp8, N> codes = encode(values, p.type.fnuz);
            if (block.first_row == 0) store(reinterpret_cast<fp8*>(kept) + column, codes);
            GRID_UNROLL for (int n = 0; n < N; ++n) values[n] = decode(codes.v[n], p.type.fnuz);
            store(tile.at(token - first, column), rounded<T, N>(values));
        } else {
            Vec<T, N> vec = rounded<T, N>(values);
            if (block.first_row == 0) store(reinterpret_cast<T*>(kept) + column, vec);
            store(tile.at(token - first, column), vec);
        }
    }
}

// A wave's place in the products of queries and keys: which 16 tokens of a step, and which steps along K.
struct Place {
    int half, group, num_groups;
};

GRID_DEVICE Place this_place() { return {wave() % 2, wave() / 2, (kOnDevice ? kFewestWaves : num_waves()) / 2}; }

template <class S>
struct Queries {
    Fragment<typename S::T> tiles[S::kRowTiles][S::kSteps];

    GRID_DEVICE void load(const QueryTile<S>& tile, const Place& place, int num_steps) {
        GRID_UNROLL for (int t = 0; t < S::kRowTiles; ++t) GRID_UNROLL for (int s = 0; s < S::kSteps; ++s) {
            int step = place.group + s * place.num_groups;
            if (step < num_steps)
                tiles[t][s] = load_b_columns<typename S::T>([&](int column, int k) { return tile.at(t * kTileRows + column, step * 32 + k); });
        }
    }

    // Keys times queries, so that a lane's scores are those of neighbouring tokens and leave it as one.
    GRID_DEVICE void score(const CacheTile<S>& keys, const Place& place, int num_steps, float* scores) const {
        Accumulator sums[S::kRowTiles] = {};
        GRID_UNROLL for (int s = 0; s < S::kSteps; ++s) {
            int step = place.group + s * place.num_groups;
            if (step < num_steps) {
                auto key = load_a<typename S::T>([&](int row, int k) { return keys.at(place.half * 16 + row, step * 32 + k); });
                GRID_UNROLL for (int t = 0; t < S::kRowTiles; ++t) mma(sums[t], key, tiles[t][s]);
            }
            end_of_tiles();
        }
        GRID_UNROLL for (int t = 0; t < S::kRowTiles; ++t) GRID_UNROLL for (int i = 0; i < kTileC; ++i) {
            int row = t * kTileRows + c_col(lane(), i), token = place.half * 16 + c_row(lane(), i);
            scores[(place.group * S::kRows + row) * S::kScoreStride + token] = sums[t].v[i];
        }
    }
};

// The running softmax of the queries whose scores a thread shares, kPasses of them.
template <class S>
struct Softmax {
    float highest[S::kPasses], sum[S::kPasses];  // base 2; the sum is of this thread's tokens
    int low[S::kPasses], count[S::kPasses];      // a query sees tokens low .. low + count

    static GRID_DEVICE int row(int pass) { return thread_x() / kScoreThreads + pass * (block_threads() / kScoreThreads); }

    GRID_DEVICE void start(const DecodeParams& p, const Block& block) {
        GRID_UNROLL for (int pass = 0; pass < S::kPasses; ++pass) {
            int position = block.len - p.num_tokens + token_of(p, block.first_row + row(pass));
            highest[pass] = kMinusInf, sum[pass] = 0.0f;
            low[pass] = p.window > 0 ? larger(position - p.window + 1, 0) : 0;
            count[pass] = larger(position + 1 - low[pass], 0);
        }
    }

    // Scores [groups, kRows, tokens] of a step to weights, and the factors of what was summed before.
    GRID_DEVICE void step(const DecodeParams& p, int first, int num_groups, const float* scores, typename S::T* weights, float* factors) {
        int column = thread_x() % kScoreThreads * kScores;
        GRID_UNROLL for (int pass = 0; pass < S::kPasses; ++pass) {
            int r = row(pass);
            if (!kOnDevice && r >= S::kRows) continue;
            Vec<float, kScores> s = load<kScores>(scores + r * S::kScoreStride + column);
            for (int g = 1; g < num_groups; ++g) {
                Vec<float, kScores> part = load<kScores>(scores + (g * S::kRows + r) * S::kScoreStride + column);
                GRID_UNROLL for (int j = 0; j < kScores; ++j) s.v[j] += part.v[j];
            }
            GRID_UNROLL for (int j = 0; j < kScores; ++j) s.v[j] *= p.scale;
            if (p.cap > 0.0f)
                GRID_UNROLL for (int j = 0; j < kScores; ++j) s.v[j] = p.cap * kLog2E * (1.0f - 2.0f / (exp2(2.0f * s.v[j] / p.cap) + 1.0f));
            float peak = highest[pass], total = 0.0f;
            GRID_UNROLL for (int j = 0; j < kScores; ++j) {
                bool seen = static_cast<u32>(first + column + j - low[pass]) < static_cast<u32>(count[pass]);
                s.v[j] = seen ? s.v[j] : kMinusInf;
                peak = fmax(peak, s.v[j]);
            }
            peak = ring_reduce(peak, [](float a, float b) { return fmax(a, b); });
            float base = peak == kMinusInf ? 0.0f : peak, factor = exp2(highest[pass] - base);
            Vec<typename S::T, kScores> kept;
            GRID_UNROLL for (int j = 0; j < kScores; ++j) {
                float weight = exp2(s.v[j] - base);
                total += weight;
                kept.v[j] = from_float<typename S::T>(weight);
            }
            store(weights + r * S::kWeightStride + column, kept);
            highest[pass] = peak, sum[pass] = sum[pass] * factor + total;
            if (column == 0) factors[r] = factor;
        }
    }

    GRID_DEVICE void finish(float* stats, int rows) {
        GRID_UNROLL for (int pass = 0; pass < S::kPasses; ++pass) {
            float total = ring_reduce(sum[pass], [](float a, float b) { return a + b; });
            Vec<float, 2> both = {{highest[pass], total}};
            if (row(pass) < rows && thread_x() % kScoreThreads == 0) store(stats + row(pass) * 2, both);
        }
    }
};

// Sums of weights times values. A wave owns 16 * kColumns neighbouring columns; what lies behind the width is read, but goes nowhere.
template <class S>
struct Sums {
    Accumulator tiles[S::kRowTiles][S::kColumns] = {};
    int first_column = wave() * 16 * S::kColumns;

    GRID_DEVICE void add(const CacheTile<S>& values, const typename S::T* weights, const float* factors) {
        using T = typename S::T;
        Fragment<T> a[S::kRowTiles];
        float own[S::kRowTiles][kTileC];
        GRID_UNROLL for (int t = 0; t < S::kRowTiles; ++t) {
            a[t] = load_a<T>([&](int row, int k) { return weights + (t * kTileRows + row) * S::kWeightStride + k; });
            GRID_UNROLL for (int i = 0; i < kTileC; ++i) own[t][i] = factors[t * kTileRows + c_row(lane(), i)];
        }
        GRID_UNROLL for (int n = 0; n < S::kColumns; n += S::kAtOnce) {
            Fragment<T> b[S::kAtOnce];
            load_b_rows<S::kColumns>(b, n, [&](int k, int c) { return values.at(k, first_column + c); });
            GRID_UNROLL for (int t = 0; t < S::kRowTiles; ++t) GRID_UNROLL for (int m = 0; m < S::kAtOnce; ++m) {
                multiply(tiles[t][n + m], own[t]);
                mma(tiles[t][n + m], a[t], b[m]);
            }
            end_of_tiles();
        }
    }

    GRID_DEVICE void write(float* partial, int width, int rows) const {
        if (first_column >= width) return;
        GRID_UNROLL for (int t = 0; t < S::kRowTiles; ++t) GRID_UNROLL for (int i = 0; i < kTileC; ++i) {
            int r = t * kTileRows + c_row(lane(), i);
            if (r >= rows) continue;
            GRID_UNROLL for (int n = 0; n < S::kColumns; ++n) {
                int column = first_column + spread_column<typename S::T, S::kColumns>(c_col(lane(), i), n);
                if (S::kExact || column < width) partial[static_cast<u32>(r * width + column)] = tiles[t][n].v[i];
            }
        }
    }
};

// Split: a block owns 16 or 32 queries of one kv head (heads of a group, or heads and new tokens that share a latent) and kSplit tokens.
// Traffic: each cache row of the split comes from memory once per block, in 16-byte loads, and once more through LDS.
// A step of 32 tokens: rows to LDS; scores, waves sharing out tokens and K; softmax, 16 lanes per query; weights times values,
// waves sharing out columns. Values overwrite the keys in LDS, unless they are the keys' first columns.
// Needs: widths of 16 * n up to kMaxK and kMaxV; cache rows at multiples of 16 bytes.
template <class S>
GRID_DEVICE void decode_split(const DecodeParams& p) {
    using T = typename S::T;
    GRID_SHARED(i64, k_rows, kSplit);
    GRID_SHARED(i64, v_rows, S::kShared ? 1 : kSplit);
    GRID_SHARED(float, scores, S::kParts * S::kRows * S::kScoreStride);
    GRID_SHARED(T, weights, S::kRows * S::kWeightStride);
    GRID_SHARED(float, factors, S::kRows);
    GRID_DYNAMIC_SHARED(T, lds);

    Block block = this_block<S>(p);
    if (block.start >= block.end) return;
    find_rows<S::kShared>(p, block, k_rows, v_rows);
    QueryTile<S> queries{lds};
    CacheTile<S> tile{lds};
    constexpr int kWide = 16 / sizeof(T);
    if (p.wide) {
        stage_queries<S, kWide>(p, block, queries);
    } else {
        stage_queries<S, 1>(p, block, queries);
    }
    sync();

    Place place = this_place();
    int num_steps = S::kExact ? S::kPaddedK / 32 : (p.k.width + 31) / 32, v_width = S::kExact ? S::kMaxV : p.v.width;
    int stored_end = p.kv_new ? smaller(block.end, block.len - p.num_tokens) : block.end;
    int first = block.split_start() + (block.start - block.split_start()) / kTokens * kTokens;
    Staged<S, S::kDirect || !kPrefetch ? 1 : S::kChunksK, S::kMaxK> staged_keys = {};
    Staged<S, S::kShared || !kPrefetch ? 1 : S::kChunksV, S::kMaxV> staged_values = {};
    if (kPrefetch && !S::kDirect) staged_keys.fetch(block, p.k, first, stored_end, k_rows);
    if (kPrefetch && !S::kShared) staged_values.fetch(block, p.v, first, stored_end, v_rows);
    Queries<S> q;
    q.load(queries, place, num_steps);
    Softmax<S> softmax;
    softmax.start(p, block);
    Sums<S> sums;
    sync();

    for (; first < block.end; first += kTokens) {
        if constexpr (S::kDirect) {
            load_tile<S>(block, p.k, first, stored_end, k_rows, tile);
        } else if constexpr (kPrefetch) {
            staged_keys.put(p, tile);
        } else {
            copy_tile<S, S::kChunksK, S::kMaxK>(p, block, p.k, first, stored_end, k_rows, tile);
        }
        if constexpr (S::kShared) {
            if (p.kv_new && first + kTokens > block.len - p.num_tokens) {
                sync();
                if (p.wide) {
                    stage_new_rows<S, kWide>(p, block, first, tile, k_rows);
                } else {
                    stage_new_rows<S, 1>(p, block, first, tile, k_rows);
                }
            }
        }
        bool more = kPrefetch && first + kTokens < block.end;
        if (more && !S::kDirect) staged_keys.fetch(block, p.k, first + kTokens, stored_end, k_rows);
        sync();

        q.score(tile, place, num_steps, scores);
        sync();

        softmax.step(p, first, place.num_groups, scores, weights, factors);
        if constexpr (!S::kShared && kPrefetch) {
            staged_values.put(p, tile);
            if (more) staged_values.fetch(block, p.v, first + kTokens, stored_end, v_rows);
        } else if constexpr (!S::kShared) {
            copy_tile<S, S::kChunksV, S::kMaxV>(p, block, p.v, first, stored_end, v_rows, tile);
        }
        sync();

        if (sums.first_column < v_width) sums.add(tile, weights, factors);
        sync();
    }

    i64 rows_before = ((static_cast<i64>(block.batch) * p.num_splits + block.split) * p.num_kv_heads + block.kv_head) * block.num_rows + block.first_row;
    int rows = smaller(S::kRows, block.num_rows - block.first_row);
    sums.write(p.partial + rows_before * v_width, v_width, rows);
    softmax.finish(p.stats + rows_before * 2, rows);
}

// Split: one query and head per block, kMergeColumns neighbouring columns per thread. Traffic: the partial sums once.
constexpr int kMergeColumns = 4;

template <class T>
GRID_DEVICE void merge_splits(const DecodeParams& p) {
    int num_rows = p.num_tokens * p.heads, row = p.num_kv_heads == 1 ? block_x() : block_x() % num_rows, kv_head = p.num_kv_heads == 1 ? 0 : block_x() / num_rows;
    int token = token_of(p, row), head = kv_head * p.heads + row - token * p.heads, batch = block_y(), len = p.kv_len[batch];
    int first_seen = p.window > 0 ? larger(0, len - p.num_tokens - p.window + 1) : 0;
    int first = first_seen / kSplit, count = (len + kSplit - 1) / kSplit - first;
    i64 rows_per_split = static_cast<i64>(p.num_kv_heads) * num_rows;
    i64 place = (static_cast<i64>(batch) * p.num_splits + first) * rows_per_split + block_x();
    const float *stats = p.stats + place * 2, *partial = p.partial + place * p.v.width;
    float sink = p.sinks ? p.sinks[head] * kLog2E : kMinusInf, top = sink;
    for (int s = 0; s < count; ++s) top = larger(top, stats[s * rows_per_split * 2]);
    if (top == kMinusInf) top = 0.0f;
    i64 query = (static_cast<i64>(batch) * p.num_tokens + token) * p.num_kv_heads * p.heads + head;
    for (int column = thread_x() * kMergeColumns; column < p.v.width; column += num_threads() * kMergeColumns) {
        float sums[kMergeColumns] = {}, total = exp2(sink - top);
        for (int s = 0; s < count; ++s) {
            const float* own = stats + s * rows_per_split * 2;
            float weight = exp2(own[0] - top);
            total += own[1] * weight;
            Vec<float, kMergeColumns> part = load<kMergeColumns>(partial + s * rows_per_split * p.v.width + column);
            GRID_UNROLL for (int i = 0; i < kMergeColumns; ++i) sums[i] += part.v[i] * weight;
        }
        float factor = total > 0.0f ? p.out_scale / total : 0.0f;
        GRID_UNROLL for (int i = 0; i < kMergeColumns; ++i) sums[i] *= factor;
        store(static_cast<T*>(p.o) + query * p.v.width + column, rounded<T, kMergeColumns>(sums));
    }
}

inline int check_cache(const Args& args, const char* name, const Tensor& cache, int most) {
    int last = cache.rank - 1;
    if (cache.size[last] % 16 || cache.size[last] > most)
        return fail(args, "%s: expected a width that is a multiple of 16 and at most %d, got %lld", name, most, cache.size[last]);
    if (!aligned(cache, cache.size[last], 16)) return fail(args, "%s: expected rows that start at multiples of 16 bytes", name);
    return 0;
}

}  // namespace grid
