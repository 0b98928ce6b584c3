# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies and hostile data shared by the op tests."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

POISON_INDEX = 2147480000  # an index that no table may legally hold where a kernel is allowed to read

few = settings(max_examples=max(4, settings().max_examples // 4))  # for laws that one shape proves as well as another
seeds = st.integers(0, 2**31 - 1)
num_tokens = st.sampled_from([0, 1, 2, 3, 7, 17, 33, 64])
widths = st.sampled_from([1, 2, 16, 63, 64, 65, 127, 128, 129, 257, 512, 1000])
float_types = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
fp8_types = st.sampled_from([torch.float8_e4m3fn, torch.float8_e4m3fnuz])
page_sizes = st.sampled_from([1, 4, 16, 64])


def ragged_lens(max_num: int = 5, max_len: int = 80, min_len: int = 0) -> st.SearchStrategy[list[int]]:
    """Lengths of a few sequences, borders of pages and blocks included."""
    border = st.sampled_from([n for n in (0, 1, 15, 16, 17, 63, 64, 65) if min_len <= n <= max_len])
    return st.lists(st.one_of(border, st.integers(min_len, max_len)), min_size=1, max_size=max_num)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal values rounded to `dtype` before anybody sees them."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def strided(x: torch.Tensor, gap: int = 3, device: str = "cpu") -> torch.Tensor:
    """The same values as a view whose rows lie `gap` elements apart, NaN in between; made on the device, for a move closes gaps."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan")).to(device, x.dtype) if x.is_floating_point() else None
    assert wide is not None, "strided: expected a floating type"
    view = wide[..., : x.shape[-1]]
    view.copy_(x)
    return view


def scattered_pages(kv_lens: list[int], page_size: int, seed: int, spare: int = 3) -> tuple[torch.Tensor, int]:
    """(page_table [B, W] int32, num_pages): pages in random order, unused entries poisoned, some pages owned by nobody."""
    needed = [-(-length // page_size) for length in kv_lens]
    num_pages = sum(needed) + spare
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(kv_lens), max([*needed, 1])), POISON_INDEX, dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor(order[:count], dtype=torch.int32)
        order = order[count:]
    return table, num_pages


def slots_of(table: torch.Tensor, row: int, length: int, page_size: int) -> torch.Tensor:
    """Slot ids [length] int64 of one sequence's tokens."""
    position = torch.arange(length)
    return table[row, position // page_size].long() * page_size + position % page_size
