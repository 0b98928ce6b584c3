# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of queries and keys, in place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import load_angles, load_pairs, rope_constants, store_pairs, turn
from rocm_infer.triton_kernels.common import options


@triton.jit
def rotate_heads(
    row_ptr,
    heads,
    num_heads,
    head_stride,
    column_stride,
    cos,
    sin,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn the pairs of some heads of one token where they lie."""
    is_head = (heads < num_heads)[:, None]
    heads_ptr = row_ptr + heads.to(tl.int64)[:, None] * head_stride
    a, b = load_pairs(heads_ptr, column_stride, is_head, HALF, BLOCK_HALF, INTERLEAVED)
    new_a, new_b = turn(a, b, cos[None, :], sin[None, :])
    store_pairs(heads_ptr, new_a.to(a.dtype), new_b.to(b.dtype), column_stride, is_head, HALF, BLOCK_HALF, INTERLEAVED)


@triton.jit
def rope_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, G, D]
    positions_ptr,  # [T] int64
    table_ptr,  # [L, 2 * HALF] fp32
    H,
    G,
    q_stride,
    q_head_stride,
    q_column_stride,
    k_stride,
    k_head_stride,
    k_column_stride,
    positions_stride,
    table_stride,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Split: one program per token and HEADS heads, first those of q, then those of k.
    Traffic: what turns is read once and written once.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_parts = tl.cdiv(H, HEADS)
    position = tl.load(positions_ptr + token * positions_stride)
    cos, sin = load_angles(table_ptr, position, table_stride, HALF, BLOCK_HALF)
    if part < q_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        row_ptr = q_ptr + token * q_stride
        rotate_heads(row_ptr, heads, H, q_head_stride, q_column_stride, cos, sin, HALF, BLOCK_HALF, INTERLEAVED)
    else:
        heads = (part - q_parts) * HEADS + tl.arange(0, HEADS)
        row_ptr = k_ptr + token * k_stride
        rotate_heads(row_ptr, heads, G, k_head_stride, k_column_stride, cos, sin, HALF, BLOCK_HALF, INTERLEAVED)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: H, R. A tile of 512 pairs is 16 bytes per lane and half for one wave; more heads than there are would idle."""
    half = triton.next_power_of_2(max(dims["R"] // 2, 1))
    return {"HEADS": max(1, min(512 // half, triton.next_power_of_2(max(dims["H"], 1)))), **options(arch, num_warps=1)}


def launch(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, *, interleaved: bool) -> None:
    num_tokens, num_heads, _ = q.shape
    num_kv_heads = k.shape[1]
    if num_tokens == 0 or table.shape[1] == 0:
        return
    if table.stride(1) != 1:
        raise ValueError(f"rope: table: expected contiguous rows, got strides {table.stride()}; use .contiguous()")
    arch = archs.current(q.device)
    chosen = config(arch, {"H": max(num_heads, num_kv_heads), "R": table.shape[1]})
    parts = triton.cdiv(num_heads, chosen["HEADS"]) + triton.cdiv(num_kv_heads, chosen["HEADS"])
    rope_kernel[(num_tokens, parts)](
        q,
        k,
        positions,
        table,
        num_heads,
        num_kv_heads,
        *q.stride(),
        *k.stride(),
        positions.stride(0),
        table.stride(0),
        **rope_constants(table, interleaved),
        **chosen,
    )
