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


@triton.jit
def buckets(ids_ptr, slots, num_slots, num_experts, top_k, ids_stride, ids_column_stride):
    """The expert of each slot; num_experts for foreign ones, -1 beyond the last slot."""
    token, column = (slots // top_k).to(tl.int64), slots % top_k
    ids = tl.load(ids_ptr + token * ids_stride + column * ids_column_stride, mask=slots < num_slots, other=-1)
    found = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    return tl.where(slots < num_slots, found, -1)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "top_k"])
def count_kernel(
    counts_ptr,  # [num_experts + 1] int32
    ids_ptr,  # [T, K] int32
    num_slots,
    num_experts,
    top_k,
    ids_stride,
    ids_column_stride,
    TILE: tl.constexpr,
):
    """Split: one program per expert counts its slots; the last one counts those that nobody owns.
    Traffic: each reads all ids, from the L2 cache.
    Why: no atomics and nothing shared, so nothing to clear before and no order to depend on.
    """
    expert = tl.program_id(0)
    total = tl.zeros([TILE], tl.int32)
    for start in range(0, num_slots, TILE):
        slots = start + tl.arange(0, TILE)
        found = buckets(ids_ptr, slots, num_slots, num_experts, top_k, ids_stride, ids_column_stride)
        total += (found == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "block", "num_experts", "top_k"])
def place_kernel(
    sorted_slots_ptr,  # [num_blocks * block] int32
    block_experts_ptr,  # [num_blocks] int32
    num_padded_ptr,  # [1] int32
    counts_ptr,  # [num_experts + 1] int32
    ids_ptr,  # [T, K] int32
    num_slots,
    num_blocks,
    block,
    num_experts,
    top_k,
    ids_stride,
    ids_column_stride,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Split: one program per expert writes its slots, its padding and its entries of block_experts; the last one also the tail.
    Traffic: each reads the counts and all ids, from the L2 cache.
    Why: walking the slots in order makes them ascend within an expert.
    """
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts <= num_experts, other=0)
    blocks = (counts + block - 1) // block
    first_block = tl.sum(tl.where(experts < expert, blocks, 0), 0).to(tl.int64)
    own_blocks = tl.sum(tl.where(experts == expert, blocks, 0), 0)
    position = first_block * block
    lane = tl.arange(0, TILE)
    for start in range(0, num_slots, TILE):
        slots = start + lane
        mine = buckets(ids_ptr, slots, num_slots, num_experts, top_k, ids_stride, ids_column_stride) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(sorted_slots_ptr + position + rank - 1, slots, mask=mine)
        position += tl.max(rank, 0)
    is_last = expert == num_experts
    last_block = tl.where(is_last, num_blocks, first_block + own_blocks)
    for start in range(position, last_block * block, TILE):
        slots = start + lane
        tl.store(sorted_slots_ptr + slots, tl.full([TILE], 0, tl.int32) + num_slots, mask=slots < last_block * block)
    for start in range(first_block, last_block, TILE):
        owned = start + lane
        owner = tl.where(is_last, -1, expert)
        tl.store(block_experts_ptr + owned, tl.full([TILE], 0, tl.int32) + owner, mask=owned < last_block)
    if is_last:
        tl.store(num_padded_ptr, (first_block + own_blocks) * block)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: S slots. A decode step's slots fit one tile; a prefill's are walked 1024 at a time, 4 per lane of 4 waves."""
    tile = min(1024, max(64, triton.next_power_of_2(dims["S"])))
    return {"TILE": tile, **options(arch, num_warps=4 if tile == 1024 else 1)}


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((call.scalars["num_experts"] + 1,), torch.int32)]


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
    arch = archs.current(ids.device)
    chosen = config(arch, {"S": num_slots})
    grid = (num_experts + 1,)
    count_kernel[grid](counts, ids, num_slots, num_experts, top_k, *ids.stride(), **chosen)
    place_kernel[grid](
        sorted_slots,
        block_experts,
        num_padded,
        counts,
        ids,
        num_slots,
        block_experts.shape[0],
        block,
        num_experts,
        top_k,
        *ids.stride(),
        BLOCK_E=triton.next_power_of_2(num_experts + 1),
        **chosen,
    )
