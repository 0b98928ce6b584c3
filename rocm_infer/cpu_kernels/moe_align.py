# SPDX-License-Identifier: Apache-2.0
"""Slots by expert in numpy.

Why: a decode step sorts a handful of numbers, and a numpy call costs a fraction of a torch call.
"""

from __future__ import annotations

import numpy as np
import torch


def run(ids: torch.Tensor, *, num_experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = ids.contiguous().numpy().reshape(-1)
    num_slots = flat.size
    num_blocks = (num_slots + min(num_slots, num_experts + 1) * (block - 1)) // block
    bucket = np.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = np.bincount(bucket, minlength=num_experts + 1)
    blocks = -(-counts // block)
    order = np.argsort(bucket, kind="stable")
    padding = (np.cumsum(blocks) - blocks) * block - (np.cumsum(counts) - counts)  # before each expert's first slot
    sorted_slots = np.full(num_blocks * block, num_slots, dtype=np.int32)
    sorted_slots[np.arange(num_slots) + padding[bucket[order]]] = order
    block_experts = np.full(num_blocks, -1, dtype=np.int32)
    block_experts[: blocks[:-1].sum()] = np.repeat(np.arange(num_experts, dtype=np.int32), blocks[:-1])
    num_padded = np.array([blocks.sum() * block], dtype=np.int32)
    return torch.from_numpy(sorted_slots), torch.from_numpy(block_experts), torch.from_numpy(num_padded)
