# SPDX-License-Identifier: Apache-2.0
"""Hostile paged caches, and float64 formulas that know nothing of pages, for the tests of the cache and attention ops."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis
import pytest
import torch

from tests import strategies as data
from tests.close import EPS32, HALF_ULP

# For laws that take several calls per example, or that another test's examples cover too.
few = hypothesis.settings(max_examples=max(2, hypothesis.settings().max_examples // 5))
FP8_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
both_dialects = pytest.mark.parametrize("fp8", list(FP8_LARGEST), ids=["e4m3fn", "e4m3fnuz"])


def angle_table(length: int, width: int, seed: int) -> torch.Tensor:
    """Random angles as a rope table [length, width] fp32: cos(width/2) | sin(width/2)."""
    angle = torch.rand(length, width // 2, generator=torch.Generator().manual_seed(seed)).double() * 6.28
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def rotated(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The rotary embedding of [T, H, D] as complex numbers in float64."""
    half = table.shape[1] // 2
    turn = torch.complex(table[positions, :half].double(), table[positions, half:].double())[:, None]
    x = x.double().clone()
    index = torch.arange(2 * half)
    real, imaginary = (index[::2], index[1::2]) if interleaved else (index[:half], index[half:])
    pairs = torch.complex(x[..., real], x[..., imaginary]) * turn
    x[..., real], x[..., imaginary] = pairs.real, pairs.imag
    return x


def as_stored(rows: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """float64 values an fp8 or wider cache stands for before rounding: clamped to what it can hold."""
    if dtype not in FP8_LARGEST:
        return rows.double()
    return (rows.double() / scale).clamp(-FP8_LARGEST[dtype], FP8_LARGEST[dtype])


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, for comparisons in which NaN equals NaN."""
    return x.contiguous().cpu().view(torch.uint8)


def filled(shape: tuple[int, ...], dtype: torch.dtype, value: float = float("nan")) -> torch.Tensor:
    return torch.full(shape, value).to(dtype)


@dataclass
class Paged:
    """Keys and values of a few sequences, each in pages of a cache that is NaN everywhere else."""

    k: list[torch.Tensor]  # per sequence [L, G, D], as the cache holds them
    v: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    kv_len: torch.Tensor


def paged(
    kv_lens: list[int], page_size: int, heads: int, dim: int, v_dim: int, dtype: torch.dtype, seed: int, *, gap: bool = False
) -> Paged:
    """gap: the caches are views into a cache with a layer dimension between page and token."""
    table, num_pages = data.scattered_pages(kv_lens, page_size, seed)

    def cache(width: int) -> torch.Tensor:
        shape = (num_pages, 2, page_size, heads, width)
        return filled(shape, dtype)[:, 1] if gap else filled((num_pages, page_size, heads, width), dtype)

    made = Paged([], [], cache(dim), cache(v_dim), table, torch.tensor(kv_lens, dtype=torch.int32))
    for row, length in enumerate(kv_lens):
        slots = data.slots_of(table, row, length, page_size)
        for rows, store, width, number in ((made.k, made.k_cache, dim, 1), (made.v, made.v_cache, v_dim, 2)):
            rows.append(data.normal((length, heads, width), seed + 10 * row + number, torch.float32).to(dtype))
            store[slots // page_size, slots % page_size] = rows[-1]
    return made


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start: int,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    weight_type: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, Dv] float64, bound on the noise of an fp32 computation) of q [T, H, D] at query_start.. over k, v [L, G, ...].

    Noise: an fp32 score of D terms is off by D * EPS32 * sum(|terms|), its weight relatively by as much; weights may be
    rounded to `weight_type` before they meet the values.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,lhd->htl", q, k) * scale
    size = torch.einsum("thd,lhd->htl", q.abs(), k.abs()) * abs(scale)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    row, key = query_start + torch.arange(q.shape[0])[:, None], torch.arange(k.shape[0])[None, :]
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if causal:
        seen &= key <= row
    if window:
        seen &= key > row - window
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True) if k.shape[0] else torch.full((*scores.shape[:2], 1), -torch.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks.double()[:, None, None])
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight = (scores - top).exp()
    total = weight.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.double()[:, None, None] - top).exp()
    weight = weight / total.masked_fill(total == 0, 1.0)
    spread = weight * (
        2 * HALF_ULP[weight_type] + 2 * EPS32 * (q.shape[-1] + k.shape[0] + 16) * (size + 1 + scores.abs().nan_to_num(0, 0, 0))
    )
    noise = torch.einsum("htl,lhd->thd", spread, v.abs())
    return torch.einsum("htl,lhd->thd", weight, v), noise
