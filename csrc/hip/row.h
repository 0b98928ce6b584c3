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
    return {y.data,
            scale.as<float>(),
            y.stride[0],
            scale ? scale.stride[0] : 0,
            static_cast<int>(clipped),
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

template <int N>
GRID_DEVICE void store_codes(const RowOut& out, i64 row, int column, const float (&values)[N], float scale) {
    float scaled[N];
    GRID_UNROLL for (int i = 0; i < N; ++i) scaled[i] = values[i] / scale;
    store(static_cast<fp8*>(out.y) + row * out.y_stride + column, encode(scaled, out.fnuz));
}

// Split: the block owns vectors first..last of N elements of the row. values(v, vector, final) makes the fp32 values of one; it is
// asked once per vector with final = true, and once before with final = false if a group spreads beyond the lanes of a wave.
template <class T, int N, class Values>
GRID_DEVICE void write_row(const RowOut& out, i64 row, int width, int first, int last, u32 (&parts)[kMaxWaves], Values values) {
    GRID_DYNAMIC_SHARED(u32, table);
    float v[N];
    u32 row_bits = 0;
    int num_groups = out.group ? (width + out.group - 1) / out.group : 0;
    if (out.groups == Groups::kRow || out.groups == Groups::kTable) {
        if (out.groups == Groups::kTable) {
            for (int g = thread_x(); g < num_groups; g += num_threads()) table[g] = 0;
            sync();
        }
        for (int vec = first + thread_x(); vec < last; vec += num_threads()) {
            values(v, vec, false);
            row_bits = larger(row_bits, largest_bits(v));
            if (out.groups == Groups::kTable)
                for (int i = 0; i < N; ++i) atomic_max(&table[(vec * N + i) / out.group], bits_of<u32>(v[i]) & 0x7FFFFFFFu);
        }
        row_bits = block_max(row_bits, parts);
        if (out.groups == Groups::kTable) sync();
    }
    for (int base = first; base < last; base += num_threads()) {
        int vec = base + thread_x(), column = vec * N;
        bool active = vec < last;
        GRID_UNROLL for (int i = 0; i < N; ++i) v[i] = 0.0f;
        if (active) values(v, vec, true);
        if (out.groups == Groups::kNone) {
            Vec<T, N> rounded;
            GRID_UNROLL for (int i = 0; i < N; ++i) rounded.v[i] = from_float<T>(v[i]);
            if (active) store(static_cast<T*>(out.y) + row * out.y_stride + column, rounded);
        } else if (out.groups == Groups::kTable) {
            if (!active) continue;
            for (int i = 0; i < N; ++i) {
                float one[1] = {v[i]};
                store_codes(out, row, column + i, one, scale_of(table[(column + i) / out.group], out.fnuz));
            }
        } else {
            bool own_group = out.groups == Groups::kLanes;
            u32 bits = own_group ? lanes_reduce(largest_bits(v), out.group / N, [](u32 a, u32 b) { return larger(a, b); }) : row_bits;
            float scale = scale_of(bits, out.fnuz);
            if (!active) continue;
            store_codes(out, row, column, v, scale);
            if (own_group && column % out.group == 0) out.scale[row * out.scale_stride + column / out.group] = scale;
        }
    }
    if (out.groups == Groups::kRow && thread_x() == 0 && first < last) out.scale[row * out.scale_stride] = scale_of(row_bits, out.fnuz);
    if (out.groups == Groups::kTable)
        for (int g = thread_x(); g < num_groups; g += num_threads()) out.scale[row * out.scale_stride + g] = scale_of(table[g], out.fnuz);
}

}  // namespace grid
