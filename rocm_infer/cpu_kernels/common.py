# SPDX-License-Identifier: Apache-2.0
"""What the CPU forms of the cache and decode ops share: rows of a paged cache, the rotary embedding, sequences of one length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
# fp32 values of one cache that a group may hold: keys and values together then fit a core's second-level cache.
GROUP_VALUES = 1 << 17


def groups(lens: list[int], width: int) -> Iterator[tuple[slice | list[int], int]]:
    """(rows, length) of sequences of equal length, in groups that fit the cache; width: values per token.

    Only equal lengths go together: nothing is padded, and a sequence is computed alike whatever is batched with it.
    Those of length 0 are left out.
    """
    same: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lens):
        if length > 0:
            same[length].append(row)
    for length, members in same.items():
        size = max(1, GROUP_VALUES // (length * width))
        for start in range(0, len(members), size):
            rows = members[start : start + size]
            adjacent = rows[-1] - rows[0] == len(rows) - 1
            yield slice(rows[0], rows[-1] + 1) if adjacent else rows, length


def gather(
    cache: torch.Tensor, page_table: torch.Tensor, start: int, stop: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Tokens start .. stop of each row of page_table [b, W], from a cache [N, P, ...]: [b, stop - start, ...] in `dtype`."""
    page_size = cache.shape[1]
    first = start // page_size
    pages = page_table[:, first : -(-stop // page_size)].reshape(-1)
    found = cache.index_select(0, pages).to(dtype).view(page_table.shape[0], -1, *cache.shape[2:])
    return found[:, start - first * page_size : stop - first * page_size]


def rotate(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, H, D] turned by angles [T, 1, R] (cos | sin), fp32; elements from R on are copied."""
    width = angles.shape[2]
    cos, sin = angles[..., : width // 2], angles[..., width // 2 :]
    wide = x.float()
    out = torch.empty(x.shape)
    if interleaved:
        a, b, turned_a, turned_b = wide[..., :width:2], wide[..., 1:width:2], out[..., :width:2], out[..., 1:width:2]
    else:
        half = width // 2
        a, b, turned_a, turned_b = wide[..., :half], wide[..., half:width], out[..., :half], out[..., half:width]
    torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=turned_b).addcmul_(a, sin)
    if width < x.shape[2]:
        out[..., width:] = wide[..., width:]
    return out


def write(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
    """cache[slot // P, slot % P] = rows[t] for every slot >= 0, rounded to the type of the cache."""
    if bool((slots < 0).any()):
        kept = slots >= 0
        slots, rows = slots[kept], rows[kept]
    if cache.dtype in LARGEST:
        largest = LARGEST[cache.dtype]
        rows = (rows.float() / scale).clamp(-largest, largest)
    if cache.is_contiguous():
        cache.view(-1, *cache.shape[2:])[slots] = rows.to(cache.dtype)
    else:
        page = torch.div(slots, cache.shape[1], rounding_mode="floor")
        cache[page, slots - page * cache.shape[1]] = rows.to(cache.dtype)
