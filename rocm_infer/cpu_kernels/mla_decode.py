# SPDX-License-Identifier: Apache-2.0
"""Latent attention of a decode step, sequences of one length at once.

Why: all heads share the keys, so one product per group of sequences does the work, and the rest is few calls.
"""

from __future__ import annotations

import torch

from rocm_infer.cpu_kernels.common import gather, groups, rotate, write


def run(
    q: torch.Tensor,
    kv_new: torch.Tensor | None,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_len: torch.Tensor,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    *,
    scale: float,
    latent: int = 512,
    interleaved: bool = True,
    cap: float = 0.0,
    kv_scale: float = 1.0,
) -> torch.Tensor:
    num_seqs, num_new, num_heads, _ = q.shape
    queries = q.float()
    if kv_new is not None and positions is not None and table is not None:
        wide = torch.cat([q, kv_new[:, :, None]], 2).float()  # the new key turns with the queries
        turned = rotate(wide[..., latent:].flatten(0, 1), table.index_select(0, positions.flatten())[:, None], interleaved)
        wide[..., latent:] = turned.view(*wide.shape[:3], wide.shape[3] - latent)
        slots = _slots(page_table, kv_len, num_new, cache.shape[1])
        write(cache, slots, wide[:, :, num_heads].flatten(0, 1), kv_scale)
        queries = wide[:, :, :num_heads].to(q.dtype).float()
    factor = kv_scale if cache.dtype.itemsize == 1 else 1.0
    out = q.new_zeros(num_seqs, num_new, num_heads, latent)
    for rows_of, length in groups(kv_len.tolist(), cache.shape[2]):
        seen = min(num_new, length)
        keys = gather(cache, page_table[rows_of], 0, length)
        scores = (queries[rows_of, -seen:] * (scale * factor)).flatten(1, 2) @ keys.mT
        if cap:
            scores = cap * torch.tanh(scores / cap)
        if seen > 1:
            late = torch.ones(seen, seen, dtype=torch.bool).triu_(1).repeat_interleave(num_heads, 0)
            scores[..., length - seen :].masked_fill_(late, -torch.inf)
        found = scores.softmax(-1) @ keys[..., :latent]
        out[rows_of, -seen:] = (found * factor).view(-1, seen, num_heads, latent).to(q.dtype)
    return out


def _slots(page_table: torch.Tensor, kv_len: torch.Tensor, num_new: int, page_size: int) -> torch.Tensor:
    """Where the new tokens' rows go, [B * S] i64; -1 for a token before the start of its sequence."""
    token = kv_len.long()[:, None] - num_new + torch.arange(num_new)
    inside = token.clamp(min=0)
    page = torch.div(inside, page_size, rounding_mode="floor")
    slots = page_table.gather(1, page).long() * page_size + inside - page * page_size
    return slots.masked_fill(token < 0, -1).flatten()
