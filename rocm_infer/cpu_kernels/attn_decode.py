# SPDX-License-Identifier: Apache-2.0
"""Decode attention by torch's fused kernel, the heads of a group as its queries, in fp32.

Why: the reference makes twice the calls, and a decode step on a CPU is made of calls. fp32 keys and values, because the fused
kernel is three times slower on bf16 when a head has one query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rocm_infer.cpu_kernels.common import gather, groups


def run(
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
    (num_seqs, num_heads, width), (num_kv_heads, v_width) = q.shape, v_cache.shape[2:]
    is_fp8 = k_cache.dtype.itemsize == 1
    factor = scale * k_scale if is_fp8 else scale
    grouped = q.float().view(num_seqs, num_kv_heads, num_heads // num_kv_heads, width)
    out = q.new_zeros((*grouped.shape[:3], v_width))
    for rows, length in groups(kv_len.tolist(), num_kv_heads * max(width, v_width)):
        start = max(0, length - window) if window > 0 else 0
        table = page_table[rows]
        k, v = (gather(cache, table, start, length).transpose(1, 2) for cache in (k_cache, v_cache))
        if cap or sinks is not None:
            found = _attend(grouped[rows] * factor, k, v, cap, sinks)
        else:
            found = F.scaled_dot_product_attention(grouped[rows], k, v, scale=factor)
        out[rows] = (found * v_scale if is_fp8 else found).to(q.dtype)
    return out.view(num_seqs, num_heads, v_width)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cap: float, sinks: torch.Tensor | None) -> torch.Tensor:
    """What the fused attention has no argument for: scores bent by `cap`, and one more score per head."""
    scores = q @ k.mT
    scores = cap * torch.tanh(scores / cap) if cap else scores
    if sinks is not None:
        sink = sinks.view(1, *q.shape[1:3], 1).expand(len(q), -1, -1, -1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v
