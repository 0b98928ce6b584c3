// SPDX-License-Identifier: Apache-2.0
#include "rank.h"

using namespace grid;

constexpr int kSplit = 4096;  // tokens of a block; fixed, so that nothing depends on what else is in the batch
constexpr int kMostSplits = 64;
constexpr int kThreads = 256;
constexpr int kAtOnce = 8;  // tokens that a thread loads at once
// The race detector can follow fewer threads, so on the host a wave must do.
constexpr int kSteps = kSplit / (kOnDevice ? kThreads : kWave) / kAtOnce;

// A token's depth is how far its logit lies below the row's largest, over the temperature; exp(-depth) is its share.
constexpr int kBins = 64;            // by which tokens are counted, bins of equal depth
constexpr float kBinsPerDepth = 2.25f;
constexpr float kDeepest = 27.8f;    // weights of deeper tokens are 0; all bins together reach a little further
constexpr float kLeastOfMost = 0.41f;  // of a bin's largest share a token has at least this: exp(-2 / kBinsPerDepth)
constexpr int kRadix = 256;

struct SampleParams {
    i64* ids;             // [B]
    float* logprob;       // [B]
    i64* top_ids;         // [B, num_logprobs], or null
    float* top_logprobs;  // the same
    // What the kernels tell each other, S splits of a row.
    float* shaped;        // [B, V], or null where the logits stay as given
    u64* keys;            // [B, 2, S]: rank_key of the best token, +inf if any is broken; the same of the logits as given
    float* sums;          // [B, S]: of the exponentials of the logits as given
    int* bins;            // [B, S, kBins]
    float* candidates;    // [B, V]: logits that top-k and top-p may keep, those of a split from its start on
    int* num_candidates;  // [B, S]
    u64* masses;          // [B, S]: of all tokens of a split, or of those that min-p keeps where nothing else is asked for
    const void* logits;   // [B, V]
    i64 logits_stride;
    int type, vocab, num_splits, num_logprobs;
    bool aligned, shaped_aligned;  // whether 16 bytes of logits and of all tables, and of shaped logits, can be loaded at once
    const float* temperature;      // [B] each
    const int* top_k;
    const float *top_p, *min_p;
    const i64 *seeds, *counters;
    const int* output_counts;  // [B, V], or null
    const u8* prompt_seen;     // [B, V], or null
    const float *presence, *frequency, *repetition;  // [B], or null
    const float* bias;         // [B, V], or null
    const int* mask;           // [B, ceil(V / 32)], or null
    i64 counts_stride, seen_stride, bias_stride, mask_stride;
};

// ---- loading

template <class T>
GRID_DEVICE void load_values(T (&to)[kAtOnce], const T* row, int first, int end, bool is_aligned, T beyond) {
    constexpr int kVector = sizeof(T) < 4 ? kAtOnce : 4;
    if (is_aligned && first + kAtOnce <= end) {
        GRID_UNROLL for (int i = 0; i < kAtOnce; i += kVector) {
            Vec<T, kVector> part = load<kVector>(row + first + i);
            GRID_UNROLL for (int j = 0; j < kVector; ++j) to[i + j] = part.v[j];
        }
    } else {
        GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) to[i] = first + i < end ? row[first + i] : beyond;
    }
}

// Logits of one split as fp32, -inf beyond its end.
struct Split {
    const void* row;
    int type, start, end;
    bool is_aligned;

    GRID_DEVICE void load(float (&x)[kAtOnce], int first) const {
        if (type == kF32) return load_values(x, static_cast<const float*>(row), first, end, is_aligned, kMinusInf);
        u16 bits[kAtOnce];
        load_values(bits, static_cast<const u16*>(row), first, end, is_aligned, static_cast<u16>(type == kBf16 ? 0xFF80 : 0xFC00));
        GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) x[i] = type == kBf16 ? to_float(bf16{bits[i]}) : to_float(f16{bits[i]});
    }
};

GRID_DEVICE Split given_split(const SampleParams& p, i64 row, int split) {
    const char* start = static_cast<const char*>(p.logits) + row * p.logits_stride * (p.type == kF32 ? 4 : 2);
    return {start, p.type, split * kSplit, smaller((split + 1) * kSplit, p.vocab), p.aligned};
}

GRID_DEVICE Split shaped_split(const SampleParams& p, i64 row, int split) {
    if (!p.shaped) return given_split(p, row, split);
    return {p.shaped + row * p.vocab, kF32, split * kSplit, smaller((split + 1) * kSplit, p.vocab), p.shaped_aligned};
}

// Where a thread's tokens start: neighbouring threads load neighbouring bytes.
GRID_DEVICE int striped(const Split& split, int step) { return split.start + (step * num_threads() + thread_x()) * kAtOnce; }
// The same where a thread's tokens must follow each other.
GRID_DEVICE int blocked(const Split& split, int step) { return split.start + (thread_x() * kSteps + step) * kAtOnce; }

// Penalties, bias and mask, in this order.
GRID_DEVICE void shape(const SampleParams& p, i64 row, int first, int end, float (&x)[kAtOnce]) {
    int counts[kAtOnce] = {};
    u8 seen[kAtOnce] = {};
    float bias[kAtOnce] = {};
    if (p.output_counts) load_values(counts, p.output_counts + row * p.counts_stride, first, end, p.aligned, 0);
    if (p.prompt_seen) load_values(seen, p.prompt_seen + row * p.seen_stride, first, end, p.aligned, static_cast<u8>(0));
    if (p.bias) load_values(bias, p.bias + row * p.bias_stride, first, end, p.aligned, 0.0f);
    int allowed = p.mask && first < end ? p.mask[row * p.mask_stride + first / 32] >> first % 32 : -1;
    GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) {
        if (p.repetition && (counts[i] != 0 || seen[i])) x[i] = x[i] > 0.0f ? x[i] / p.repetition[row] : x[i] * p.repetition[row];
        if (p.frequency && p.output_counts) x[i] -= p.frequency[row] * static_cast<float>(counts[i]);
        if (p.presence && counts[i] > 0) x[i] -= p.presence[row];
        x[i] = allowed >> i & 1 ? x[i] + bias[i] : kMinusInf;
    }
}

GRID_DEVICE void store_shaped(const SampleParams& p, i64 row, int first, int end, const float (&x)[kAtOnce]) {
    float* to = p.shaped + row * p.vocab + first;
    if (p.shaped_aligned && first + kAtOnce <= end) {
        GRID_UNROLL for (int i = 0; i < kAtOnce; i += 4) store(to + i, Vec<float, 4>{x[i], x[i + 1], x[i + 2], x[i + 3]});
    } else {
        GRID_UNROLL for (int i = 0; i < kAtOnce; ++i)
            if (first + i < end) to[i] = x[i];
    }
}

// ---- a row's parameters and what is known of it

struct Row {
    i64 row;
    float top;  // the largest logit
    int id;     // its lowest id
    float rate, min_p, top_p;
    int top_k;  // 0: all
    bool is_valid, is_drawn;

    GRID_DEVICE bool is_filtered() const { return top_k > 0 || top_p < 1.0f; }
    GRID_DEVICE float depth(float x) const { return x < top ? (top - x) * rate : 0.0f; }
    // In floats between a logit and the largest.
    GRID_DEVICE u32 gap(float x) const { return rank_order(top) - rank_order(x); }
    GRID_DEVICE float at_gap(u32 gap) const { return order_value(rank_order(top) - gap); }
};

GRID_DEVICE float share_of(float depth) { return grid::exp(-depth); }

// Weights are integers, in units of 2^-40 of the likeliest token: sums are exact, whatever their order.
GRID_DEVICE u64 weight_of(float share) { return static_cast<u64>(share * 0x1p40f); }

GRID_DEVICE Row row_with(const SampleParams& p, i64 row, u64 best) {
    float top = key_value(best), temperature = p.temperature[row];
    int top_k = p.top_k[row];
    bool is_valid = top > kMinusInf && top < -kMinusInf;
    // The rate is infinite for the smallest temperatures, and never 0, for -inf * 0 would be NaN.
    return {row,
            top,
            key_id(best),
            larger(1.0f / temperature, 1e-30f),
            smaller(p.min_p[row], 1.0f),
            p.top_p[row],
            top_k > 0 && top_k < p.vocab ? top_k : 0,
            is_valid,
            is_valid && temperature > 0.0f};
}

// The highest of a row's keys; which: 0 after shaping, 1 as given. Every wave reads them for itself.
GRID_DEVICE u64 best_key(const SampleParams& p, i64 row, int which) {
    u64 best = 0;
    for (int s = lane(); s < p.num_splits; s += kWave) best = larger(best, p.keys[(row * 2 + which) * p.num_splits + s]);
    return wave_max(best);
}

GRID_DEVICE float log_sum(const SampleParams& p, i64 row) {
    const u64* keys = p.keys + (row * 2 + 1) * p.num_splits;
    float top = key_value(best_key(p, row, 1)), sum = 0.0f;
    for (int s = lane(); s < p.num_splits; s += kWave) sum += p.sums[row * p.num_splits + s] * grid::exp(key_value(keys[s]) - top);
    return top + grid::log(wave_sum(sum));
}

// ---- first kernel

// Split: one block per row and kSplit tokens. Traffic: logits and tables are read once, shaped logits written once.
// Why: greedy rows are done after this. For others it counts tokens by their depth below the split's own largest, from which
// sample_weigh_kernel sees how deep a token may lie and still be kept. For top-k the largest of every kAtOnce do: if k of these are in
// reach, k tokens are.
GRID_KERNEL(256) void sample_scan_kernel(const SampleParams p) {
    GRID_SHARED(u64, best_parts, kMaxWaves);
    GRID_SHARED(u64, given_parts, kMaxWaves);
    GRID_SHARED(float, sum_parts, kMaxWaves);
    GRID_SHARED(int, bins, kBins);
    i64 row = block_x(), slot = row * p.num_splits + block_y();
    Split split = given_split(p, row, block_y());
    float given[kSteps][kAtOnce], x[kSteps][kAtOnce];
    float top = kMinusInf, given_top = kMinusInf;
    int id = striped(split, 0), given_id = id;
    GRID_UNROLL for (int step = 0; step < kSteps; ++step) {
        int first = striped(split, step);
        split.load(given[step], first);
        GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) x[step][i] = given[step][i];
        if (p.shaped) {
            shape(p, row, first, split.end, x[step]);
            store_shaped(p, row, first, split.end, x[step]);
        }
        GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) {
            bool is_broken = !(given[step][i] < -kMinusInf && x[step][i] < -kMinusInf);
            float value = is_broken ? -kMinusInf : x[step][i];
            if (value > top) top = value, id = first + i;
            if (given[step][i] > given_top) given_top = given[step][i], given_id = first + i;
        }
    }
    u64 best = block_max(rank_key(top, id), best_parts);
    if (thread_x() == 0) p.keys[row * p.num_splits + slot] = best;
    if (p.num_logprobs >= 0) {
        u64 given_best = block_max(rank_key(given_top, given_id), given_parts);
        float base = larger(key_value(given_best), -0x1p127f), sum = 0.0f;
        GRID_UNROLL for (int step = 0; step < kSteps; ++step)
            GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) sum += grid::exp(given[step][i] - base);
        sum = block_sum(sum, sum_parts);
        if (thread_x() == 0) p.keys[(row + 1) * p.num_splits + slot] = given_best, p.sums[slot] = sum;
    }
    Row state = row_with(p, row, best);
    if (!state.is_drawn || !state.is_filtered()) return;
    for (int b = thread_x(); b < kBins; b += num_threads()) bins[b] = 0;
    sync();
    auto count = [&](float value) {
        float bin = state.depth(value) * kBinsPerDepth;
        if (bin < kBins) atomic_add(&bins[static_cast<int>(bin)], 1);
    };
    GRID_UNROLL for (int step = 0; step < kSteps; ++step) {
        float largest = kMinusInf;
        GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) {
            if (!state.top_k) count(x[step][i]);
            largest = larger(largest, x[step][i]);
        }
        if (state.top_k) count(largest);
    }
    sync();
    for (int b = thread_x(); b < kBins; b += num_threads()) p.bins[slot * kBins + b] = bins[b];
}

// ---- second kernel

// No token deeper than this can be kept by top-k, or by top-p alone. A split's bins move down by the depth of its best token, so a
// token in bin b lies at a depth from b to b + 2 bins.
GRID_DEVICE float depth_limit(const SampleParams& p, const Row& row, int (&bins)[kBins], int (&shifts)[kMostSplits]) {
    const int* counts = p.bins + row.row * p.num_splits * kBins;
    for (int b = thread_x(); b < kBins; b += num_threads()) bins[b] = 0;
    for (int s = thread_x(); s < p.num_splits; s += num_threads()) {
        float depth = row.depth(key_value(p.keys[row.row * 2 * p.num_splits + s]));
        shifts[s] = static_cast<int>(smaller(depth * kBinsPerDepth, static_cast<float>(kBins)));
    }
    sync();
    for (int i = thread_x(); i < p.num_splits * kBins; i += num_threads()) {
        int bin = i % kBins + shifts[i / kBins];
        if (bin < kBins && counts[i]) atomic_add(&bins[bin], counts[i]);
    }
    sync();
    // Every wave for itself; lanes own neighbouring bins.
    constexpr int kOwn = kBins / kWave;
    int last = 0;
    if (row.top_k) {
        // The k-th largest lies in the first bin up to which there are k tokens.
        int own = 0;
        for (int j = 0; j < kOwn; ++j) own += bins[lane() * kOwn + j];
        int before = wave_sum_before(own);
        for (int j = 0; j < kOwn; ++j) last += (before += bins[lane() * kOwn + j]) < row.top_k;
        last = wave_sum(last);
    } else {
        // What lies beyond may weigh at most 1 - top_p of all; tokens that are in no bin weigh nothing.
        auto most = [&](int j) {
            int bin = kBins - 1 - lane() * kOwn - j;
            return static_cast<float>(bins[bin]) * grid::exp(static_cast<float>(bin) * (-1.0f / kBinsPerDepth));
        };
        float own = 0.0f;
        for (int j = 0; j < kOwn; ++j) own += most(j);
        float deeper = wave_sum_before(own), allowed = (1.0f - row.top_p) * larger(1.0f, wave_sum(own) * kLeastOfMost) * 0.999f;
        for (int j = 0; j < kOwn; ++j) last += (deeper += most(j)) > allowed;
        last = wave_sum(last) - 1;
    }
    // A little more, for the rounding of depths.
    return last < kBins ? static_cast<float>(last + 2) / kBinsPerDepth + 0.001f : kDeepest;
}

// What a split has to say in the draw: the sum of its weights, and the few tokens between which thresholds may fall.
// Split: one block per row and kSplit tokens; those of greedy rows end at once.
// Traffic: logits are read once, and by each block what sample_scan_kernel left of the row; the candidates' logits are written, in any order.
GRID_KERNEL(256) void sample_weigh_kernel(const SampleParams p) {
    GRID_SHARED(u64, parts, kMaxWaves);
    GRID_SHARED(int, bins, kBins);
    GRID_SHARED(int, shifts, kMostSplits);
    GRID_SHARED(int, number, 1);
    i64 slot = static_cast<i64>(block_x()) * p.num_splits + block_y();
    Row row = row_with(p, block_x(), best_key(p, block_x(), 0));
    if (!row.is_drawn) return;
    Split split = shaped_split(p, row.row, block_y());
    float x[kSteps][kAtOnce];
    GRID_UNROLL for (int step = 0; step < kSteps; ++step) split.load(x[step], striped(split, step));
    if (row.is_filtered()) {
        if (thread_x() == 0) number[0] = 0;
        float limit = depth_limit(p, row, bins, shifts);
        int own = 0;
        GRID_UNROLL for (int step = 0; step < kSteps; ++step)
            GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) own += row.depth(x[step][i]) <= limit;
        int place = wave_sum_before(own), first = 0;
        if (lane() == kWave - 1) first = atomic_add(&number[0], place + own);
        place += shfl(first, kWave - 1);
        if (own) {
            float* to = p.candidates + row.row * p.vocab + split.start;
            GRID_UNROLL for (int step = 0; step < kSteps; ++step)
                GRID_UNROLL for (int i = 0; i < kAtOnce; ++i)
                    if (row.depth(x[step][i]) <= limit) to[place++] = x[step][i];
        }
        sync();
        if (thread_x() == 0) p.num_candidates[slot] = number[0];
    }
    if (row.top_k) return;
    float least = row.is_filtered() ? 0.0f : row.min_p;
    u64 mass = 0;
    GRID_UNROLL for (int step = 0; step < kSteps; ++step)
        GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) {
            float share = share_of(row.depth(x[step][i]));
            mass += share >= least ? weight_of(share) : 0;
        }
    mass = block_sum(mass, parts);
    if (thread_x() == 0) p.masses[slot] = mass;
}

// ---- third kernel

// The tokens that stay: all above `gap`, and of those at it the first `ties` by id.
struct Cut {
    u32 gap;
    u64 ties;
};
constexpr Cut kKeepAll = {~0u, ~0ull};

GRID_DEVICE Cut stricter(Cut a, Cut b) {
    if (a.gap != b.gap) return a.gap < b.gap ? a : b;
    return {a.gap, smaller(a.ties, b.ties)};
}

struct Lists {
    const float* candidates;
    int (&numbers)[kMostSplits];
    int num_splits;

    // Waves share out the splits. body(split, logit) for each candidate, then done(split) by the whole wave.
    template <class Body, class Done>
    GRID_DEVICE void visit(Body body, Done done) const {
        for (int s = wave(); s < num_splits; s += num_waves()) {
            for (int i = lane(); i < numbers[s]; i += kWave) body(candidates[s * kSplit + i]);
            done(s);
        }
    }
    template <class Body>
    GRID_DEVICE void visit(Body body) const {
        visit(body, [](int) {});
    }
};

// Sums over the whole block; the array may be used again at once.
template <class T>
GRID_DEVICE T total_over_block(T value, T (&parts)[kMaxWaves]) {
    T total = block_sum(value, parts);
    sync();
    return total;
}

template <class T>
GRID_DEVICE T block_sum_before(T value, T (&parts)[kMaxWaves]) {
    T before = wave_sum_before(value);
    if (lane() == kWave - 1) parts[wave()] = before + value;
    sync();
    for (int w = 0; w < wave(); ++w) before += parts[w];
    sync();
    return before;
}

// Radix selection, 8 bits a round: the candidates of the smallest gaps, none above `span`, whose amounts add up to `need`. Amounts
// are integers, so the result does not depend on the order in which threads add. `ties` is in amounts.
template <class Amount>
GRID_DEVICE Cut select(const Lists& lists, const Row& row, u32 span, u64 need, u64 (&bins)[kRadix], Amount amount) {
    GRID_SHARED(u64, found, 2);
    u32 base = 0;
    int bits = 0;
    while (bits < 32 && span >> bits) ++bits;
    while (bits > 0) {
        int shift = bits > 8 ? bits - 8 : 0;
        for (int b = thread_x(); b < kRadix; b += num_threads()) bins[b] = 0;
        if (thread_x() == 0) found[0] = kRadix;
        sync();
        lists.visit([&](float x) {
            u32 beyond = row.gap(x) - base;
            if (static_cast<u64>(beyond) >> bits) return;
            if (u64 own = amount(x)) atomic_add(&bins[beyond >> shift], own);
        });
        sync();
        if (wave() == 0) {
            constexpr int kOwn = kRadix / kWave;
            u64 own = 0;
            for (int j = 0; j < kOwn; ++j) own += bins[lane() * kOwn + j];
            u64 before = wave_sum_before(own);
            if (before < need && need <= before + own) {
                int bin = lane() * kOwn;
                while (before + bins[bin] < need) before += bins[bin++];
                found[0] = static_cast<u64>(bin);
                found[1] = need - before;
            }
        }
        sync();
        if (found[0] == kRadix) return kKeepAll;
        base += static_cast<u32>(found[0]) << shift;
        need = found[1];
        bits = shift;
        sync();
    }
    return {base, need};
}

GRID_DEVICE Cut cut_of(const Lists& lists, const Row& row, u64 total, u64 (&bins)[kRadix], u64 (&parts)[kMaxWaves]) {
    auto weight = [&](float x) { return weight_of(share_of(row.depth(x))); };
    u64 widest = 0;
    lists.visit([&](float x) { widest = larger<u64>(widest, row.gap(x)); });
    u32 span = static_cast<u32>(block_max(widest, parts));
    sync();
    Cut cut = kKeepAll;
    if (row.top_k) {
        cut = select(lists, row, span, row.top_k, bins, [](float) { return 1ull; });
        u64 above = 0;
        lists.visit([&](float x) { above += row.gap(x) < cut.gap ? weight(x) : 0; });
        total = total_over_block(above, parts) + (cut.gap <= span ? cut.ties * weight(row.at_gap(cut.gap)) : 0);
    }
    if (row.top_p < 1.0f) {
        double wanted = row.top_p > 0.0f ? static_cast<double>(row.top_p) * static_cast<double>(total) : 0.0;
        u64 need = static_cast<u64>(wanted);
        need += static_cast<double>(need) < wanted || need == 0;
        Cut by_weight = select(lists, row, smaller(span, cut.gap), need, bins, weight);
        if (by_weight.gap <= span) {
            u64 each = larger<u64>(weight(row.at_gap(by_weight.gap)), 1);
            by_weight.ties = (by_weight.ties + each - 1) / each;
        }
        cut = stricter(cut, by_weight);
    }
    return cut;
}

// Philox4x32-10, first word, upper 24 bits.
GRID_DEVICE u32 uniform24(u64 seed, u64 counter) {
    u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32), c0 = static_cast<u32>(counter), c1 = static_cast<u32>(counter >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        u64 a = static_cast<u64>(c0) * 0xD2511F53u, b = static_cast<u64>(c2) * 0xCD9E8D57u;
        c0 = static_cast<u32>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<u32>(b);
        c2 = static_cast<u32>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<u32>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0 >> 8;
}

// Where the draw goes on: in which split, with what weight of it and how many ties before.
struct Place {
    int split;
    u64 target, ties_before;
};

// The split in which the row's random number falls; -1 if no token stays, which only broken parameters can cause. `masses` are of
// tokens above the cut. Every wave for itself; lanes own neighbouring splits.
GRID_DEVICE Place place_of(const SampleParams& p, const Row& row, Cut cut, const u64 (&masses)[kMostSplits], const u64 (&ties)[kMostSplits]) {
    constexpr int kOwn = kMostSplits / kWave;
    float tie_share = cut.gap == kKeepAll.gap ? 0.0f : share_of(row.depth(row.at_gap(cut.gap)));
    u64 each = tie_share >= row.min_p ? weight_of(tie_share) : 0;
    u64 own_ties = 0, own = 0, mass[kOwn];
    for (int j = 0; j < kOwn; ++j) own_ties += ties[lane() * kOwn + j];
    u64 ties_before = wave_sum_before(own_ties);
    for (int j = 0; j < kOwn; ++j) {
        u64 here = ties[lane() * kOwn + j], left = cut.ties > ties_before ? cut.ties - ties_before : 0;
        mass[j] = masses[lane() * kOwn + j] + smaller(here, left) * each;
        ties_before += here;
        own += mass[j];
    }
    u64 before = wave_sum_before(own), total = wave_sum(own);
    u64 random = uniform24(static_cast<u64>(p.seeds[row.row]), static_cast<u64>(p.counters[row.row]));
    u64 target = (total >> 24) * random + ((total & 0xFFFFFF) * random >> 24);
    bool is_here = before <= target && target < before + own;
    u64 lanes = grid::ballot(is_here);
    if (!lanes) return {-1, 0, 0};
    int j = 0;
    ties_before -= own_ties;
    while (is_here && before + mass[j] <= target) before += mass[j], ties_before += ties[lane() * kOwn + j++];
    int source = popcount((lanes & -lanes) - 1);
    return {shfl(lane() * kOwn + j, source), shfl(target - before, source), shfl(ties_before, source)};
}

// The token of a row from what its splits have to say.
// Split: one block per row. Traffic: the candidates a few times, from the cache, and one split of logits.
// Why: candidates are a few hundred, unless the logits are nearly equal; then they may be the whole row.
GRID_KERNEL(256) void sample_finish_kernel(const SampleParams p) {
    GRID_SHARED(u64, bins, kRadix);
    GRID_SHARED(u64, parts, kMaxWaves);
    GRID_SHARED(u64, masses, kMostSplits);
    GRID_SHARED(u64, ties, kMostSplits);
    GRID_SHARED(int, numbers, kMostSplits);
    GRID_SHARED(int, chosen, 1);
    Row row = row_with(p, block_x(), best_key(p, block_x(), 0));
    if (thread_x() == 0) chosen[0] = row.is_valid ? row.id : -1;
    if (row.is_drawn) {
        i64 slots = row.row * p.num_splits;
        u64 total = 0;
        for (int s = thread_x(); s < kMostSplits; s += num_threads()) {
            numbers[s] = s < p.num_splits && row.is_filtered() ? p.num_candidates[slots + s] : 0;
            masses[s] = s < p.num_splits && !row.top_k ? p.masses[slots + s] : 0;
            ties[s] = 0;
            total += masses[s];
        }
        total = total_over_block(total, parts);
        sync();
        Cut cut = kKeepAll;
        if (row.is_filtered()) {
            Lists lists{p.candidates + row.row * p.vocab, numbers, p.num_splits};
            cut = cut_of(lists, row, total, bins, parts);
            u64 mass = 0, at_cut = 0;
            lists.visit(
                [&](float x) {
                    float share = share_of(row.depth(x));
                    mass += row.gap(x) < cut.gap && share >= row.min_p ? weight_of(share) : 0;
                    at_cut += row.gap(x) == cut.gap;
                },
                [&](int s) {
                    mass = wave_sum(mass);
                    at_cut = wave_sum(at_cut);
                    if (lane() == 0) masses[s] = mass, ties[s] = at_cut;
                    mass = at_cut = 0;
                });
            sync();
        }
        Place place = place_of(p, row, cut, masses, ties);
        if (place.split >= 0) {
            Split split = shaped_split(p, row.row, place.split);
            // body(logit, id) for the thread's tokens, in order of ids.
            auto visit = [&](auto body) {
                for (int step = 0; step < kSteps; ++step) {
                    float x[kAtOnce];
                    int first = blocked(split, step);
                    split.load(x, first);
                    GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) body(x[i], first + i);
                }
            };
            u64 own_ties = 0, own = 0;
            visit([&](float x, int) { own_ties += row.gap(x) == cut.gap; });
            u64 rank = place.ties_before + block_sum_before(own_ties, parts);
            auto kept_weight = [&](float x) {
                u32 gap = row.gap(x);
                float share = share_of(row.depth(x));
                bool stays = gap < cut.gap || (gap == cut.gap && rank++ < cut.ties);
                return stays && share >= row.min_p ? weight_of(share) : 0;
            };
            visit([&](float x, int) { own += kept_weight(x); });
            u64 up_to = block_sum_before(own, parts);
            if (up_to <= place.target && place.target < up_to + own) {
                rank -= own_ties;
                visit([&](float x, int v) {
                    u64 mine = kept_weight(x);
                    if (up_to <= place.target && place.target < up_to + mine) chosen[0] = v;
                    up_to += mine;
                });
            }
        }
    }
    sync();
    int id = chosen[0];
    if (thread_x() == 0) p.ids[row.row] = id;
    if (wave() != 0) return;
    float logprob = __builtin_nanf("");
    if (row.is_valid && p.num_logprobs >= 0) logprob = load_as_float(p.logits, p.type, row.row * p.logits_stride + id) - log_sum(p, row.row);
    if (lane() == 0) p.logprob[row.row] = logprob;
}

// The likeliest tokens with their log-probabilities.
// Split: one block per row. Traffic: one split of logits per place.
// Why: a tournament. The next token is the best of the splits' best, and only its own split has to name another.
GRID_KERNEL(256) void sample_rank_kernel(const SampleParams p) {
    GRID_SHARED(u64, parts, kMaxWaves);
    GRID_SHARED(u64, keys, kMostSplits);
    i64 row = block_x(), num = p.num_logprobs;
    float top = key_value(best_key(p, row, 0)), normaliser = log_sum(p, row);
    bool is_valid = top > kMinusInf && top < -kMinusInf;
    for (int s = thread_x(); s < p.num_splits; s += num_threads()) keys[s] = p.keys[(row * 2 + 1) * p.num_splits + s];
    sync();
    for (int n = 0; n < num; ++n) {
        u64 best = 0;
        for (int s = lane(); s < p.num_splits; s += kWave) best = larger(best, keys[s]);
        best = is_valid ? wave_max(best) : 0;
        if (thread_x() == 0) {
            p.top_ids[row * num + n] = is_valid ? key_id(best) : -1;
            p.top_logprobs[row * num + n] = is_valid ? key_value(best) - normaliser : __builtin_nanf("");
        }
        if (!is_valid) continue;
        Split split = given_split(p, row, key_id(best) / kSplit);
        u64 next = 0;
        GRID_UNROLL for (int step = 0; step < kSteps; ++step) {
            float x[kAtOnce];
            int first = striped(split, step);
            split.load(x, first);
            GRID_UNROLL for (int i = 0; i < kAtOnce; ++i) {
                u64 key = first + i < split.end ? rank_key(x[i], first + i) : 0;
                if (key < best) next = larger(next, key);
            }
        }
        next = block_max(next, parts);
        sync();
        if (thread_x() == 0) keys[split.start / kSplit] = next;
        sync();
    }
}

// scalars: num_logprobs
GRID_OP(sample, "ids", "logprob", "top_ids", "top_logprobs", "shaped", "keys", "sums", "bins", "candidates", "num_candidates", "masses", "logits", "temperature",
        "top_k", "top_p", "min_p", "seeds", "counters", "output_counts", "prompt_seen", "presence", "frequency", "repetition", "bias", "mask") {
    const Tensor &shaped = args[4], &logits = args[11], &counts = args[18], &seen = args[19], &bias = args[23], &mask = args[24];
    i64 num_rows = logits.size[0], vocab = logits.size[1], num_logprobs = args.integer(0), num_splits = ceil_div(vocab, kSplit);
    if (num_logprobs > vocab) return fail(args, "num_logprobs: expected at most V = %lld, got %lld", vocab, num_logprobs);
    if (vocab < 1 || vocab > kSplit * kMostSplits) return fail(args, "logits: expected 1 to 262144 columns, got %lld", vocab);
    auto stride = [](const Tensor& t) { return t ? t.stride[0] : 0; };
    bool is_shaped = args[20] || args[21] || args[22] || bias || mask;
    SampleParams params{args[0].as<i64>(),
                        args[1].as<float>(),
                        args[2].as<i64>(),
                        args[3].as<float>(),
                        is_shaped ? shaped.as<float>() : nullptr,
                        args[5].as<u64>(),
                        args[6].as<float>(),
                        args[7].as<int>(),
                        args[8].as<float>(),
                        args[9].as<int>(),
                        args[10].as<u64>(),
                        logits.data,
                        logits.stride[0],
                        logits.type,
                        static_cast<int>(vocab),
                        static_cast<int>(num_splits),
                        static_cast<int>(num_logprobs),
                        aligned(logits, kAtOnce, 16) && aligned(counts, kAtOnce, 16) && aligned(seen, kAtOnce, 8) && aligned(bias, kAtOnce, 16),
                        aligned(shaped, kAtOnce, 16),
                        args[12].as<float>(),
                        args[13].as<int>(),
                        args[14].as<float>(),
                        args[15].as<float>(),
                        args[16].as<i64>(),
                        args[17].as<i64>(),
                        counts.as<int>(),
                        seen.as<u8>(),
                        args[20].as<float>(),
                        args[21].as<float>(),
                        args[22].as<float>(),
                        bias.as<float>(),
                        mask.as<int>(),
                        stride(counts),
                        stride(seen),
                        stride(bias),
                        stride(mask)};
    int threads = threads_for(args, ceil_div(vocab < kSplit ? vocab : kSplit, kSplit / kThreads), kThreads);
    if (int failed = launch(args, sample_scan_kernel, {num_rows, num_splits}, threads, params)) return failed;
    if (int failed = launch(args, sample_weigh_kernel, {num_rows, num_splits}, threads, params)) return failed;
    if (int failed = launch(args, sample_finish_kernel, {num_rows}, threads, params)) return failed;
    return num_logprobs > 0 ? launch(args, sample_rank_kernel, {num_rows}, threads, params) : 0;
}
