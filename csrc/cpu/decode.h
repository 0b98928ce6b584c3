// SPDX-License-Identifier: Apache-2.0
// Attention of rows of queries over paged keys and values, 256 tokens at a time, and of single queries for all heads that
// share a kv head at once.
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

// The tokens that a row sees, counted from the first of the split.
struct Range {
  Index start, stop;
};

// out[h] = sum of weights[h][t] * values[t] over the tokens that row h sees, for one block of vectors.
template <int Heads, int Vectors, class T>
inline void mix(const float* weights, const T* const* values, const Range* seen, Index offset, Index width, float* out,
                Index out_stride) {
  Floats total[Heads][Vectors] = {};
  const auto add = [&](Index t, const auto& sees) {
    Floats v[Vectors];
    for (int i = 0; i < Vectors; ++i)
      v[i] = Vectors > 1 ? load(values[t] + offset + i * kLanes) : load_some(values[t] + offset, width);
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h)
      if (sees(h))
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; ++i) total[h][i] += weights[h * kSplit + t] * v[i];
  };
  Range some = seen[0], all = seen[0];
  for (int h = 1; h < Heads; ++h) {
    some = {std::min(some.start, seen[h].start), std::max(some.stop, seen[h].stop)};
    all = {std::max(all.start, seen[h].start), std::min(all.stop, seen[h].stop)};
  }
  for (Index t = some.start; t < some.stop; ++t)
    if (t >= all.start && t < all.stop)
      add(t, [](int) { return true; });
    else
      add(t, [&](int h) { return t >= seen[h].start && t < seen[h].stop; });
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Vectors; ++i) store_some(out + h * out_stride + offset + i * kLanes, total[h][i], width);
}

template <int Heads, class T>
inline void mix_heads(Index heads, const float* weights, const T* const* values, const Range* seen, Index width, float* out,
                      Index stride) {
  if (heads < Heads) {
    if constexpr (Heads > 1) mix_heads<Heads - 1>(heads, weights, values, seen, width, out, stride);
    return;
  }
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  Index i = 0;
  for (; i + kWide * kLanes <= width; i += kWide * kLanes) mix<Heads, kWide>(weights, values, seen, i, kLanes, out, stride);
  for (; i < width; i += kLanes) mix<Heads, 1>(weights, values, seen, i, std::min<Index>(kLanes, width - i), out, stride);
}

// Where the keys and values of a split are, and how many.
template <class T>
struct Tokens {
  const T *keys[kSplit], *values[kSplit];
  Index count;

  // Tokens first .. first + number of the sequence that owns `pages`, of one kv head.
  Tokens(Rows<T> k, Rows<T> v, const int32_t* pages, Index page_size, Index first, Index number, Index head) : count(number) {
    Index page = first / page_size, offset = first % page_size;
    for (Index t = 0; t < number; ++t) {
      const Index row = Index(pages[page]) * page_size + offset;
      keys[t] = k.data + row * k.stride + head * k.width;
      values[t] = v.data + row * v.stride + head * v.width;
      __builtin_prefetch(keys[t]);
      __builtin_prefetch(values[t]);
      if (++offset == page_size) offset = 0, ++page;
    }
  }
};

// Rows' partial results over a split: out[h] = largest score, sum of weights, sum of weights times values.
template <class T>
inline void attend(const T* const* q, const Range* seen, Index rows, const Tokens<T>& tokens, Index depth, Index width, Scores s,
                   float* out) {
  const Index padded = (tokens.count + kLanes - 1) / kLanes * kLanes, stride = width + 2;
  const float lowest = -std::numeric_limits<float>::infinity();
  float* weights = scratch<1>(rows * kSplit);
  by_tiles(rows, [&](Index first, Index count) {
    for (Index t = 0; t < tokens.count; t += kTileColumns) {
      const T* column[kTileColumns];
      for (Index j = 0; j < kTileColumns; ++j) column[j] = tokens.keys[std::min(t + j, tokens.count - 1)];
      Four found[kTileRows] = {};
      tile(count, q + first, column, depth, found);
      for (Index m = 0; m < count; ++m) {
        found[m] *= s.scale;
        std::memcpy(weights + (first + m) * kSplit + t, &found[m], sizeof(Four));
      }
    }
  });
  for (Index h = 0; h < rows; ++h) {
    float* score = weights + h * kSplit;
    std::fill(score, score + seen[h].start, lowest);
    std::fill(score + seen[h].stop, score + padded, lowest);
    for (Index t = seen[h].start; s.cap != 0 && t < seen[h].stop; ++t) score[t] = s.cap * std::tanh(score[t] / s.cap);
    Floats most = load(score), total = {};
    for (Index t = kLanes; t < padded; t += kLanes) {
      const Floats v = load(score + t);
      most = v > most ? v : most;
    }
    const float top = seen[h].start < seen[h].stop ? largest(most) : lowest;
    for (Index t = 0; t < padded; t += kLanes) {
      const Floats e = exp(load(score + t) - (top == lowest ? 0 : top));
      store(score + t, e);
      total += e;
    }
    out[h * stride] = top;
    out[h * stride + 1] = sum(total);
  }
  for (Index h = 0; h < rows; h += 4)
    mix_heads<4>(std::min<Index>(4, rows - h), weights + h * kSplit, tokens.values, seen + h, width, out + h * stride + 2, stride);
}

// The result of one head from its splits' partial results, `stride` apart; sink: one more score without a value.
template <class T>
inline void merge(T* out, const float* part, Index splits, Index stride, Index width, const float* sink) {
  float top = sink ? *sink : part[0];
  for (Index s = 0; s < splits; ++s) top = std::max(top, part[s * stride]);
  if (top == -std::numeric_limits<float>::infinity()) return void(std::fill(out, out + width, T{}));  // nothing is seen
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
  Index base(Index query) const { return start(query) / kSplit * kSplit; }

  void run() const {
    Index splits = 1, tokens = 0;
    for (Index i = 0; i < queries; ++i) {
      splits = std::max(splits, (stop(i) - base(i) + kSplit - 1) / kSplit);
      tokens += std::max<Index>(0, stop(i));
    }
    const Index group = heads / kv_heads, part = v.width + 2;
    float* parts = splits > 1 ? scratch<2>(queries * heads * splits * part) : nullptr;
    const double work = 0.1 * tokens * heads * (k.width + v.width);
    parallel(queries * kv_heads * splits, work, [&](Index unit) {
      const Index split = unit % splits, head = unit / splits % kv_heads;
      const Index query = unit / splits / kv_heads;
      const Index first = base(query) + split * kSplit, count = std::min(kSplit, stop(query) - first);
      T* result = out + (query * heads + head * group) * v.width;
      if (count <= 0) {
        if (split == 0) std::fill(result, result + group * v.width, T{});
        return;
      }
      const Tokens<T> tokens(k, v, table + query / new_tokens * table_width, page_size, first, count, head);
      std::vector<const T*> row(group);
      const std::vector<Range> seen(group, Range{std::max<Index>(0, start(query) - first), count});
      for (Index h = 0; h < group; ++h) row[h] = q + query * q_stride + (head * group + h) * k.width;
      float* found = parts ? parts + ((query * splits + split) * heads + head * group) * part : scratch<3>(group * part);
      attend(row.data(), seen.data(), group, tokens, k.width, v.width, scores, found);
      for (Index h = 0; !parts && h < group; ++h)
        merge(result + h * v.width, found + h * part, 1, part, v.width, sinks ? sinks + head * group + h : nullptr);
    });
    if (!parts) return;
    parallel(queries * heads, 1.0 * queries * heads * splits * part, [&](Index unit) {
      const Index query = unit / heads, head = unit % heads, used = (stop(query) - base(query) + kSplit - 1) / kSplit;
      if (used > 0)
        merge(out + unit * v.width, parts + (query * splits * heads + head) * part, used, heads * part, v.width,
              sinks ? sinks + head : nullptr);
    });
  }
};

}  // namespace cpu
