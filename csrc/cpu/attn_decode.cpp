// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

namespace cpu {

template <class T>
void attn_decode(T* out, const T* q, const T* k_cache, const T* v_cache, const int32_t* table, const int32_t* kv_len,
                 const float* sinks, Index seqs, Index heads, Index kv_heads, Index k_width, Index v_width, Index page_size,
                 Index table_width, Index q_stride, double scale, Index window, double cap) {
  const Rows<T> k{k_cache, kv_heads * k_width, k_width}, v{v_cache, kv_heads * v_width, v_width};
  Decode<T>{out,      q,        k,           v, table,  kv_len, sinks, seqs, heads, kv_heads,
            q_stride, page_size, table_width, 1, window, {float(scale), float(cap)}}
      .run();
}

}  // namespace cpu

EXPORT(attn_decode)
