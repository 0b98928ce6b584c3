// SPDX-License-Identifier: Apache-2.0
// How a row of fp32 values leaves a kernel: rounded to the type of the input, or as fp8 codes with a scale per group.
#pragma once

#include "grid/abi.h"

namespace grid {

constexpr float kSmallestAmax = 1e-4f;
constexpr int kMostGroups = 12 * 1024;  // a table of them fits into LDS

// Where the largest magnitude of a group comes from: neighbouring lanes, the whole block, or a table in LDS for the odd sizes.
enum class Groups : int { kNone, kLanes, kRow, kTable };

struct RowOut {
    void* y;         // [T, width]
    float* scale;    // [T, ceil(width / group)], or null
    i64 y_stride, scale_stride;
    int group;
    int lanes, lanes_log2;  // neighbouring lanes that share a scale, where a power of two do
    bool fnuz;
    Groups groups;
};

inline Groups groups_for(int group, int width, int vector) {
    if (group == 0) return Groups::kNone;
    int lanes = group / vector;
    if (group % vector == 0 && lanes >= 1 && lanes <= kWave && (lanes & (lanes - 1)) == 0) return Groups::kLanes;
    return group >= width ? Groups::kRow : Groups::kTable;
}

inline RowOut row_out(const Tensor& y, const Tensor& scale, i64 group, i64 width, int vector) {
    i64 clipped = group < width ? group : (width > 0 ? width : 1);
    if (group == 0) clipped = 0;
    int lanes = static_cast<int>(clipped) / vector;
    return {y.data,
            scale.as<float>(),
            y.stride[0],
            scale ? scale.stride[0] : 0,
            static_cast<int>(clipped),
            lanes,
            lanes > 0 ? __builtin_ctz(lanes) : 0,
            y.type == kFp8Fnuz,
            groups_for(static_cast<int>(clipped), static_cast<int>(width), vector)};
}

inline i64 table_bytes(const RowOut& out, i64 width) {
    return out.groups == Groups::kTable ? ceil_div(width, out.group) * 4 : 0;
}

inline int check_row_out(const Args& args, const Tensor& y, const Tensor& scale, int type, i64 width, i64 group) {
    if (group < 0) return fail(args, "fp8 output: expected group > 0, got %lld", group);
    if (group && (!scale || !is_fp8(y))) return fail(args, "fp8 output: expected out_dtype float8_e4m3fn or float8_e4m3fnuz, got type code %d", y.type);
    if (!group && y.type != type) return fail(args, "out_dtype: expected the type of x without group, got type code %d", y.type);
    if (group && ceil_div(width, group) > kMostGroups) return fail(args, "group: expected at most %d groups in a row, got %lld", kMostGroups, ceil_div(width, group));
    return 0;
}

// |x| as an integer orders like the number, and NaN above all numbers: a maximum of these keeps NaN where fmax would drop it.
template <int N>
GRID_DEVICE u32 largest_bits(const float (&values)[N]) {
    u32 bits = 0;
    GRID_UNROLL for (int i = 0; i < N; ++i) bits = larger(bits, bits_of<u32>(values[i]) & 0x7FFFFFFFu);
    return bits;
}

GRID_DEVICE float scale_of(u32 bits, bool fnuz) {
    float amax = bits_of<float>(bits);
    return (amax < kSmallestAmax ? kSmallestAmax : amax) / largest_fp8(fnuz);
}

// x / scale is beyond the largest by the rounding of the product at most. Where the group has NaN or Inf, NaN passes the limit.
GRID_DEVICE float scaled(float x, float scale, bool fnuz) {
    bool finite = (bits_of<u32>(scale) & 0x7F800000u) != 0x7F800000u;
    return within(x * reciprocal(scale), finite ? largest_fp8(fnuz) : __builtin_nanf(""));
}

template <int N>
GRID_DEVICE void store_codes(fp8* y, const float (&values)[N], float scale, bool fnuz) {
    float kept[N];
    GRID_UNROLL for (int i = 0; i < N; ++i) kept[i] = scaled(values[i], scale, fnuz);
    store(y, encode_within(kept, fnuz));
}

// Rows that stay in the type of the input.
template <class T, int N, class Values>
GRID_DEVICE void write_rounded(T* y, int first, int last, Values values) {
    for (int vec = first + thread_x(); vec < last; vec += num_threads()) {
        float v[N];
        values(v, vec, true);
        store(y + vec * N, rounded<T, N>(v));
    }
}

// Groups that neighbouring lanes hold.
template <int N, class Values>
GRID_DEVICE void write_lane_groups(const RowOut& out, fp8* y, float* scales, int first, int last, Values values) {
    auto most = [](u32 a, u32 b) { return larger(a, b); };
    for (int base = first; base < last; base += num_threads()) {
        int vec = base + thread_x();
        bool active = vec < last;
        float v[N] = {};
        if (active) values(v, vec, true);
        u32 bits = largest_bits(v);
        bits = out.lanes == 16 ? ring_reduce(bits, most) : lanes_reduce(bits, out.lanes, most);
        if (!active) continue;
        float scale = scale_of(bits, out.fnuz);
        store_codes(y + vec * N, v, scale, out.fnuz);
        if (vec % (1 << out.lanes_log2) == 0) scales[vec >> out.lanes_log2] = scale;
    }
}

// One group, the whole row.
template <int N, class Values>
GRID_DEVICE void write_row_group(const RowOut& out, fp8* y, float* scales, int first, int last, u32 (&parts)[kMaxWaves], Values values) {
    float v[N];
    u32 bits = 0;
    for (int vec = first + thread_x(); vec < last; vec += num_threads()) {
        values(v, vec, false);
        bits = larger(bits, largest_bits(v));
    }
    float scale = scale_of(block_max(bits, parts), out.fnuz);
    for (int vec = first + thread_x(); vec < last; vec += num_threads()) {
        values(v, vec, true);
        store_codes(y + vec * N, v, scale, out.fnuz);
    }
    if (thread_x() == 0 && first < last) scales[0] = scale;
}

// Groups of odd sizes, whose largest magnitudes are collected in LDS.
template <int N, class Values>
GRID_DEVICE void write_table_groups(const RowOut& out, fp8* y, float* scales, int width, int first, int last, Values values) {
    GRID_DYNAMIC_SHARED(u32, table);
    float v[N];
    int num_groups = (width + out.group - 1) / out.group;
    for (int g = thread_x(); g < num_groups; g += num_threads()) table[g] = 0;
    sync();
    for (int vec = first + thread_x(); vec < last; vec += num_threads()) {
        values(v, vec, false);
        for (int i = 0; i < N; ++i) atomic_max(&table[(vec * N + i) / out.group], bits_of<u32>(v[i]) & 0x7FFFFFFFu);
    }
    sync();
    for (int g = thread_x(); g < num_groups; g += num_threads()) {
        float scale = scale_of(table[g], out.fnuz);
        scales[g] = scale, table[g] = bits_of<u32>(scale);
    }
    sync();
    for (int vec = first + thread_x(); vec < last; vec += num_threads()) {
        values(v, vec, true);
        for (int i = 0; i < N; ++i) v[i] = scaled(v[i], bits_of<float>(table[(vec * N + i) / out.group]), out.fnuz);
        store(y + vec * N, encode_within(v, out.fnuz));
    }
}

// Split: the block owns vectors first..last of N elements of the row. values(v, vector, final) makes the fp32 values of one; it is
// asked once per vector with final = true, and once before with final = false if a group spreads beyond the lanes of a wave.
template <class T, int N, class Values>
GRID_DEVICE void write_row(const RowOut& out, i64 row, int width, int first, int last, u32 (&parts)[kMaxWaves], Values values) {
    if (out.groups == Groups::kNone) return write_rounded<T, N>(static_cast<T*>(out.y) + row * out.y_stride, first, last, values);
    fp8* y = static_cast<fp8*>(out.y) + row * out.y_stride;
    float* scales = out.scale + row * out.scale_stride;
    if (out.groups == Groups::kLanes) return write_lane_groups<N>(out, y, scales, first, last, values);
    if (out.groups == Groups::kRow) return write_row_group<N>(out, y, scales, first, last, parts, values);
    write_table_groups<N>(out, y, scales, width, first, last, values);
}

}  // namespace grid
