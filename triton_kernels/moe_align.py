# SPDX-License-Identifier: Apache-2.0
"""Sort (token, expert) slots by expert, each expert padded to whole blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels.common import options

TILE = tl.constexpr(128)
TILES_ALONE = 2  # that one program takes without another launch
MOST_CHUNKS = 32
PADDING = tl.constexpr(16)


@triton.jit
def owners(ids_ptr, slots, num_slots, num_experts, top_k, ids_stride, ids_column_stride):
    """The expert of each slot; -1 for foreign ones and beyond the last slot."""
    token, column = (slots // top_k).to(tl.int64), slots % top_k
    ids = tl.load(ids_ptr + token * ids_stride + column * ids_column_stride, mask=slots < num_slots, other=-1)
    return tl.where(ids < num_experts, tl.maximum(ids, -1), -1)


@triton.jit
def count(owner, BLOCK_E: tl.constexpr):
    """Slots of each expert."""
    return tl.histogram(tl.maximum(owner, 0), BLOCK_E, mask=owner >= 0)


@triton.jit
def order(owner, BLOCK_E: tl.constexpr):
    """The place of each slot of the tile among all of them, by owner (less than BLOCK_E) and then by slot."""
    key = tl.minimum(owner, BLOCK_E) * TILE + tl.arange(0, TILE)  # the bound shows that the product is narrow
    # Signs, not comparisons: the masks of all pairs do not fit the scalar registers.
    signs = (key[:, None] - key[None, :]).to(tl.uint32, bitcast=True) >> 31
    return tl.sum(signs.to(tl.int32, bitcast=True), 0)


@triton.jit
def count_tiles(ids_ptr, first, last, num_slots, num_experts, top_k, ids_stride, ids_column_stride, BLOCK_E: tl.constexpr):
    """Slots of each expert in some tiles."""
    counts = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(first, last):
        slots = tile * TILE + tl.arange(0, TILE)
        counts += count(owners(ids_ptr, slots, num_slots, num_experts, top_k, ids_stride, ids_column_stride), BLOCK_E)
    return counts


@triton.jit(do_not_specialize=["num_slots", "num_tiles", "num_experts", "top_k"])
def count_kernel(
    counts_ptr,  # [chunks, BLOCK_E] int32
    ids_ptr,  # [T, K] int32
    num_slots,
    num_tiles,
    num_experts,
    top_k,
    ids_stride,
    ids_column_stride,
    BLOCK_E: tl.constexpr,
):
    """Split: one program per chunk of num_tiles tiles of slots.
    Traffic: ids are read once.
    Why: a histogram adds integers, so that the order of its atomics in LDS shows nowhere.
    """
    chunk = tl.program_id(0)
    first = chunk * num_tiles
    counts = count_tiles(
        ids_ptr, first, first + num_tiles, num_slots, num_experts, top_k, ids_stride, ids_column_stride, BLOCK_E
    )
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit
def sum_counts(counts_ptr, chunk, num_chunks, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    """(slots of each expert, those of them in chunks before this one)."""
    total, before = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_chunks, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        counts = tl.load(counts_ptr + rows * BLOCK_E + tl.arange(0, BLOCK_E)[None, :], mask=rows < num_chunks, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(rows < chunk, counts, 0), 0)
    return total, before


@triton.jit
def fill(ptr, first, last, value, step):
    """value from first to last by programs that take a TILE each, `step` places apart."""
    for start in range(first, last, step):
        places = start + tl.arange(0, TILE)
        tl.store(ptr + places, tl.zeros([TILE], tl.int32) + value, mask=places < last)


@triton.jit
def pad(sorted_slots_ptr, ends, lasts, first, step, num_experts, num_slots, SHARE: tl.constexpr):
    """The padding of SHARE experts of every `step`, from the end of their slots to the last place of their last block."""
    for start in range(first, num_experts, step):
        own = start + tl.arange(0, SHARE)
        end, last = tl.gather(ends, own, 0), tl.gather(lasts, own, 0)
        for column in range(0, tl.max(last - end, 0), PADDING):
            places = end[:, None] + column + tl.arange(0, PADDING)[None, :]
            tl.store(sorted_slots_ptr + places, tl.zeros([SHARE, PADDING], tl.int32) + num_slots, mask=places < last[:, None])


@triton.jit(do_not_specialize=["num_slots", "num_tiles", "num_blocks", "block", "num_experts", "top_k"])
def place_kernel(
    sorted_slots_ptr,  # [num_blocks * block] int32
    block_experts_ptr,  # [num_blocks] int32
    num_padded_ptr,  # [1] int32
    counts_ptr,  # [chunks, BLOCK_E] int32
    ids_ptr,  # [T, K] int32
    num_slots,
    num_tiles,
    num_blocks,
    block,
    num_experts,
    top_k,
    ids_stride,
    ids_column_stride,
    ALONE: tl.constexpr,  # the only chunk counts itself
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Split: one program per chunk of slots; each also writes a share of the padding and of what lies beyond the experts' blocks.
    Traffic: ids are read once, the counts by every chunk.
    Why: places follow from counts and from comparing slots pairwise, so that slots ascend within an expert without a serial walk.
    """
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    first_tile, last_tile = chunk * num_tiles, (chunk + 1) * num_tiles
    if ALONE:
        before = tl.zeros([BLOCK_E], tl.int32)
        total = count_tiles(ids_ptr, 0, num_tiles, num_slots, num_experts, top_k, ids_stride, ids_column_stride, BLOCK_E)
    else:
        total, before = sum_counts(counts_ptr, chunk, num_chunks, BLOCK_E, ROWS)
    most = total + block - 1
    padded = most - most % block
    lasts = tl.cumsum(padded, 0)
    starts = lasts - padded
    # Nobody's slots follow, then what is left of the last block and of the output: all of these blocks are nobody's.
    foreign_start = tl.sum(padded, 0)
    foreign_end = foreign_start + num_slots - tl.sum(total, 0)

    next_place = starts + before
    next_foreign = foreign_start + first_tile * TILE - tl.sum(before, 0)
    for tile in range(first_tile, last_tile):
        slots = tile * TILE + tl.arange(0, TILE)
        owner = owners(ids_ptr, slots, num_slots, num_experts, top_k, ids_stride, ids_column_stride)
        counts = count(owner, BLOCK_E)
        num_foreign = TILE - tl.sum(counts, 0)
        # In the order of the tile foreign slots are first, then those of each expert after those of the experts before.
        shift = next_place - num_foreign - (tl.cumsum(counts, 0) - counts)
        places = order(owner, BLOCK_E) + tl.where(owner >= 0, tl.gather(shift, tl.maximum(owner, 0), 0), next_foreign)
        tl.store(sorted_slots_ptr + places, slots, mask=slots < num_slots)
        tl.store(block_experts_ptr + places // block, owner, mask=(owner >= 0) & (places % block == 0))
        next_place += counts
        next_foreign += num_foreign

    pad(sorted_slots_ptr, starts + total, lasts, chunk * SHARE, num_chunks * SHARE, num_experts, num_slots, SHARE)
    fill(sorted_slots_ptr, foreign_end + chunk * TILE, num_blocks * block, num_slots, num_chunks * TILE)
    fill(block_experts_ptr, foreign_start // block + chunk * TILE, num_blocks, -1, num_chunks * TILE)
    if chunk == 0:
        last = foreign_end + block - 1
        tl.store(num_padded_ptr, last - last % block)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: E. A tile has a slot per lane; comparing all with all grows with its square, so that it is two waves, not more."""
    return {"BLOCK_E": experts_block(dims["E"]), **options(arch, num_warps=TILE.value // 64)}


def experts_block(num_experts: int) -> int:
    return max(64, triton.next_power_of_2(num_experts))


def chunks(num_slots: int) -> tuple[int, int]:
    """(chunks, tiles in each). Every chunk reads the counts of all, so that their number is limited."""
    num_tiles = max(1, triton.cdiv(num_slots, TILE.value))
    per_chunk = max(min(num_tiles, TILES_ALONE), triton.cdiv(num_tiles, MOST_CHUNKS))
    return triton.cdiv(num_tiles, per_chunk), per_chunk


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Slots of each expert in each chunk."""
    num_chunks, _ = chunks(call.dims["T"] * call.dims["K"])
    return [((num_chunks, experts_block(call.scalars["num_experts"])), torch.int32)]


def launch(
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded: torch.Tensor,
    counts: torch.Tensor,
    ids: torch.Tensor,
    *,
    num_experts: int,
    block: int,
) -> None:
    num_slots, top_k = ids.numel(), max(ids.shape[1], 1)
    if sorted_slots.numel() >= 1 << 31:
        raise ValueError(f"moe_align: ids: expected less than 2^31 slots with padding, got {sorted_slots.numel()}")
    num_chunks, num_tiles = chunks(num_slots)
    alone = num_chunks == 1
    chosen = config(archs.current(ids.device), {"E": num_experts})
    if not alone:
        count_kernel[(num_chunks,)](counts, ids, num_slots, num_tiles, num_experts, top_k, *ids.stride(), **chosen)
    place_kernel[(num_chunks,)](
        sorted_slots,
        block_experts,
        num_padded,
        counts,
        ids,
        num_slots,
        num_tiles,
        block_experts.shape[0],
        block,
        num_experts,
        top_k,
        *ids.stride(),
        ALONE=alone,
        ROWS=max(1, min(MOST_CHUNKS, 8192 // chosen["BLOCK_E"])),  # counts on their way at once: 64 per lane
        SHARE=chosen["BLOCK_E"] if alone else 32,
        **chosen,
    )
