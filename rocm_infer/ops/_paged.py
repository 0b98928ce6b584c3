# SPDX-License-Identifier: Apache-2.0
"""Rows of a paged cache, and attention of one sequence: what the references of the cache and attention ops share."""

from __future__ import annotations

import torch

from rocm_infer.ops._op import FP8, Call
from rocm_infer.ops.quant_fp8 import LARGEST

QUERY_BLOCK = 128  # queries whose fp32 scores are held at once


def encode(rows: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Values as a cache of `dtype` holds them: rounded once, and for fp8 divided by `scale` and clamped before the cast."""
    if dtype not in FP8:
        return rows.to(dtype)
    return (rows.float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def write_rows(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
    """cache[slot // P, slot % P] = rows[t] for every slot >= 0."""
    page_size = cache.shape[1]
    if bool((slots < 0).any()):
        kept = slots >= 0
        slots, rows = slots[kept], rows[kept]
    page = torch.div(slots, page_size, rounding_mode="floor")
    cache[page, slots - page * page_size] = encode(rows, cache.dtype, scale)


def read_rows(cache: torch.Tensor, pages: list[int], start: int, stop: int) -> torch.Tensor:
    """Tokens start..stop of the sequence that owns `pages`: [stop - start, ...], a view where the pages lie in a row."""
    page_size = cache.shape[1]
    first = start // page_size
    owned = pages[first : -(-stop // page_size)]
    if owned == list(range(owned[0], owned[0] + len(owned))):
        found = cache[owned[0] : owned[0] + len(owned)]
    else:
        found = cache.index_select(0, torch.tensor(owned, device=cache.device))
    return found.flatten(0, 1)[start - first * page_size : stop - first * page_size]


def check_heads(call: Call) -> str | None:
    """Every kv head serves the same number of query heads."""
    num_heads, num_kv_heads = call.dims["H"], call.dims["G"]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        return f"q: expected heads a multiple of the {num_kv_heads} kv heads, got {num_heads}"
    return None


def check_rope(call: Call, *names: str) -> str | None:
    """What the rotary embedding needs comes together or not at all."""
    given = [name in call.dtypes for name in names]
    return f"{', '.join(names)}: expected all or none of them, got some" if any(given) and not all(given) else None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention in fp32: q [T, H, D], k [L, G, D], v [L, G, Dv], hidden [T, L] True where not seen -> [T, H, Dv] fp32.

    Query head h reads kv head h // (H / G). A row that sees nothing gives zeros.
    """
    num_queries, num_heads, _ = q.shape
    kv_len, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    q = q.float().view(num_queries, num_kv_heads, group, -1).permute(1, 2, 0, 3).reshape(num_kv_heads, group * num_queries, -1)
    scores = torch.matmul(q, k.float().permute(1, 2, 0)) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.view(num_kv_heads, group, num_queries, kv_len)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(num_kv_heads, group, 1, 1).expand(-1, -1, num_queries, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :kv_len]
    else:
        weights = scores.softmax(-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden.all(-1)[:, None], 0.0)
    out = torch.matmul(weights.reshape(num_kv_heads, group * num_queries, kv_len), v.float().transpose(0, 1))
    return out.view(num_kv_heads, group, num_queries, -1).permute(2, 0, 1, 3).reshape(num_queries, num_heads, -1)


def hidden_keys(
    query_start: int, num_queries: int, kv_start: int, kv_stop: int, causal: bool, window: int
) -> torch.Tensor | None:
    """[num_queries, kv_stop - kv_start] True where query i must not see key j; None if every query sees every key.

    causal: j <= i. window > 0: i - window < j, the query itself counted.
    """
    first_key_of_last = query_start + num_queries - window
    if (not causal or kv_stop <= query_start + 1) and (window <= 0 or kv_start >= first_key_of_last):
        return None
    query = torch.arange(query_start, query_start + num_queries)[:, None]
    key = torch.arange(kv_start, kv_stop)[None, :]
    hidden = key > query if causal else torch.zeros(num_queries, kv_stop - kv_start, dtype=torch.bool)
    return hidden | (key <= query - window) if window > 0 else hidden


def rotate(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, H, D] with the first R of D rotated by table[positions] (cos(R/2) | sin(R/2)); fp32."""
    half = table.shape[1] // 2
    cos, sin = table[positions][:, None].split(half, -1)
    wide = x.float()
    turned, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
