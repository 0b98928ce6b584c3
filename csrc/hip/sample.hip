// SPDX-License-Identifier: Apache-2.0
#include "rank.h"

using namespace grid;

struct SampleParams {
    i64* ids;                    // [B]
    float* logprob;              // [B]
    i64* top_ids;                // [B, num_logprobs], or null
    float* top_logprobs;         // the same
    const void* logits;          // [B, V]
    i64 logits_stride;
    int type, vocab, num_logprobs;
    const float* temperature;    // [B] each
    const int* top_k;
    const float *top_p, *min_p;
    const i64 *seeds, *counters;
    const int* output_counts;    // [B, V], or null
    const u8* prompt_seen;       // [B, V], or null
    const float *presence, *frequency, *repetition;  // [B], or null
    const float* bias;           // [B, V], or null
    const int* mask;             // [B, ceil(V / 32)], or null
    i64 counts_stride, seen_stride, bias_stride, mask_stride;
};

constexpr int kBins = 256;

struct Shared {
    u64 (&bins)[kBins];
    u64 (&sums)[kMaxWaves];
    float (&floats)[kMaxWaves];
};

// The tokens that stay: all above `order`, and of those equal to it the first `ties` by id.
struct Cut {
    u32 order;
    u64 ties;
};
constexpr Cut kKeepAll = {0, ~0ull};

GRID_DEVICE Cut stricter(Cut a, Cut b) {
    if (a.order != b.order) return a.order > b.order ? a : b;
    return {a.order, smaller(a.ties, b.ties)};
}

GRID_DEVICE float raw_logit(const SampleParams& p, i64 row, int v) { return load_as_float(p.logits, p.type, row * p.logits_stride + v); }

// The logit after penalties, bias and mask, in this order.
GRID_DEVICE float shaped_logit(const SampleParams& p, i64 row, int v) {
    float x = raw_logit(p, row, v);
    int count = p.output_counts ? p.output_counts[row * p.counts_stride + v] : 0;
    bool seen = count != 0 || (p.prompt_seen && p.prompt_seen[row * p.seen_stride + v]);
    if (p.repetition && seen) x = x > 0.0f ? x / p.repetition[row] : x * p.repetition[row];
    if (p.frequency && p.output_counts) x -= p.frequency[row] * static_cast<float>(count);
    if (p.presence && count > 0) x -= p.presence[row];
    if (p.bias) x += p.bias[row * p.bias_stride + v];
    if (p.mask && !(p.mask[row * p.mask_stride + v / 32] >> (v % 32) & 1)) x = kMinusInf;
    return x;
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

// Sums over the whole block; the array may be used again at once.
GRID_DEVICE u64 total_over_block(u64 value, u64 (&sums)[kMaxWaves]) {
    u64 total = block_sum(value, sums);
    sync();
    return total;
}

// Radix selection, 8 bits a round: the highest tokens whose amounts add up to `need`. amount(v, order) is an integer, so the
// result is exact and does not depend on the order in which threads add. The last token's equals are cut by amount, in `ties`.
template <class Order, class Amount>
GRID_DEVICE Cut select(const Shared& shared, int vocab, u64 need, Order order_of, Amount amount) {
    GRID_SHARED(u64, found, 2);
    u32 prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int b = thread_x(); b < kBins; b += num_threads()) shared.bins[b] = 0;
        if (thread_x() == 0) found[0] = kBins;
        sync();
        for (int v = thread_x(); v < vocab; v += num_threads()) {
            u32 order = order_of(v);
            if (shift < 24 && order >> (shift + 8) != prefix) continue;
            u64 own = amount(v, order);
            if (own) atomic_add(&shared.bins[order >> shift & (kBins - 1)], own);
        }
        sync();
        if (wave() == 0) {
            // Each lane adds up neighbouring bins, from the highest down.
            constexpr int kOwn = kBins / kWave;
            int highest = kBins - 1 - lane() * kOwn;
            u64 own = 0;
            for (int j = 0; j < kOwn; ++j) own += shared.bins[highest - j];
            u64 before = wave_sum_before(own);
            if (before < need && need <= before + own) {
                int bin = highest;
                while (before + shared.bins[bin] < need) before += shared.bins[bin--];
                found[0] = static_cast<u64>(bin);
                found[1] = need - before;
            }
        }
        sync();
        if (found[0] == kBins) return kKeepAll;
        prefix = prefix << 8 | static_cast<u32>(found[0]);
        need = found[1];
        sync();
    }
    return {prefix, need};
}

// Split: one row per block. Traffic: the row from memory once; then again from the cache, once to draw, four times more for each
// of top-k and top-p that is asked for.
// Why: weights are cumulated as 64-bit integers in units of 2^-40 of the likeliest, so that sums are exact in any order and a row
// gives the same token for every number of threads.
GRID_KERNEL(1024) void sample_kernel(const SampleParams p) {
    GRID_SHARED(u64, bins, kBins);
    GRID_SHARED(u64, sums, kMaxWaves);
    GRID_SHARED(u64, wave_ties, kMaxWaves);
    GRID_SHARED(u64, wave_weights, kMaxWaves);
    GRID_SHARED(float, floats, kMaxWaves);
    GRID_SHARED(int, chosen, 1);
    Shared shared{bins, sums, floats};
    i64 row = block_x();

    u64 best = 0, broken = 0;
    float raw_best = kMinusInf;
    for (int v = thread_x(); v < p.vocab; v += num_threads()) {
        float raw = raw_logit(p, row, v), x = shaped_logit(p, row, v);
        broken |= raw != raw || x != x || raw == -kMinusInf || x == -kMinusInf;
        raw_best = larger(raw_best, raw);
        best = larger(best, rank_key(x, v));
    }
    broken = total_over_block(broken, sums);
    best = block_max(best, sums);
    float largest = key_value(best);
    int id = key_id(best);
    bool valid = broken == 0 && largest > kMinusInf;

    float temperature = p.temperature[row];
    if (valid && temperature > 0.0f) {
        auto order_of = [&](int v) { return rank_order(shaped_logit(p, row, v)); };
        auto share = [&](u32 order) { return grid::exp((order_value(order) - largest) / temperature); };
        auto weight = [&](u32 order) { return static_cast<u64>(share(order) * 0x1p40f); };
        sync();

        Cut cut = kKeepAll;
        int top_k = p.top_k[row];
        if (top_k > 0 && top_k < p.vocab) cut = select(shared, p.vocab, top_k, order_of, [](int, u32) { return 1ull; });
        float top_p = p.top_p[row];
        if (top_p < 1.0f) {
            u64 above = 0;
            for (int v = thread_x(); v < p.vocab; v += num_threads()) {
                u32 order = order_of(v);
                if (order > cut.order) above += weight(order);
            }
            u64 total = total_over_block(above, sums) + (cut.order ? cut.ties * weight(cut.order) : 0);
            double wanted = top_p > 0.0f ? static_cast<double>(top_p) * static_cast<double>(total) : 0.0;
            u64 need = static_cast<u64>(wanted);
            need += static_cast<double>(need) < wanted || need == 0;
            Cut by_weight = select(shared, p.vocab, need, order_of, [&](int, u32 order) { return order >= cut.order ? weight(order) : 0ull; });
            if (by_weight.order) {
                u64 each = weight(by_weight.order);
                by_weight.ties = (by_weight.ties + each - 1) / each;
            }
            cut = stricter(cut, by_weight);
        }

        // Every wave owns a run of ids, so that ranks among equals and the cumulated weight follow the ids.
        int run = ((p.vocab + num_waves() - 1) / num_waves() + kWave - 1) / kWave * kWave;
        int first = wave() * run, last = smaller(first + run, p.vocab);
        float min_p = smaller(p.min_p[row], 1.0f);
        u64 ties = 0;
        for (int v = first + lane(); v < last; v += kWave) ties += order_of(v) == cut.order;
        ties = wave_sum(ties);
        if (lane() == 0) wave_ties[wave()] = ties;
        sync();
        u64 ties_before = 0;
        for (int w = 0; w < wave(); ++w) ties_before += wave_ties[w];

        // The weight of id v if it stays; `rank` is that of the next token equal to the cut.
        auto kept_weight = [&](int v, u64& rank) {
            u32 order = v < last ? order_of(v) : 0;
            bool equal = v < last && order == cut.order;
            u64 equals = grid::ballot(equal);
            bool stays = v < last && (order > cut.order || (equal && rank + popcount(equals & ((1ull << lane()) - 1)) < cut.ties));
            rank += popcount(equals);
            return stays && share(order) >= min_p ? weight(order) : 0;
        };
        u64 own = 0, rank = ties_before;
        for (int base = first; base < last; base += kWave) own += kept_weight(base + lane(), rank);
        own = wave_sum(own);
        if (lane() == 0) wave_weights[wave()] = own;
        if (thread_x() == 0) chosen[0] = id;
        sync();
        u64 total = 0, before = 0;
        for (int w = 0; w < num_waves(); ++w) {
            if (w < wave()) before += wave_weights[w];
            total += wave_weights[w];
        }
        u64 u = uniform24(static_cast<u64>(p.seeds[row]), static_cast<u64>(p.counters[row]));
        u64 target = (total >> 24) * u + ((total & 0xFFFFFF) * u >> 24);
        if (before <= target && target < before + own) {
            rank = ties_before;
            for (int base = first; base < last; base += kWave) {
                u64 mine = kept_weight(base + lane(), rank);
                u64 up_to = before + wave_sum_before(mine);
                if (up_to <= target && target < up_to + mine) chosen[0] = base + lane();
                before += wave_sum(mine);
                if (before > target) break;
            }
        }
        sync();
        id = chosen[0];
    }

    if (thread_x() == 0) {
        p.ids[row] = valid ? id : -1;
        p.logprob[row] = __builtin_nanf("");
    }
    if (p.num_logprobs < 0) return;
    if (!valid) {
        for (int n = thread_x(); n < p.num_logprobs; n += num_threads()) {
            p.top_ids[row * p.num_logprobs + n] = -1;
            p.top_logprobs[row * p.num_logprobs + n] = __builtin_nanf("");
        }
        return;
    }
    sync();
    raw_best = block_max(raw_best, floats);
    sync();
    float sum = 0.0f;
    for (int v = thread_x(); v < p.vocab; v += num_threads()) sum += grid::exp(raw_logit(p, row, v) - raw_best);
    float normaliser = raw_best + grid::log(block_sum(sum, floats));
    if (thread_x() == 0) p.logprob[row] = raw_logit(p, row, id) - normaliser;
    u64 previous = ~0ull;
    for (int n = 0; n < p.num_logprobs; ++n) {
        u64 next = 0;
        for (int v = thread_x(); v < p.vocab; v += num_threads()) {
            u64 key = rank_key(raw_logit(p, row, v), v);
            if (key < previous) next = larger(next, key);
        }
        sync();
        previous = block_max(next, sums);
        if (thread_x() == 0) {
            p.top_ids[row * p.num_logprobs + n] = key_id(previous);
            p.top_logprobs[row * p.num_logprobs + n] = key_value(previous) - normaliser;
        }
    }
}

// scalars: num_logprobs
GRID_OP(sample, "ids", "logprob", "top_ids", "top_logprobs", "logits", "temperature", "top_k", "top_p", "min_p", "seeds", "counters", "output_counts", "prompt_seen",
        "presence", "frequency", "repetition", "bias", "mask") {
    const Tensor &logits = args[4], &counts = args[11], &seen = args[12], &bias = args[16], &mask = args[17];
    i64 vocab = logits.size[1], num_logprobs = args.integer(0);
    if (num_logprobs > vocab) return fail(args, "num_logprobs: expected at most V = %lld, got %lld", vocab, num_logprobs);
    if (vocab < 1 || vocab > 1 << 18) return fail(args, "logits: expected 1 to 262144 columns, got %lld", vocab);
    auto stride = [](const Tensor& t) { return t ? t.stride[0] : 0; };
    SampleParams params{args[0].as<i64>(),
                        args[1].as<float>(),
                        args[2].as<i64>(),
                        args[3].as<float>(),
                        logits.data,
                        logits.stride[0],
                        logits.type,
                        static_cast<int>(vocab),
                        static_cast<int>(num_logprobs),
                        args[5].as<float>(),
                        args[6].as<int>(),
                        args[7].as<float>(),
                        args[8].as<float>(),
                        args[9].as<i64>(),
                        args[10].as<i64>(),
                        counts.as<int>(),
                        seen.as<u8>(),
                        args[13].as<float>(),
                        args[14].as<float>(),
                        args[15].as<float>(),
                        bias.as<float>(),
                        mask.as<int>(),
                        stride(counts),
                        stride(seen),
                        stride(bias),
                        stride(mask)};
    return launch(args, sample_kernel, {logits.size[0]}, threads_for(args, vocab, 1024), params);
}
