# SPDX-License-Identifier: Apache-2.0
"""Choice of experts per token, softmax or grouped sigmoid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels.common import options

TAKEN = tl.constexpr(-(2**31))  # below the key of every number, -infinity included


@triton.jit
def order_key(x):
    """fp32 -> int32 that orders alike; NaN as -infinity, -0 as 0."""
    x = tl.where(x == x, x, float("-inf")) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def take_highest(key, place):
    """(place of the highest key of each row, the lowest one if several; keys without it). key, place: [ROWS, N] or [1, N]."""
    top = tl.max(key, 1)
    found = tl.min(tl.where(key == top[:, None], place, 0x7FFFFFFF), 1)
    return found, tl.where(place == found[:, None], TAKEN, key)


@triton.jit(do_not_specialize=["T"])
def moe_route_kernel(
    weights_ptr,  # [T, TOP_K + NUM_SHARED] fp32
    ids_ptr,  # [T, TOP_K + NUM_SHARED] int32
    logits_ptr,  # [T, GROUPS * SIZE]
    bias_ptr,  # [GROUPS * SIZE] fp32, or None
    scale,
    T,
    logits_stride,
    logits_column_stride,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # experts in a group
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Split: one program, of one wave, per ROWS tokens.
    Traffic: logits are read once and stay in registers.
    Why: TOP_K rounds of a maximum over int32 keys. Keys make ties exact and leave room for a mark below -infinity, so that
        an expert is never taken twice, whatever the logits are.
    """
    E: tl.constexpr = GROUPS * SIZE
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, BLOCK_E)
    # Groups are padded to BLOCK_S places each, so that the tile can be cut into groups.
    expert = place // BLOCK_S * SIZE + place % BLOCK_S
    is_expert = (place // BLOCK_S < GROUPS) & (place % BLOCK_S < SIZE)
    logits_ptrs = logits_ptr + rows[:, None] * logits_stride + expert[None, :] * logits_column_stride
    inside = (rows < T)[:, None] & is_expert[None, :]
    logits = tl.load(logits_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        powers = tl.where(is_expert[None, :], tl.exp(logits - tl.max(logits, 1)[:, None]), 0.0)
        scores = powers / tl.sum(powers, 1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = logits
    if HAS_BIAS:
        choice = scores + tl.load(bias_ptr + expert * bias_stride, mask=is_expert, other=0.0)[None, :]
    key = tl.where(is_expert[None, :], order_key(choice), TAKEN)

    if GROUPS > 1:
        number = tl.arange(0, BLOCK_G)
        grouped = tl.reshape(tl.where(is_expert[None, :] & (choice == choice), choice, float("-inf")), (ROWS, BLOCK_G, BLOCK_S))
        value = tl.max(grouped, 2)
        if HAS_BIAS and SIZE > 1:
            member = tl.arange(0, BLOCK_S)[None, None, :]
            best = tl.min(tl.where(grouped == value[:, :, None], member, BLOCK_S), 2)
            value += tl.max(tl.where(member == best[:, :, None], float("-inf"), grouped), 2)
        group_key = tl.where((number < GROUPS)[None, :], order_key(value), TAKEN)
        kept = tl.zeros([ROWS, BLOCK_G], tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            found, group_key = take_highest(group_key, number[None, :])
            kept = tl.where(number[None, :] == found[:, None], 1, kept)
        spread = tl.reshape(tl.broadcast_to(kept[:, :, None], (ROWS, BLOCK_G, BLOCK_S)), (ROWS, BLOCK_E))
        lowest = order_key(tl.full([1, 1], float("-inf"), tl.float32))
        key = tl.where((spread == 1) | (key == TAKEN), key, lowest)

    column = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros([ROWS, BLOCK_K], tl.int32)
    weights = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k in tl.static_range(TOP_K):
        found, key = take_highest(key, place[None, :])
        weight = tl.sum(tl.where(place[None, :] == found[:, None], scores, 0.0), 1)
        ids = tl.where(column == k, (found // BLOCK_S * SIZE + found % BLOCK_S)[:, None], ids)
        weights = tl.where(column == k, weight[:, None], weights)
    if RENORMALISE:
        weights = weights / (tl.sum(weights, 1) + 1e-20)[:, None]
    is_shared = column >= TOP_K
    weights = tl.where(is_shared, 1.0, weights * scale)
    ids = tl.where(is_shared, E + column - TOP_K, ids)
    WIDTH: tl.constexpr = TOP_K + NUM_SHARED
    inside = (rows < T)[:, None] & (column < WIDTH)
    tl.store(weights_ptr + rows[:, None] * WIDTH + column, weights, mask=inside)
    tl.store(ids_ptr + rows[:, None] * WIDTH + column, ids, mask=inside)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: G groups, S experts in each. Few experts: several tokens share the wave, 8 experts per lane."""
    groups, size = triton.next_power_of_2(dims["G"]), triton.next_power_of_2(dims["S"])
    rows = max(1, min(16, 512 // (groups * size)))
    return {"ROWS": rows, "BLOCK_G": groups, "BLOCK_S": size, **options(arch, num_warps=1)}


def launch(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    score: str,
    renormalise: bool,
    scale: float,
    num_shared: int,
) -> None:
    num_tokens, num_experts = logits.shape
    if num_tokens == 0:
        return
    arch = archs.current(logits.device)
    chosen = config(arch, {"G": num_groups, "S": num_experts // num_groups})
    moe_route_kernel[(triton.cdiv(num_tokens, chosen["ROWS"]),)](
        weights,
        ids,
        logits,
        bias,
        float(scale),
        num_tokens,
        *logits.stride(),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        SOFTMAX=score == "softmax",
        RENORMALISE=renormalise,
        GROUPS=num_groups,
        TOP_GROUPS=top_groups,
        SIZE=num_experts // num_groups,
        TOP_K=top_k,
        NUM_SHARED=num_shared,
        BLOCK_K=triton.next_power_of_2(top_k + num_shared),
        **chosen,
    )
