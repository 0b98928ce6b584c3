# SPDX-License-Identifier: Apache-2.0
"""Prefill attention by torch's fused kernel, in blocks of queries that read no key beyond their last one.

Why: the fused kernel takes keys 512 at a time and skips none within, so a prompt of that length is computed whole; in blocks it is
half. Values narrower than keys (latent attention) are padded, because the kernel wants one head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rocm_infer.cpu_kernels.common import gather

QUERY_BLOCK = 64


def run(
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
    num_heads, v_width = q.shape[1], v_cache.shape[3]
    is_fp8 = k_cache.dtype.itemsize == 1
    out = q.new_zeros(q.shape[0], num_heads, v_width)
    bounds = query_start.tolist()
    for row, length in enumerate(kv_len.tolist()):
        first, last = bounds[row], bounds[row + 1]
        if first == last or length == 0:
            continue
        table, prefix = page_table[row : row + 1], length - (last - first)
        k, v = (gather(cache, table, 0, length, q.dtype).transpose(1, 2) for cache in (k_cache, v_cache))
        v = F.pad(v, (0, q.shape[2] - v_width)) if v_width < q.shape[2] else v
        queries = q[first:last].transpose(0, 1)[None]
        for start in range(0, last - first, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, last - first)
            keys = slice(
                max(0, prefix + start + 1 - window) if window > 0 else 0, min(length, prefix + stop) if causal else length
            )
            mask = _mask(prefix + start, stop - start, keys, causal, window)
            block = (queries[:, :, start:stop], k[:, :, keys], v[:, :, keys], mask)
            if cap or sinks is not None:
                found = _attend(*block, scale * k_scale if is_fp8 else scale, cap, sinks)
            else:
                found = _fused(*block, scale * k_scale if is_fp8 else scale)
            found = found[0, :, :, :v_width].transpose(0, 1)
            out[first + start : first + stop] = found * v_scale if is_fp8 else found
    return out


def _mask(query_start: int, num_queries: int, keys: slice, causal: bool, window: int) -> torch.Tensor | None:
    """[num_queries, keys] True where a key is seen: not after its query, nor `window` or more before it. None: all are."""
    query = torch.arange(query_start, query_start + num_queries)[:, None]
    key = torch.arange(keys.start, keys.stop)
    seen = key <= query if causal else None
    if window > 0:
        near = key > query - window
        seen = near if seen is None else seen & near
    return seen


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, scale: float) -> torch.Tensor:
    mask = None if seen is None else torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What the fused kernel has no argument for: scores bent by `cap`, and one more score per head."""
    group = q.shape[1] // k.shape[1]
    scores = (q.float() * scale) @ k.float().repeat_interleave(group, 1).mT
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(-1, -1, q.shape[2], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v.float().repeat_interleave(group, 1)
