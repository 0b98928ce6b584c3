# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per sequence over paged keys and values, split over the tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._attention import (
    is_rdna,
    kv_splits,
    load_parts,
    merge,
    num_splits,
    online_softmax,
    operand_args,
    rounded,
)
from rocm_infer.triton_kernels._paged import as_bytes, check_rows, dot, from_cache, parts, run_offsets
from rocm_infer.triton_kernels.common import options


@triton.jit
def sum_runs(x):
    """x [RUNS, M, C] summed over its runs, in pairs: [M, C]. Each wave hands its own over once."""
    RUNS: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    C: tl.constexpr = x.shape[2]
    x = tl.permute(x, (1, 2, 0))
    if RUNS >= 8:
        even, odd = tl.split(tl.reshape(x, (M, C, 4, 2)))
        x = even + odd
    if RUNS >= 4:
        even, odd = tl.split(tl.reshape(x, (M, C, 2, 2)))
        x = even + odd
    even, odd = tl.split(x)
    return even + odd


@triton.jit
def store_runs(row_ptr, is_row, first_column, x, scale, WIDTH: tl.constexpr):
    """Write x [RUNS, M, C], summed over its runs and times scale [M], to columns first_column .. of rows row_ptr [M].

    One half of the columns after the other: it is LDS for one that both need.
    """
    RUNS: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    HALF: tl.constexpr = x.shape[2] // 2
    first, second = tl.split(tl.permute(tl.reshape(x, (RUNS, M, 2, HALF)), (0, 1, 3, 2)))
    columns = first_column + tl.arange(0, HALF)
    for half in tl.static_range(2):
        value = sum_runs(second if half else first) * scale[:, None]
        inside = is_row[:, None] & (columns < WIDTH)[None, :]
        tl.store(row_ptr[:, None] + columns[None, :], value.to(row_ptr.dtype.element_ty), mask=inside)
        columns += HALF


@triton.jit(do_not_specialize=["window", "Z", "num_kv_heads", "page_table_stride"])
def attn_decode_kernel(
    o_ptr,  # [B, H, DV]; unused unless DIRECT
    partial_ptr,  # [B, Z, H, DV] fp32
    lse_ptr,  # [B, Z, H] fp32, base 2
    q_ptr,  # [B, H, D]
    k_cache_ptr,  # [N, P, G, D]
    v_cache_ptr,  # [N, P, G, DV]
    page_table_ptr,  # [B, W]
    kv_len_ptr,  # [B]
    scale,  # to be multiplied with q . k; includes the scale of an fp8 cache
    cap,
    v_scale,
    window,
    q_batch_stride,
    q_head_stride,
    k_page_stride,
    k_token_stride,
    k_head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    page_table_stride,
    Z,
    num_kv_heads,
    GROUP: tl.constexpr,  # query heads of a kv head
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    P: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    CASTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DIRECT: tl.constexpr,  # one split at most and no sinks: write o, there is nothing to merge
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Split: one program per kv head (and BLOCK_M of its query heads), split of tokens, and sequence.
    Traffic: keys and values of the split are read once for all query heads that share them.
    Needs: contiguous rows.
    Why: the query heads of a group fill a matrix tile; each wave has runs of tokens and a softmax of its own, and hands over
        its sums once, at the end. The length of a split depends on the sequence alone, so its result does not change with its
        neighbours.
    Source: Flash-Decoding.
    """
    num_tiles: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile, split, b = tl.program_id(0) % num_tiles, tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_len_ptr + b)
    window_start = tl.maximum(kv_len - window, 0) if window > 0 else 0
    split_len, num_splits = kv_splits(kv_len - window_start, SPLIT, MAX_SPLITS)
    if (split >= num_splits) & (not DIRECT):
        return
    start = window_start + split * split_len
    stop = tl.minimum(start + split_len, kv_len)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < GROUP
    heads = kv_head * GROUP + rows
    q_row_ptr = (q_ptr + b * q_batch_stride + heads * q_head_stride)[None, :, None]
    k_columns0, k_columns1 = tl.arange(0, D0)[None, None, :], (D0 + tl.arange(0, D1 if D1 else 16))[None, None, :]
    v_columns0, v_columns1 = tl.arange(0, V0)[None, None, :], (V0 + tl.arange(0, V1 if V1 else 16))[None, None, :]
    q0, q1 = load_parts(q_row_ptr, is_row[None, :, None], k_columns0, k_columns1, D, D0, D1)
    dtype = q0.dtype
    q0 = tl.broadcast_to(q0, (RUNS, BLOCK_M, D0))
    q1 = tl.broadcast_to(q1, (RUNS, BLOCK_M, D1 if D1 else D0))
    m = tl.full([RUNS, BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([RUNS, BLOCK_M], tl.float32)
    acc0 = tl.zeros([RUNS, BLOCK_M, V0], tl.float32)
    acc1 = tl.zeros([RUNS, BLOCK_M, V1 if V1 else 16], tl.float32)
    k_ptr, v_ptr = k_cache_ptr + kv_head * k_head_stride, v_cache_ptr + kv_head * v_head_stride
    pages_ptr = page_table_ptr + b * page_table_stride
    for first in range(start // RUN * RUN, stop, RUNS * RUN):
        tokens = first + tl.arange(0, RUNS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        is_token = (tokens >= start) & (tokens < stop)
        k_row_ptr = k_ptr + run_offsets(pages_ptr, first, stop, k_page_stride, k_token_stride, P, RUNS, RUN)
        k0, k1 = load_parts(k_row_ptr[:, :, None], is_token[:, :, None], k_columns0, k_columns1, D, D0, D1)
        scores = tl.zeros([RUNS, BLOCK_M, RUN], tl.float32)
        scores = dot(q0, tl.permute(from_cache(k0, dtype, FP8_BIAS, NATIVE), (0, 2, 1)), scores)
        if D1:
            scores = dot(q1, tl.permute(from_cache(k1, dtype, FP8_BIAS, NATIVE), (0, 2, 1)), scores)
        m, total, weights, keep = online_softmax(scores, is_token[:, None, :], m, total, scale, cap, HAS_CAP, True)
        weights = rounded(weights, dtype, CASTS)
        v_row_ptr = v_ptr + run_offsets(pages_ptr, first, stop, v_page_stride, v_token_stride, P, RUNS, RUN)
        v0, v1 = load_parts(v_row_ptr[:, :, None], is_token[:, :, None], v_columns0, v_columns1, DV, V0, V1)
        acc0 = dot(weights, from_cache(v0, dtype, FP8_BIAS, NATIVE), acc0 * keep[:, :, None])
        if V1:
            acc1 = dot(weights, from_cache(v1, dtype, FP8_BIAS, NATIVE), acc1 * keep[:, :, None])

    highest = tl.max(m, 0)
    share = tl.exp2(m - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    total = tl.sum(total * share, 0)
    inverse = v_scale / tl.where(total == 0.0, 1.0, total)
    if DIRECT:
        row_ptr = o_ptr + (b * (num_kv_heads * GROUP) + heads) * DV
    else:
        place = (b * Z + split) * (num_kv_heads * GROUP) + heads
        row_ptr = partial_ptr + place * DV
        tl.store(lse_ptr + place, highest + tl.log2(total), mask=is_row)
    store_runs(row_ptr, is_row, 0, acc0 * share[:, :, None], inverse, DV)
    if V1:
        store_runs(row_ptr, is_row, V0, acc1 * share[:, :, None], inverse, DV)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: G, H, D, Dv, itemsize (of a query value)."""
    group, row_bytes = dims["H"] // dims["G"], max(dims["D"], dims["Dv"]) * dims["itemsize"]
    # Every wave keeps sums and queries of all rows: 16 fill a matrix tile, 32 of wide heads would fill the registers.
    block_m = 16 if group <= 16 or row_bytes > 256 or is_rdna(arch) else 32
    # 4 waves with 16 tokens each have 16 KB of keys and of values in flight, in LDS for four workgroups on a compute unit.
    made = options(arch, num_warps=2 if row_bytes > 512 or is_rdna(arch) else 4, num_stages=1, matrix=True, shallow=True)
    return {
        # A model with few kv heads on this rank brings few programs per sequence, so its splits are shorter.
        "SPLIT": 128 if dims["G"] <= 2 else 256,
        "MAX_SPLITS": 64,
        "BLOCK_M": block_m,
        "RUNS": made["num_warps"],
        "RUN": 16,
        **made,
    }


def _config(call: Any) -> tuple[dict[str, Any], int]:
    """(tile, number of splits in the scratch: 0 where none is merged)."""
    dims = call.dims
    chosen = config(archs.current(call.device), {**dims, "itemsize": call.dtypes["q"].itemsize})
    splits = num_splits(dims["W"], dims["P"], chosen["SPLIT"], chosen["MAX_SPLITS"])
    return chosen, splits if splits > 1 or "sinks" in call.dtypes else 0


def supports(call: Any) -> str | None:
    size = max(call.dims["D"], call.dims["Dv"])
    return None if size <= 256 else f"q: expected head sizes up to 256, got {size}"


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Partial results and their log-sum-exps, one per split."""
    shape = (call.dims["B"], _config(call)[1], call.dims["H"])
    return [((*shape, call.dims["Dv"]), torch.float32), (shape, torch.float32)]


def launch(
    o: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_len: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    window: int,
    cap: float,
    k_scale: float,
    v_scale: float,
) -> None:
    check_rows("attn_decode", q=q, k_cache=k_cache, v_cache=v_cache, page_table=page_table, sinks=sinks)
    batch, num_heads, size = q.shape
    page_size, num_kv_heads, v_size = v_cache.shape[1:]
    if batch == 0:
        return
    arch = archs.current(q.device)
    dims = {"G": num_kv_heads, "H": num_heads, "D": size, "Dv": v_size, "itemsize": q.element_size()}
    chosen = config(arch, dims)
    splits = partial.shape[1]
    operands = operand_args(arch, k_cache.dtype)
    group = num_heads // num_kv_heads
    attn_decode_kernel[(num_kv_heads * triton.cdiv(group, chosen["BLOCK_M"]), max(splits, 1), batch)](
        o,
        partial,
        lse,
        q,
        as_bytes(k_cache),
        as_bytes(v_cache),
        page_table,
        kv_len,
        float(scale * k_scale) if operands["FP8_BIAS"] else float(scale),
        float(cap),
        float(v_scale) if operands["FP8_BIAS"] else 1.0,
        window,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        page_table.stride(0),
        splits,
        num_kv_heads,
        GROUP=group,
        D=size,
        D0=parts(size)[0],
        D1=parts(size)[1],
        DV=v_size,
        V0=parts(v_size)[0],
        V1=parts(v_size)[1],
        P=page_size,
        HAS_CAP=cap > 0,
        DIRECT=splits == 0,
        **operands,
        **chosen,
    )
    if splits:
        limits = {"split": chosen["SPLIT"], "max_splits": chosen["MAX_SPLITS"]}
        merge(o, partial, lse, sinks, kv_len, window=window, num_new=0, **limits)
