// SPDX-License-Identifier: Apache-2.0
// Split: (some queries of a sequence, kv head); the heads of a group and about 24 rows in all go together over 256 tokens at
// a time. A query sees its own tokens in the order that decoding sees them, whatever chunk it came in.
#include "decode.h"

namespace cpu {

constexpr Index kRows = 24;

template <class T>
void attn_prefill(T* out, const T* q, const T* k_cache, const T* v_cache, const int32_t* table, const int32_t* query_start,
                  const int32_t* kv_len, const float* sinks, Index tokens, Index seqs, Index heads, Index kv_heads, Index k_width,
                  Index v_width, Index page_size, Index table_width, Index q_stride, double scale, Index causal, Index window,
                  double cap) {
  const Rows<T> k{k_cache, kv_heads * k_width, k_width}, v{v_cache, kv_heads * v_width, v_width};
  const Index group = heads / kv_heads, block = std::max<Index>(1, kRows / group), part = v_width + 2;
  struct Block {
    Index seq, first, count;
  };
  std::vector<Block> blocks;
  double work = 0;
  for (Index seq = 0; seq < seqs; ++seq) {
    for (Index i = query_start[seq]; i < query_start[seq + 1]; i += block)
      blocks.push_back({seq, i, std::min<Index>(block, query_start[seq + 1] - i)});
    work += 0.1 * (query_start[seq + 1] - query_start[seq]) * kv_len[seq] * heads * (k_width + v_width);
  }
  std::fill(out, out + tokens * heads * v_width, T{});
  parallel(Index(blocks.size()) * kv_heads, work, [&](Index unit) {
    const auto [seq, first, count] = blocks[unit / kv_heads];
    const Index head = unit % kv_heads, rows = count * group, length = kv_len[seq];
    const Index position = length - query_start[seq + 1] + first;  // of the first query
    const Index stop = causal ? position + count : length;
    const Index start = window > 0 ? std::max<Index>(0, position + 1 - window) / kSplit * kSplit : 0;
    const Index splits = (stop - start + kSplit - 1) / kSplit;
    if (splits <= 0) return;
    std::vector<const T*> row(rows);
    std::vector<Range> seen(rows);
    for (Index r = 0; r < rows; ++r) row[r] = q + (first + r / group) * q_stride + (head * group + r % group) * k_width;
    float* parts = scratch<2>(splits * rows * part);
    for (Index s = 0; s < splits; ++s) {
      const Index offset = start + s * kSplit, number = std::min(kSplit, stop - offset);
      const auto inside = [=](Index t) { return std::min(std::max<Index>(0, t - offset), number); };
      for (Index r = 0; r < rows; ++r) {
        const Index own = position + r / group;
        seen[r] = {inside(window > 0 ? own + 1 - window : 0), inside(causal ? own + 1 : length)};
        seen[r].stop = std::max(seen[r].start, seen[r].stop);
      }
      const Tokens<T> found(k, v, table + seq * table_width, page_size, offset, number, head);
      attend(row.data(), seen.data(), rows, found, k_width, v_width, {float(scale), float(cap)}, parts + s * rows * part);
    }
    for (Index r = 0; r < rows; ++r) {
      const Index h = head * group + r % group;
      merge(out + ((first + r / group) * heads + h) * v_width, parts + r * part, splits, rows * part, v_width,
            sinks ? sinks + h : nullptr);
    }
  });
}

}  // namespace cpu

EXPORT(attn_prefill)
