// SPDX-License-Identifier: Apache-2.0
// Latent attention: all heads share the rows of the cache, which are keys as a whole and values in their first part.
// q and the new rows are turned first, into a copy and into the cache.
#include "decode.h"
#include "rope.h"

namespace cpu {

template <class T>
void mla_decode(T* out, const T* q, const T* kv_new, T* cache, const int32_t* table, const int32_t* kv_len,
                const Index* positions, const float* angles, Index seqs, Index new_tokens, Index heads, Index width,
                Index latent, Index page_size, Index table_width, double scale, Index interleaved, double cap) {
  const Index queries = seqs * new_tokens, turned = width - latent;
  if (kv_new) {
    T* copy = reinterpret_cast<T*>(scratch<4>(queries * heads * width));
    parallel(queries, 1.0 * queries * heads * width, [&](Index query) {
      const float* angle = angles + positions[query] * turned;
      for (Index row = query * heads; row < (query + 1) * heads; ++row) {
        std::copy(q + row * width, q + row * width + latent, copy + row * width);
        rotate(copy + row * width + latent, q + row * width + latent, angle, turned, turned, interleaved);
      }
      const Index seq = query / new_tokens, token = kv_len[seq] - new_tokens + query % new_tokens;
      if (token < 0) return;
      T* row = cache + (Index(table[seq * table_width + token / page_size]) * page_size + token % page_size) * width;
      std::copy(kv_new + query * width, kv_new + query * width + latent, row);
      rotate(row + latent, kv_new + query * width + latent, angle, turned, turned, interleaved);
    });
    q = copy;
  }
  const Rows<T> keys{cache, width, width}, values{cache, width, latent};
  Decode<T>{out,           q,         keys,        values,     table, kv_len, nullptr, queries, heads, 1,
            heads * width, page_size, table_width, new_tokens, 0,     {float(scale), float(cap)}}
      .run();
}

}  // namespace cpu

EXPORT(mla_decode)
