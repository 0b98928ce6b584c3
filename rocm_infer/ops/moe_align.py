# SPDX-License-Identifier: Apache-2.0
"""Sort (token, expert) slots by expert, each expert padded to whole blocks: what a grouped GEMM walks over."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Call, Cost, op


def _inputs(dims: dict[str, int], *, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """dims: T, E, K, block. Each token goes to K different experts."""
    order = torch.rand(dims["T"], dims["E"], generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return {"ids": order[:, : dims["K"]].int().to(device), "num_experts": dims["E"], "block": dims["block"]}


def _cost(dims: dict[str, int]) -> Cost:
    slots = dims["T"] * dims["K"]
    capacity = slots + min(slots, dims["E"] + 1) * (dims["block"] - 1)
    return Cost(bytes=4 * (slots + capacity + capacity // dims["block"] + 1), flops=0)


def capacity(num_slots: int, num_experts: int, block: int) -> int:
    """Blocks that suffice for any choice of experts: a bucket that has slots pads at most block - 1."""
    return (num_slots + min(num_slots, num_experts + 1) * (block - 1)) // block


_BLOCKS = "(T*K + (T*K if T*K < num_experts + 1 else num_experts + 1)*(block - 1)) // block"


def _check(call: Call) -> str | None:
    block, num_experts = call.scalars["block"], call.scalars["num_experts"]
    if block < 1 or num_experts < 1:
        return f"block, num_experts: expected positive numbers, got {block}, {num_experts}"
    return None


@op(
    f"ids[T, K]:i32 -> sorted_slots[{_BLOCKS}*block]:i32, block_experts[{_BLOCKS}]:i32, num_padded[1]:i32",
    inputs=_inputs,
    cost=_cost,
    check=_check,
)
def moe_align(ids: torch.Tensor, *, num_experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sorted_slots = slots by expert, ascending within each; block_experts = the expert of each `block` of them.

    Slot s is element s of `ids` read row by row, so it belongs to token s // K. Every expert that has slots starts at a new
    block; the rest of its last block holds T*K, which names no slot. num_padded is the length used; beyond it lie blocks of
    T*K with expert -1.
    ids: a number outside [0, num_experts) belongs to nobody here (another rank's expert, a padded row). Such slots come last,
        in blocks with expert -1, for which `moe_gemm` writes zeros.
    Edges: T = 0 gives empty blocks and num_padded 0. The sizes of the outputs depend on sizes alone, never on values.
    Errors: ValueError unless block > 0 and num_experts > 0.
    """
    flat = ids.flatten().long()
    num_slots = flat.numel()
    num_blocks = capacity(num_slots, num_experts, block)
    bucket = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = bucket.new_zeros(num_experts + 1).index_add_(0, bucket, torch.ones_like(bucket))
    blocks = (counts + block - 1) // block
    last_block = blocks.cumsum(0)
    block_experts = torch.searchsorted(last_block, torch.arange(num_blocks, device=ids.device), right=True)
    order = bucket.argsort(stable=True)
    owner = bucket[order]
    rank = torch.arange(num_slots, device=ids.device) - torch.searchsorted(owner, owner)
    sorted_slots = torch.full((num_blocks * block,), num_slots, dtype=torch.int32, device=ids.device)
    sorted_slots[(last_block - blocks)[owner] * block + rank] = order.int()
    block_experts = block_experts.masked_fill(block_experts >= num_experts, -1).int()
    return sorted_slots, block_experts, (last_block[-1:] * block).int()
