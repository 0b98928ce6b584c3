# SPDX-License-Identifier: Apache-2.0
"""Paged write of keys and values with fused rotary embedding."""

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


@triton.jit(do_not_specialize=["G", "H"])
def store_kv_kernel(
    k_ptr,  # [T, G, D]
    v_ptr,  # [T, G, DV]
    k_cache_ptr,  # [N, P, G, D]
    v_cache_ptr,  # [N, P, G, DV]
    slots_ptr,  # [T] int64
    q_ptr,  # [T, H, D]
    positions_ptr,  # [T] int64
    table_ptr,  # [L, 2 * HALF] fp32
    k_scale,
    v_scale,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    k_cache_page_stride,
    k_cache_token_stride,
    k_cache_head_stride,
    v_cache_page_stride,
    v_cache_token_stride,
    v_cache_head_stride,
    q_token_stride,
    q_head_stride,
    table_stride,
    G,
    H,
    D: tl.constexpr,
    DV: tl.constexpr,
    P: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    HALF: tl.constexpr,  # pairs that turn; 0: no rotary embedding
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Split: one program per token and tile of heads; the tiles of k first, then of v, then of q.
    Traffic: each row of k, v and q is read and written once; nothing is staged.
    Needs: contiguous rows.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_kv_tiles = tl.cdiv(G, BLOCK_HEADS)
    slot = tl.load(slots_ptr + token)
    page, offset = slot // P, slot % P
    heads = (part % num_kv_tiles) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    heads = heads.to(tl.int64)[:, None]
    if part < num_kv_tiles:
        if slot >= 0:
            source_ptr = k_ptr + token * k_token_stride + heads * k_head_stride
            target_ptr = k_cache_ptr + page * k_cache_page_stride + offset * k_cache_token_stride + heads * k_cache_head_stride
            if HALF:
                cos, sin = load_angles(table_ptr, tl.load(positions_ptr + token), table_stride, HALF, BLOCK_HALF)
                a, b = load_pairs(source_ptr, 1, heads < G, HALF, BLOCK_HALF, INTERLEAVED)
                a, b = turn(a, b, cos[None, :], sin[None, :])
                a, b = to_cache(a, k_scale, FP8_BIAS), to_cache(b, k_scale, FP8_BIAS)
                store_pairs(target_ptr, a, b, 1, heads < G, HALF, BLOCK_HALF, INTERLEAVED)
            if 2 * HALF < D:
                columns = tl.arange(0, BLOCK_D)[None, :]
                rest = (heads < G) & (columns >= 2 * HALF) & (columns < D)
                x = tl.load(source_ptr + columns, mask=rest, other=0.0)
                tl.store(target_ptr + columns, to_cache(x, k_scale, FP8_BIAS), mask=rest)
    elif part < 2 * num_kv_tiles:
        if slot >= 0:
            columns = tl.arange(0, BLOCK_DV)[None, :]
            inside = (heads < G) & (columns < DV)
            x = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + columns, mask=inside, other=0.0)
            target_ptr = v_cache_ptr + page * v_cache_page_stride + offset * v_cache_token_stride + heads * v_cache_head_stride
            tl.store(target_ptr + columns, to_cache(x, v_scale, FP8_BIAS), mask=inside)
    elif HALF:
        heads = (part - 2 * num_kv_tiles) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        heads = heads.to(tl.int64)[:, None]
        cos, sin = load_angles(table_ptr, tl.load(positions_ptr + token), table_stride, HALF, BLOCK_HALF)
        rows_ptr = q_ptr + token * q_token_stride + heads * q_head_stride
        a, b = load_pairs(rows_ptr, 1, heads < H, HALF, BLOCK_HALF, INTERLEAVED)
        a, b = turn(a, b, cos[None, :], sin[None, :])
        store_pairs(rows_ptr, a, b, 1, heads < H, HALF, BLOCK_HALF, INTERLEAVED)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """A tile of about 1024 elements, one wave: 16 bytes per lane and half; small enough to spread a few tokens widely."""
    width = triton.next_power_of_2(max(dims["D"], dims["Dv"]))
    heads = triton.next_power_of_2(max(dims["G"], dims["H"]))
    return {"BLOCK_HEADS": max(1, min(heads, 1024 // width)), **options(arch, num_warps=1)}


def launch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    interleaved: bool,
    k_scale: float,
    v_scale: float,
) -> None:
    check_rows("store_kv", k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots, q=q, positions=positions, table=table)
    num_tokens, num_kv_heads, size = k.shape
    num_heads = 0 if q is None else q.shape[1]
    dims = {"G": num_kv_heads, "H": num_heads, "D": size, "Dv": v.shape[2]}
    chosen = config(archs.current(slots.device), dims)
    if num_tokens == 0:
        return
    block = chosen["BLOCK_HEADS"]
    grid = (num_tokens, 2 * triton.cdiv(num_kv_heads, block) + triton.cdiv(num_heads, block))
    store_kv_kernel[grid](
        k,
        v,
        as_bytes(k_cache),
        as_bytes(v_cache),
        slots,
        q,
        positions,
        table,
        float(k_scale),
        float(v_scale),
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *(q.stride()[:2] if q is not None else (0, 0)),
        table.stride(0) if table is not None else 0,
        num_kv_heads,
        num_heads,
        D=size,
        DV=v.shape[2],
        P=k_cache.shape[1],
        FP8_BIAS=fp8_bias(k_cache),
        BLOCK_D=triton.next_power_of_2(size),
        BLOCK_DV=triton.next_power_of_2(v.shape[2]),
        **rope_constants(table, interleaved),
        **chosen,
    )
