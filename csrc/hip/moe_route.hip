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
    int lanes_per_group;  // a power of two: a group begins in a lane of its own
    bool sigmoid, renormalise, wide;
    float scale;
};

struct Chosen {
    float score;
    int id;
};

template <class T, int N>
GRID_DEVICE void load_run(float (&values)[N], const T* from) {
    constexpr int kVector = 16 / sizeof(T);
    GRID_UNROLL for (int i = 0; i < N; i += kVector) {
        Vec<T, kVector> loaded = load<kVector>(from + i);
        GRID_UNROLL for (int j = 0; j < kVector; ++j) values[i + j] = to_float(loaded.v[j]);
    }
}

// The first `count` of N neighbours, `other` for the rest; `wide`: all of them or none, at a multiple of 16 bytes.
template <int N>
GRID_DEVICE void load_own(float (&values)[N], const void* data, int type, i64 first, int count, bool wide, float other) {
    GRID_UNROLL for (int i = 0; i < N; ++i) values[i] = other;
    if (wide && count == N) {
        if (type == kF32) load_run(values, static_cast<const float*>(data) + first);
        if (type == kBf16) load_run(values, static_cast<const bf16*>(data) + first);
        if (type == kF16) load_run(values, static_cast<const f16*>(data) + first);
    } else {
        GRID_UNROLL for (int i = 0; i < N; ++i)
            if (i < count) values[i] = load_as_float(data, type, first + i);
    }
}

// Split: kLanes neighbouring lanes per token; each holds kOwn neighbouring experts of one group in registers.
// Traffic: the logits once, the bias once per wave. Needs: LDS for what is chosen.
// Why: the groups of a token are compared side by side, and several tokens share a wave.
template <int kOwn, int kLanes>
GRID_KERNEL(256) void moe_route_kernel(const MoeRouteParams p) {
    GRID_DYNAMIC_SHARED(Chosen, table);
    constexpr int kTokens = kWave / kLanes;  // of a wave
    i64 first_token = (static_cast<i64>(block_x()) * num_waves() + wave()) * kTokens;
    if (first_token >= p.num_tokens) return;
    int part = lane() % kLanes, row = lane() / kLanes;
    i64 token = first_token + row;
    bool is_token = token < p.num_tokens;
    int group_size = p.num_experts / p.num_groups, group = part / p.lanes_per_group;
    int member = part % p.lanes_per_group * kOwn, first = group * group_size + member;
    int own = is_token && group < p.num_groups ? smaller(larger(group_size - member, 0), kOwn) : 0;

    float score[kOwn], choice[kOwn];
    load_own(score, p.logits, p.type, token * p.logits_stride + first, own, p.wide, kMinusInf);
    GRID_UNROLL for (int i = 0; i < kOwn; ++i) choice[i] = score[i];
    if (p.sigmoid) {
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) score[i] = 1.0f / (1.0f + grid::exp(-score[i]));
    } else {
        float largest = kMinusInf, total = 0.0f;
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) largest = larger(largest, score[i]);
        largest = lanes_reduce(largest, kLanes, [](float a, float b) { return larger(a, b); });
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) total += score[i] = i < own ? grid::exp(score[i] - largest) : 0.0f;
        total = lanes_reduce(total, kLanes, [](float a, float b) { return a + b; });
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) score[i] /= total;
    }
    if (p.bias) {
        load_own(choice, p.bias, kF32, first, own, p.wide, 0.0f);
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) choice[i] += score[i];
    }
    // 0 stands for "cannot be chosen": not an expert, or chosen already.
    u32 order[kOwn];
    GRID_UNROLL for (int i = 0; i < kOwn; ++i) order[i] = i < own ? rank_order(choice[i] == choice[i] ? choice[i] : kMinusInf) : 0;

    if (p.num_groups > 1) {
        u32 best = 0, next = 0;
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) {
            next = larger(next, smaller(best, order[i]));
            best = larger(best, order[i]);
        }
        for (int step = 1; step < p.lanes_per_group; step *= 2) {
            u32 other_best = shfl(best, lane() ^ step), other_next = shfl(next, lane() ^ step);
            next = larger(larger(next, other_next), smaller(best, other_best));
            best = larger(best, other_best);
        }
        u32 value = group < p.num_groups ? rank_order(order_value(best) + (p.bias && next ? order_value(next) : 0.0f)) : 0;
        int ahead = 0;
        for (int g = 0; g < p.num_groups; ++g) {
            u32 other = shfl(value, lane() - part + g * p.lanes_per_group);
            ahead += other > value || (other == value && g < group);
        }
        GRID_UNROLL for (int i = 0; i < kOwn; ++i)
            if (order[i] && ahead >= p.top_groups) order[i] = rank_order(kMinusInf);
    }

    Chosen* chosen = table + (wave() * kTokens + row) * p.top_k;
    for (int n = 0; n < p.top_k; ++n) {
        u32 top = order[0];
        int place = 0;
        GRID_UNROLL for (int i = 1; i < kOwn; ++i) {
            if (order[i] > top) top = order[i], place = i;
        }
        u64 key = static_cast<u64>(top) << 32 | (0xFFFFFFFFu - (part * kOwn + place));
        key = lanes_reduce(key, kLanes, [](u64 a, u64 b) { return larger(a, b); });
        int winner = key_id(key) - part * kOwn;
        GRID_UNROLL for (int i = 0; i < kOwn; ++i) {
            if (winner == i) chosen[n] = {score[i], first + i}, order[i] = 0;
        }
    }
    wave_sync();
    float sum = 0.0f;
    for (int n = 0; n < p.top_k; ++n) sum += chosen[n].score;
    int columns = p.top_k + p.num_shared;
    for (int n = part; n < columns && is_token; n += kLanes) {
        bool is_shared = n >= p.top_k;
        float weight = is_shared ? 1.0f : (p.renormalise ? chosen[n].score / (sum + 1e-20f) : chosen[n].score) * p.scale;
        p.weights[token * columns + n] = weight;
        p.ids[token * columns + n] = is_shared ? p.num_experts + n - p.top_k : chosen[n].id;
    }
}

static int next_power_of_two(i64 n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

template <int kOwn, int kLanes>
static int start(const Args& args, MoeRouteParams params, int lanes_per_group) {
    params.lanes_per_group = lanes_per_group;
    int threads = threads_for(args, 256, 256), tokens = threads / kLanes;
    return launch(args, moe_route_kernel<kOwn, kLanes>, {ceil_div(params.num_tokens, tokens)}, threads, params, static_cast<i64>(tokens) * params.top_k * sizeof(Chosen));
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
    i64 size = num_experts / num_groups;
    bool wide = size % 8 == 0 && aligned(logits, num_experts, 16) && aligned(args[3], num_experts, 16);
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
                          0,
                          args.integer(3) != 0,
                          args.integer(4) != 0,
                          wide,
                          args.real(5)};
    // Groups are padded to a power of two of lanes, and their number to a power of two.
    int groups = next_power_of_two(num_groups), per_group = next_power_of_two(ceil_div(size, 8)), lanes = groups * per_group;
    if (lanes <= 8) return start<8, 8>(args, params, 8 / groups);
    if (lanes <= 16) return start<8, 16>(args, params, per_group);
    if (lanes <= 32) return start<8, 32>(args, params, per_group);
    if (lanes <= kWave) return start<8, kWave>(args, params, per_group);
    per_group = next_power_of_two(ceil_div(size, 32));
    if (groups * per_group <= kWave) return start<32, kWave>(args, params, per_group);
    return fail(args, "logits: expected at most %d experts on this chip, groups and their number counted as powers of two; got %lld groups of %lld", 32 * kWave,
                num_groups, size);
}
