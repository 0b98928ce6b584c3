# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per sequence over its paged keys and values."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import FP8, Cost, op
from rocm_infer.ops._paged import attend, check_heads, read_rows


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: B, H, G, D, P, L (tokens of every sequence); pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, page = dims["B"], dims["L"], dims["P"]
    width = -(-length // page)
    cache = (batch * width, page, dims["G"], dims["D"])
    return {
        "q": torch.randn(batch, dims["H"], dims["D"], generator=generator).to(device, dtype),
        "k_cache": torch.randn(cache, generator=generator).to(device, dtype),
        "v_cache": torch.randn(cache, generator=generator).to(device, dtype),
        "page_table": torch.randperm(batch * width, generator=generator).view(batch, width).int().to(device),
        "kv_len": torch.full((batch,), length, dtype=torch.int32, device=device),
        "scale": dims["D"] ** -0.5,
    }


def _cost(dims: dict[str, int], *, itemsize: int = 2, cache_itemsize: int = 2) -> Cost:
    keys = 2 * dims["B"] * dims["L"] * dims["G"] * dims["D"]
    queries = 2 * dims["B"] * dims["H"] * dims["D"]
    return Cost(bytes=keys * cache_itemsize + queries * itemsize, flops=4 * dims["B"] * dims["H"] * dims["L"] * dims["D"])


@op(
    "q[B, H, D]:bf16|f16|f32, k_cache[N, P, G, D]:q|fp8, v_cache[N, P, G, Dv]:k_cache, page_table[B, W]:i32, kv_len[B]:i32, "
    "sinks?[H]:f32 -> o[B, H, Dv]:q",
    inputs=_inputs,
    cost=_cost,
    check=check_heads,
)
def attn_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """o = softmax(s) v with s = scale * q . k, over the kv_len tokens of each sequence; the query is the last of them.

    Query head h reads kv head h // (H / G). Token j of sequence b is row j % P of page page_table[b, j // P].
    window: > 0: only the last `window` tokens are seen. cap: > 0: s becomes cap * tanh(s / cap).
    sinks: one more score per head, with no value. k_scale, v_scale: value = code * scale, for fp8 caches.
    Numerics: scores, softmax and sums in fp32; one rounding at the end. GPU kernels round the weights to the type of q.
    Edges: kv_len 0 gives zeros. Nothing is read beyond kv_len, nor a page that is not in use.
    Errors: ValueError if H is no multiple of G.
    Source: Dao et al. 2022, split over keys as in Flash-Decoding; sinks as in gpt-oss; cap as in Gemma 2.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    if k_cache.dtype in FP8:
        scale = scale * k_scale
    for row, (pages, length) in enumerate(zip(page_table.tolist(), kv_len.tolist())):
        if length == 0:
            continue
        start = max(0, length - window) if window > 0 else 0
        k, v = read_rows(k_cache, pages, start, length), read_rows(v_cache, pages, start, length)
        found = attend(q[row : row + 1], k, v, scale=scale, cap=cap, sinks=sinks)[0]
        out[row] = found * v_scale if v_cache.dtype in FP8 else found
    return out
