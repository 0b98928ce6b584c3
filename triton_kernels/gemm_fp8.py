# SPDX-License-Identifier: Apache-2.0
"""Matrix product of fp8 activations and block-quantised fp8 weights."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import as_bytes, dot
from rocm_infer.triton_kernels.common import (
    add_splits,
    check_tile,
    fp8_args,
    matrix_operand,
    split_grid,
    split_sums,
    split_tiles,
    tile_of,
    tiles,
    within,
)


@triton.jit(do_not_specialize=["M", "num_splits"])
def gemm_fp8_kernel(
    c_ptr,  # [M, N]
    partial_ptr,  # [num_splits, M, N] fp32, or None
    a_ptr,  # [M, K] bytes
    a_scale_ptr,  # [M, ceil(K / 128)]
    b_ptr,  # [N, K] bytes
    b_scale_ptr,  # [ceil(N / 128), ceil(K / 128)]
    M,
    N,
    K,
    c_stride,
    a_stride,
    a_scale_stride,
    a_scale_column_stride,
    b_stride,
    b_scale_stride,
    b_scale_column_stride,
    split_len,
    num_splits,
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,  # one program sums all splits of its tile
    SINGLE: tl.constexpr,  # there is one split
    EVEN_K: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides 128, so a tile lies in one row of scale blocks
    BLOCK_K: tl.constexpr,  # 128
):
    """Split: one program per tile of the output, and per split of K unless WHOLE.
    Traffic: tiles of a and b pass through LDS, ahead of the products; scales come straight from the cache.
    Needs: contiguous rows.
    Why: each 128 of K is multiplied in the matrix cores from zero, then scaled and added in fp32 by one fma. Splits are a property
        of the weight and are added in order, by one program or by `add_splits`, so that few rows and many give the same bits.
    Source: DeepSeek-V3 report 2024, section 3.3.
    """
    tl.assume(a_stride >= 0)
    tl.assume(b_stride >= 0)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), NUM_XCDS, GROUP_M)
    first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
    # Rows and columns beyond the edge repeat the first one; they are computed and not stored.
    row_in_tile = within(BLOCK_M, M - first_row)
    column_in_tile = within(BLOCK_N, N - first_column)
    k_in_tile = tl.arange(0, BLOCK_K)
    a_tile_ptr = a_ptr + first_row.to(tl.int64) * a_stride
    b_tile_ptr = b_ptr + first_column.to(tl.int64) * b_stride
    a_offsets = row_in_tile[:, None] * a_stride + k_in_tile[None, :]
    b_offsets = column_in_tile[None, :] * b_stride + k_in_tile[:, None]
    a_scale_ptrs = a_scale_ptr + (first_row.to(tl.int64) + row_in_tile) * a_scale_stride
    b_scale_row_ptr = b_scale_ptr + (first_column // 128).to(tl.int64) * b_scale_stride
    first_split = 0 if WHOLE else tl.program_id(1)
    last_split = num_splits if WHOLE and not SINGLE else first_split + 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(first_split, last_split):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(split * split_len, tl.minimum(K, (split + 1) * split_len), BLOCK_K):
            if EVEN_K:
                a = tl.load(a_tile_ptr + k + a_offsets)
                b = tl.load(b_tile_ptr + k + b_offsets)
            else:
                a = tl.load(a_tile_ptr + k + a_offsets, mask=(k_in_tile < K - k)[None, :], other=0)
                b = tl.load(b_tile_ptr + k + b_offsets, mask=(k_in_tile < K - k)[:, None], other=0)
            block = k // BLOCK_K
            scale = tl.load(a_scale_ptrs + block * a_scale_column_stride) * tl.load(
                b_scale_row_ptr + block * b_scale_column_stride
            )
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            product = dot(matrix_operand(a, FP8_BIAS, NATIVE), matrix_operand(b, FP8_BIAS, NATIVE), product)
            acc = tl.fma(product, tl.broadcast_to(scale[:, None], (BLOCK_M, BLOCK_N)), acc)
        total = acc if SINGLE or not WHOLE else total + acc
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    if WHOLE:
        tl.store(c_ptr + rows[:, None] * c_stride + columns[None, :], total.to(c_ptr.dtype.element_ty), mask=inside)
    else:
        rows += tl.program_id(1).to(tl.int64) * M
        tl.store(partial_ptr + rows[:, None] * N + columns[None, :], total, mask=inside)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: M, N, K, native (whether the matrix cores take the dialect)."""
    block_m, block_n = tiles(arch, dims["M"], dims["N"])
    if not dims["native"]:
        block_m, block_n = min(block_m, 64), 64  # decoding takes the registers of a larger tile
    return split_tiles(arch, dims, block_m, block_n, 128)


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    arch = archs.current(call.device)
    chosen = config(arch, {**call.dims, "native": arch.multiplies(call.dtypes["a"])})
    return split_sums(chosen, call.dims["M"], call.dims["N"])


def launch(
    c: torch.Tensor,
    partial: torch.Tensor,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
) -> None:
    m, k = a.shape
    n = b.shape[0]
    if c.numel() == 0:
        return
    check_tile("gemm_fp8", a=a, b=b)
    arch = archs.current(a.device)
    chosen = config(arch, {"M": m, "N": n, "K": k, "native": arch.multiplies(a.dtype)})
    whole = chosen["WHOLE"]
    gemm_fp8_kernel[split_grid(chosen, m, n)](
        c,
        None if whole else partial,
        as_bytes(a),
        a_scale,
        as_bytes(b),
        b_scale,
        m,
        n,
        k,
        c.stride(0),
        a.stride(0),
        *a_scale.stride(),
        b.stride(0),
        *b_scale.stride(),
        **fp8_args(arch, a.dtype),
        **chosen,
    )
    if not whole:
        add_splits(arch, c, partial, None)
