# SPDX-License-Identifier: Apache-2.0
"""Paged write of latent rows with fused rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import (
    as_bytes,
    check_rows,
    fp8_bias,
    load_angles,
    load_pairs,
    rope_constants,
    store_pairs,
    to_cache,
    turn,
)
from rocm_infer.triton_kernels.common import options


@triton.jit(do_not_specialize=["H"])
def store_mla_kernel(
    c_ptr,  # [T, L]
    k_pe_ptr,  # [T, R]
    cache_ptr,  # [N, P, L + R]
    slots_ptr,  # [T] int64
    q_pe_ptr,  # [T, H, R]
    positions_ptr,  # [T] int64
    table_ptr,  # [M, R] fp32
    kv_scale,
    c_token_stride,
    k_pe_token_stride,
    cache_page_stride,
    cache_token_stride,
    q_pe_token_stride,
    q_pe_head_stride,
    table_stride,
    H,
    L: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    HALF: tl.constexpr,  # pairs that turn; 0: no rotary embedding
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Split: one program per token for the cache row, more for tiles of the heads of q_pe.
    Traffic: the row and q_pe are read and written once; nothing is staged.
    Needs: contiguous rows.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part == 0:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            row_ptr = cache_ptr + (slot // P) * cache_page_stride + (slot % P) * cache_token_stride
            columns = tl.arange(0, BLOCK_L)
            c = tl.load(c_ptr + token * c_token_stride + columns, mask=columns < L, other=0.0)
            tl.store(row_ptr + columns, to_cache(c, kv_scale, FP8_BIAS), mask=columns < L)
            key_ptr = k_pe_ptr + token * k_pe_token_stride
            if HALF:
                cos, sin = load_angles(table_ptr, tl.load(positions_ptr + token), table_stride, HALF, BLOCK_HALF)
                one = tl.arange(0, 1)[:, None]
                a, b = load_pairs(key_ptr + one, 1, one == 0, HALF, BLOCK_HALF, INTERLEAVED)
                a, b = turn(a, b, cos[None, :], sin[None, :])
                a, b = to_cache(a, kv_scale, FP8_BIAS), to_cache(b, kv_scale, FP8_BIAS)
                store_pairs(row_ptr + L + one, a, b, 1, one == 0, HALF, BLOCK_HALF, INTERLEAVED)
            else:
                columns = tl.arange(0, BLOCK_R)
                key = tl.load(key_ptr + columns, mask=columns < R, other=0.0)
                tl.store(row_ptr + L + columns, to_cache(key, kv_scale, FP8_BIAS), mask=columns < R)
    elif HALF:
        heads = ((part - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        cos, sin = load_angles(table_ptr, tl.load(positions_ptr + token), table_stride, HALF, BLOCK_HALF)
        heads_ptr = q_pe_ptr + token * q_pe_token_stride + heads * q_pe_head_stride
        a, b = load_pairs(heads_ptr, 1, heads < H, HALF, BLOCK_HALF, INTERLEAVED)
        a, b = turn(a, b, cos[None, :], sin[None, :])
        store_pairs(heads_ptr, a, b, 1, heads < H, HALF, BLOCK_HALF, INTERLEAVED)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """One wave: a row of 512 is 16 bytes per lane, 16 heads of 64 twice that; 16 bytes per lane also where halves turn."""
    heads = triton.next_power_of_2(max(dims["H"], 1))
    return {"BLOCK_HEADS": max(1, min(heads, 1024 // triton.next_power_of_2(dims["R"]))), **options(arch, num_warps=1)}


def launch(
    c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    q_pe: torch.Tensor | None,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    interleaved: bool,
    kv_scale: float,
) -> None:
    check_rows("store_mla", c=c, k_pe=k_pe, cache=cache, slots=slots, q_pe=q_pe, positions=positions, table=table)
    (num_tokens, latent), width = c.shape, k_pe.shape[1]
    num_heads = 0 if q_pe is None else q_pe.shape[1]
    chosen = config(archs.current(slots.device), {"H": num_heads, "L": latent, "R": width})
    if num_tokens == 0:
        return
    store_mla_kernel[(num_tokens, 1 + triton.cdiv(num_heads, chosen["BLOCK_HEADS"]))](
        c,
        k_pe,
        as_bytes(cache),
        slots,
        q_pe,
        positions,
        table,
        float(kv_scale),
        c.stride(0),
        k_pe.stride(0),
        *cache.stride()[:2],
        *(q_pe.stride()[:2] if q_pe is not None else (0, 0)),
        table.stride(0) if table is not None else 0,
        num_heads,
        L=latent,
        R=width,
        P=cache.shape[1],
        FP8_BIAS=fp8_bias(cache),
        BLOCK_L=triton.next_power_of_2(latent),
        BLOCK_R=triton.next_power_of_2(width),
        **rope_constants(table, interleaved),
        **chosen,
    )
