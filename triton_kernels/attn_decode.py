# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per sequence over paged keys and values, split over the tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._attention import attend_tokens, kv_splits, load_parts, merge, num_splits
from rocm_infer.triton_kernels._paged import as_bytes, check_rows, parts
from rocm_infer.triton_kernels.common import fp8_args, options


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
    HAS_CAP: tl.constexpr,
    DIRECT: tl.constexpr,  # one split at most and no sinks: write o, there is nothing to merge
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Split: one program per kv head (and BLOCK_M of its query heads), split of tokens, and sequence.
    Traffic: keys and values of the split are read once for all query heads that share them.
    Needs: contiguous rows.
    Why: the query heads of a group fill a matrix tile; the length of a split depends on the sequence alone, so its result does
        not change with its neighbours.
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
    q_row_ptr = q_ptr + b * q_batch_stride + heads * q_head_stride
    q0, q1 = load_parts(q_row_ptr, is_row, tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 16), D, D0, D1)
    v_columns0, v_columns1 = tl.arange(0, V0), V0 + tl.arange(0, V1 if V1 else 16)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V1 if V1 else 16], tl.float32)
    m, total, acc0, acc1 = attend_tokens(
        q0, q1, m, total, acc0, acc1,
        k_cache_ptr + kv_head * k_head_stride, v_cache_ptr + kv_head * v_head_stride, page_table_ptr + b * page_table_stride,
        start, stop, start, stop, scale, cap,
        k_page_stride, k_token_stride, v_page_stride, v_token_stride,
        D, D0, D1, DV, V0, V1, P, FP8_BIAS, NATIVE, HAS_CAP, True, False, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inverse = (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    inside0 = is_row[:, None] & (v_columns0 < DV)[None, :]
    inside1 = is_row[:, None] & (v_columns1 < DV)[None, :]
    if DIRECT:
        out_ptr = o_ptr + (b * (num_kv_heads * GROUP) + heads)[:, None] * DV
        tl.store(out_ptr + v_columns0[None, :], (acc0 * inverse).to(q0.dtype), mask=inside0)
        if V1:
            tl.store(out_ptr + v_columns1[None, :], (acc1 * inverse).to(q0.dtype), mask=inside1)
    else:
        place = (b * Z + split) * (num_kv_heads * GROUP) + heads
        tl.store(partial_ptr + place[:, None] * DV + v_columns0[None, :], acc0 * inverse, mask=inside0)
        if V1:
            tl.store(partial_ptr + place[:, None] * DV + v_columns1[None, :], acc1 * inverse, mask=inside1)
        tl.store(lse_ptr + place, m + tl.log2(total), mask=is_row)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: G, H, D, Dv, itemsize (of a query value)."""
    group = dims["H"] // dims["G"]
    block_m = min(64, max(16, triton.next_power_of_2(group)))
    row_space = triton.next_power_of_2(max(dims["D"], dims["Dv"]) * dims["itemsize"])
    return {
        # A model with few kv heads on this rank brings few programs per sequence, so its splits are shorter.
        "SPLIT": 128 if dims["G"] <= 2 else 256,
        "MAX_SPLITS": 64,
        "BLOCK_M": block_m,
        # 16 KB of keys and 16 KB of values in flight; two workgroups fit the 64 KB of a compute unit's LDS.
        # A lane of RDNA has 256 registers, and operands of its matrix instructions lie in them twice.
        "BLOCK_N": 16 if arch.wave == 32 and arch.vendor == "amd" else max(16, min(64, (16 << 10) // row_space)),
        **options(arch, num_warps=4, num_stages=1, matrix=True),
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
    fp8 = fp8_args(arch, k_cache.dtype)
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
        float(scale * k_scale) if fp8["FP8_BIAS"] else float(scale),
        float(cap),
        float(v_scale) if fp8["FP8_BIAS"] else 1.0,
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
        **fp8,
        **chosen,
    )
    if splits:
        limits = {"split": chosen["SPLIT"], "max_splits": chosen["MAX_SPLITS"]}
        merge(o, partial, lse, sinks, kv_len, window=window, num_new=0, **limits)
