// SPDX-License-Identifier: Apache-2.0
#include "rank.h"

using namespace grid;

struct MoeRouteParams {
    const void* logits;  // [T, E]
    const float* bias;   // [E], or null
    float* weights;      // [T, top_k + num_shared]
    int* ids;            // the same
    i64 logits_stride, num_tokens;
    int type, num_experts, top_k, num_groups, top_groups, num_shared;
    bool sigmoid, renormalise;
    float scale;
};

// Split: one wave per token; lane l holds experts l, l + kWave, ... in registers. No LDS.
// Traffic: the logits once. Needs: at most kOwn * kWave experts, at most kWave groups.
template <int kOwn>
GRID_KERNEL(256) void moe_route_kernel(const MoeRouteParams p) {
    i64 token = static_cast<i64>(block_x()) * num_waves() + wave();
    if (token >= p.num_tokens) return;
    int group_size = p.num_experts / p.num_groups;
    float logit[kOwn], largest = kMinusInf;
    GRID_UNROLL for (int i = 0; i < kOwn; ++i) {
        int expert = i * kWave + lane();
        logit[i] = expert < p.num_experts ? load_as_float(p.logits, p.type, token * p.logits_stride + expert) : kMinusInf;
        largest = larger(largest, logit[i]);
    }
    float total = 1.0f;
    if (!p.sigmoid) {
        largest = wave_max(largest);
        total = 0.0f;
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) total += i * kWave + lane() < p.num_experts ? grid::exp(logit[i] - largest) : 0.0f;
        total = wave_sum(total);
    }
    auto score_of = [&](float value) { return p.sigmoid ? 1.0f / (1.0f + grid::exp(-value)) : grid::exp(value - largest) / total; };

    // 0 stands for "cannot be chosen": not an expert, or chosen already.
    u64 key[kOwn];
    GRID_UNROLL for (int i = 0; i < kOwn; ++i) {
        int expert = i * kWave + lane();
        float choice = p.bias && expert < p.num_experts ? score_of(logit[i]) + p.bias[expert] : logit[i];
        key[i] = expert < p.num_experts ? rank_key(choice == choice ? choice : kMinusInf, expert) : 0;
    }
    if (p.num_groups > 1) {
        float own_group = 0.0f;
        for (int g = 0; g < p.num_groups; ++g) {
            u64 first = 0, second = 0;
            GRID_UNROLL for (int i = 0; i < kOwn; ++i) {
                bool inside = (i * kWave + lane()) / group_size == g;
                u64 candidate = inside ? key[i] : 0;
                second = larger(second, smaller(first, candidate));
                first = larger(first, candidate);
            }
            u64 best = wave_max(first);
            u64 next = wave_max(first == best ? second : first);
            float value = key_value(best) + (p.bias && next ? key_value(next) : 0.0f);
            if (lane() == g) own_group = value;
        }
        u64 group_key = lane() < p.num_groups ? rank_key(own_group, lane()) : 0;
        u64 kept = 0;
        for (int n = 0; n < p.top_groups; ++n) {
            u64 best = wave_max(group_key);
            kept |= 1ull << key_id(best);
            if (group_key == best) group_key = 0;
        }
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) {
            int expert = i * kWave + lane();
            if (key[i] && !(kept >> (expert / group_size) & 1)) key[i] = rank_key(kMinusInf, expert);
        }
    }

    // Column n of the result ends up in lane n % kWave; there are as many rounds as columns fit a wave.
    int columns = p.top_k + p.num_shared;
    float* weights = p.weights + token * columns;
    int* ids = p.ids + token * columns;
    float sum = 0.0f;
    for (int n = 0; n < p.top_k; ++n) {
        u64 best = 0;
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) best = larger(best, key[i]);
        best = wave_max(best);
        float found = 0.0f;
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) {
            if (key[i] == best) found = score_of(logit[i]), key[i] = 0;
        }
        int id = key_id(best);
        float weight = shfl(found, id % kWave);
        sum += weight;
        if (lane() == 0) weights[n] = p.renormalise ? weight : weight * p.scale, ids[n] = id;
    }
    wave_sync();
    // Lane 0 wrote the weights and is the one to read them again.
    if (lane() == 0 && p.renormalise)
        for (int n = 0; n < p.top_k; ++n) weights[n] = weights[n] / (sum + 1e-20f) * p.scale;
    for (int n = lane(); n < p.num_shared; n += kWave) weights[p.top_k + n] = 1.0f, ids[p.top_k + n] = p.num_experts + n;
}

// scalars: top_k, num_groups, top_groups, score (1: sigmoid), renormalise, scale, num_shared
GRID_OP(moe_route, "weights", "ids", "logits", "bias") {
    const Tensor& logits = args[2];
    i64 num_experts = logits.size[1], top_k = args.integer(0), num_groups = args.integer(1), top_groups = args.integer(2);
    if (num_groups < 1 || num_experts % num_groups || top_groups < 1 || top_groups > num_groups)
        return fail(args, "num_groups, top_groups: expected groups that divide %lld experts and at least one of them kept, got %lld, %lld", num_experts, num_groups,
                    top_groups);
    i64 available = num_experts / num_groups * top_groups;
    if (top_k < 1 || top_k > available) return fail(args, "top_k: expected 1 to the %lld experts of the kept groups, got %lld", available, top_k);
    if (num_groups > kWave) return fail(args, "num_groups: expected at most %d on this chip, got %lld", kWave, num_groups);
    if (num_experts > 16 * kWave) return fail(args, "logits: expected at most %d experts on this chip, got %lld", 16 * kWave, num_experts);
    MoeRouteParams params{logits.data,
                          args[3].as<float>(),
                          args[0].as<float>(),
                          args[1].as<int>(),
                          logits.stride[0],
                          logits.size[0],
                          logits.type,
                          static_cast<int>(num_experts),
                          static_cast<int>(top_k),
                          static_cast<int>(num_groups),
                          static_cast<int>(top_groups),
                          static_cast<int>(args.integer(6)),
                          args.integer(3) != 0,
                          args.integer(4) != 0,
                          args.real(5)};
    int threads = threads_for(args, 256, 256);
    Blocks blocks{ceil_div(logits.size[0], threads / kWave)};
    if (num_experts <= 2 * kWave) return launch(args, moe_route_kernel<2>, blocks, threads, params);
    if (num_experts <= 4 * kWave) return launch(args, moe_route_kernel<4>, blocks, threads, params);
    if (num_experts <= 8 * kWave) return launch(args, moe_route_kernel<8>, blocks, threads, params);
    return launch(args, moe_route_kernel<16>, blocks, threads, params);
}
