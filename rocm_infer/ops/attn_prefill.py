# SPDX-License-Identifier: Apache-2.0
"""Attention of many new tokens per sequence over paged keys and values that already hold them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rocm_infer.ops._op import FP8, Cost, op
from rocm_infer.ops._paged import QUERY_BLOCK, attend, check_heads, hidden_keys, read_rows


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: B sequences of T / B new tokens after L cached ones; H, G, D, Dv, P; pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    batch, page, new = dims["B"], dims["P"], dims["T"] // dims["B"]
    width = -(-(new + dims["L"]) // page)
    cache = (batch * width, page, dims["G"])
    return {
        "q": torch.randn(batch * new, dims["H"], dims["D"], generator=generator).to(device, dtype),
        "k_cache": torch.randn(*cache, dims["D"], generator=generator).to(device, dtype),
        "v_cache": torch.randn(*cache, dims["Dv"], generator=generator).to(device, dtype),
        "page_table": torch.randperm(batch * width, generator=generator).view(batch, width).int().to(device),
        "query_start": (torch.arange(batch + 1) * new).int().to(device),
        "kv_len": torch.full((batch,), new + dims["L"], dtype=torch.int32, device=device),
        "scale": dims["D"] ** -0.5,
    }


def _cost(dims: dict[str, int], *, itemsize: int = 2, cache_itemsize: int = 2) -> Cost:
    tokens, new, both = dims["T"], dims["T"] // dims["B"], dims["D"] + dims["Dv"]
    keys = dims["B"] * (new + dims["L"]) * dims["G"] * both
    pairs = tokens * dims["L"] + tokens * (new + 1) // 2
    return Cost(bytes=keys * cache_itemsize + tokens * dims["H"] * both * itemsize, flops=2 * pairs * dims["H"] * both)


@op(
    "q[T, H, D]:bf16|f16|f32, k_cache[N, P, G, D]:q|fp8, v_cache[N, P, G, Dv]:k_cache, page_table[B, W]:i32, "
    "query_start[B + 1]:i32, kv_len[B]:i32, sinks?[H]:f32 -> o[T, H, Dv]:q",
    inputs=_inputs,
    cost=_cost,
    check=check_heads,
)
def attn_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """o = softmax(s) v with s = scale * q . k; the queries of sequence b are the last of its kv_len tokens.

    Sequence b has the queries query_start[b] .. query_start[b + 1] of T; their keys and values are already in the cache.
    Query head h reads kv head h // (H / G). Token j of sequence b is row j % P of page page_table[b, j // P].
    causal: query at position i sees keys 0 .. i, otherwise all kv_len. window: > 0: only keys above i - window.
    cap: > 0: s becomes cap * tanh(s / cap). sinks: one more score per head, with no value.
    k_scale, v_scale: value = code * scale, for fp8 caches.
    Numerics: scores, softmax and sums in fp32; the weights may be rounded to the type of q; one rounding at the end.
    Edges: no queries, or kv_len 0, give nothing for that sequence; rows of T that no sequence owns are zeros.
    Nothing is read beyond kv_len, nor a page that is not in use.
    Errors: ValueError if H is no multiple of G.
    Source: Dao et al. 2022; sinks as in gpt-oss; cap as in Gemma 2.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    if k_cache.dtype in FP8:
        scale = scale * k_scale
    bounds = query_start.tolist()
    for row, (pages, length) in enumerate(zip(page_table.tolist(), kv_len.tolist())):
        first, last = bounds[row], bounds[row + 1]
        if first == last or length == 0:
            continue
        k, v = read_rows(k_cache, pages, 0, length), read_rows(v_cache, pages, 0, length)
        found = _one_sequence(q[first:last], k, v, sinks, scale, causal, window, cap)
        out[first:last] = found * v_scale if v_cache.dtype in FP8 else found
    return out


def _one_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    cap: float,
) -> torch.Tensor:
    """Causal attention by torch's fused kernel where it has one, otherwise in blocks of queries that skip unseen keys."""
    num_queries, length = q.shape[0], k.shape[0]
    prefix = length - num_queries
    if sinks is None and cap == 0.0 and window == 0 and q.shape[-1] == v.shape[-1]:
        hidden = None if prefix == 0 else hidden_keys(prefix, num_queries, 0, length, causal, window)
        q, k, v = (x.to(q.dtype).transpose(0, 1)[None] for x in (q, k, v))
        seen = None if hidden is None else ~hidden.to(q.device)
        whole = causal and prefix == 0
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, is_causal=whole, enable_gqa=True)[0].transpose(0, 1)
    blocks = []
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        key_stop = prefix + stop if causal else length
        key_start = max(0, prefix + start + 1 - window) if window > 0 else 0
        hidden = hidden_keys(prefix + start, stop - start, key_start, key_stop, causal, window)
        seen_k, seen_v = k[key_start:key_stop], v[key_start:key_stop]
        device_hidden = None if hidden is None else hidden.to(q.device)
        blocks.append(attend(q[start:stop], seen_k, seen_v, scale=scale, cap=cap, sinks=sinks, hidden=device_hidden))
    return torch.cat(blocks)
