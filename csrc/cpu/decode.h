// SPDX-License-Identifier: Apache-2.0
// Attention of single queries over paged keys and values, for all heads that share a kv head at once.
// Split: (query, kv head, 256 tokens); a query's splits depend on its own length alone. Partial results are merged in order.
#pragma once

#include "vec.h"

namespace cpu {

constexpr Index kSplit = 256;

// Rows [tokens][heads][width] in pages; `stride` lies between tokens.
template <class T>
struct Rows {
  const T* data;
  Index stride, width;
};

struct Scores {
  float scale, cap;
};

// out[h] = sum of weights[h][t] * values[t], for `Heads` heads and one block of vectors.
template <int Heads, int Vectors, class T>
inline void mix(const float* weights, const T* const* values, Index count, Index offset, Index width, float* out, Index out_stride) {
  Floats total[Heads][Vectors] = {};
  for (Index t = 0; t < count; ++t) {
    Floats v[Vectors];
    for (int i = 0; i < Vectors; ++i)
      v[i] = Vectors > 1 ? load(values[t] + offset + i * kLanes) : load_some(values[t] + offset, width);
    for (int h = 0; h < Heads; ++h)
      for (int i = 0; i < Vectors; ++i) total[h][i] += weights[h * kSplit + t] * v[i];
  }
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Vectors; ++i) store_some(out + h * out_stride + offset + i * kLanes, total[h][i], width);
}

template <int Heads, class T>
inline void mix_heads(Index heads, const float* weights, const T* const* values, Index count, Index width, float* out, Index stride) {
  if (heads < Heads) {
    if constexpr (Heads > 1) mix_heads<Heads - 1>(heads, weights, values, count, width, out, stride);
    return;
  }
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  Index i = 0;
  for (; i + kWide * kLanes <= width; i += kWide * kLanes) mix<Heads, kWide>(weights, values, count, i, kLanes, out, stride);
  for (; i < width; i += kLanes) mix<Heads, 1>(weights, values, count, i, std::min<Index>(kLanes, width - i), out, stride);
}

// Heads' partial results over `count` tokens: out[h] = largest score, sum of weights, sum of weights times values.
template <class T>
inline void attend(const T* q, Index heads, Index q_stride, const T* const* keys, const T* const* values, Index count, Index depth,
                   Index width, Scores s, float* out) {
  float* weights = scratch<1>(heads * kSplit);
  for (Index first = 0; first < heads; first += kTileRows) {
    const Index rows = std::min<Index>(kTileRows, heads - first);
    const T* row[kTileRows];
    for (Index m = 0; m < rows; ++m) row[m] = q + (first + m) * q_stride;
    for (Index t = 0; t < count; t += kTileColumns) {
      const T* column[kTileColumns];
      for (Index j = 0; j < kTileColumns; ++j) column[j] = keys[std::min(t + j, count - 1)];
      Four found[kTileRows] = {};
      tile(rows, row, column, depth, found);
      for (Index m = 0; m < rows; ++m) {
        found[m] *= s.scale;
        std::memcpy(weights + (first + m) * kSplit + t, &found[m], sizeof(Four));
      }
    }
  }
  const Index stride = width + 2, padded = (count + kLanes - 1) / kLanes * kLanes;
  for (Index h = 0; h < heads; ++h) {
    float* score = weights + h * kSplit;
    std::fill(score + count, score + padded, -std::numeric_limits<float>::infinity());
    for (Index t = 0; s.cap != 0 && t < count; ++t) score[t] = s.cap * std::tanh(score[t] / s.cap);
    Floats most = load(score), total = {};
    for (Index t = kLanes; t < padded; t += kLanes) {
      const Floats v = load(score + t);
      most = v > most ? v : most;
    }
    const float top = largest(most);
    for (Index t = 0; t < padded; t += kLanes) {
      const Floats e = exp(load(score + t) - top);
      store(score + t, e);
      total += e;
    }
    out[h * stride] = top;
    out[h * stride + 1] = sum(total);
  }
  for (Index h = 0; h < heads; h += 4)
    mix_heads<4>(std::min<Index>(4, heads - h), weights + h * kSplit, values, count, width, out + h * stride + 2, stride);
}

// The result of one head from its splits' partial results, `stride` apart; sink: one more score without a value.
template <class T>
inline void merge(T* out, const float* part, Index splits, Index stride, Index width, const float* sink) {
  float top = sink ? *sink : part[0];
  for (Index s = 0; s < splits; ++s) top = std::max(top, part[s * stride]);
  float total = sink ? std::exp(*sink - top) : 0;
  for (Index s = 0; s < splits; ++s) total += part[s * stride + 1] * std::exp(part[s * stride] - top);
  by_vectors(width, [&](Index i, Index n) {
    Floats v = {};
    for (Index s = 0; s < splits; ++s) v += load_some(part + s * stride + 2 + i, n) * std::exp(part[s * stride] - top);
    store_some(out + i, v / total, n);
  });
}

template <class T>
struct Decode {
  T* out;                 // [queries, heads, v.width]
  const T* q;             // [queries, heads, k.width], queries q_stride apart
  Rows<T> k, v;
  const int32_t *table, *kv_len;  // of a sequence, which has `new_tokens` queries, its last tokens
  const float* sinks;     // [heads] or null
  Index queries, heads, kv_heads, q_stride, page_size, table_width, new_tokens, window;
  Scores scores;

  Index stop(Index query) const { return kv_len[query / new_tokens] - new_tokens + query % new_tokens + 1; }
  Index start(Index query) const { return window > 0 ? std::max<Index>(0, stop(query) - window) : 0; }

  void run() const {
    Index splits = 1, tokens = 0;
    for (Index i = 0; i < queries; ++i) {
      splits = std::max(splits, (stop(i) - start(i) + kSplit - 1) / kSplit);
      tokens += std::max<Index>(0, stop(i));
    }
    const Index group = heads / kv_heads, part = v.width + 2;
    float* parts = splits > 1 ? scratch<2>(queries * heads * splits * part) : nullptr;
    const double work = 0.1 * tokens * heads * (k.width + v.width);
    parallel(queries * kv_heads * splits, work, [&](Index unit) {
      const Index split = unit % splits, head = unit / splits % kv_heads;
      const Index query = unit / splits / kv_heads;
      const Index first = start(query) + split * kSplit, count = std::min(kSplit, stop(query) - first);
      T* result = out + (query * heads + head * group) * v.width;
      if (count <= 0) {
        if (split == 0) std::fill(result, result + group * v.width, T{});
        return;
      }
      const T *keys[kSplit], *values[kSplit];
      const int32_t* pages = table + query / new_tokens * table_width;
      for (Index t = 0; t < count; ++t) {
        const Index row = Index(pages[(first + t) / page_size]) * page_size + (first + t) % page_size;
        keys[t] = k.data + row * k.stride + head * k.width;
        values[t] = v.data + row * v.stride + head * v.width;
      }
      float* found = parts ? parts + ((query * splits + split) * heads + head * group) * part : scratch<3>(group * part);
      attend(q + query * q_stride + head * group * k.width, group, k.width, keys, values, count, k.width, v.width, scores, found);
      for (Index h = 0; !parts && h < group; ++h)
        merge(result + h * v.width, found + h * part, 1, part, v.width, sinks ? sinks + head * group + h : nullptr);
    });
    if (!parts) return;
    parallel(queries * heads, 1.0 * queries * heads * splits * part, [&](Index unit) {
      const Index query = unit / heads, head = unit % heads, used = (stop(query) - start(query) + kSplit - 1) / kSplit;
      if (used > 0)
        merge(out + unit * v.width, parts + (query * splits * heads + head) * part, used, heads * part, v.width,
              sinks ? sinks + head : nullptr);
    });
  }
};

}  // namespace cpu
