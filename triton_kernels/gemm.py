# SPDX-License-Identifier: Apache-2.0
"""Batch-invariant dense matrix product: a row's bits do not depend on the rows beside it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import dot
from rocm_infer.triton_kernels.common import add_splits, check_tile, split_grid, split_sums, split_tiles, tile_of, tiles, within


@triton.jit(do_not_specialize=["M", "num_splits"])
def gemm_kernel(
    y_ptr,  # [M, N]
    partial_ptr,  # [num_splits, M, N] fp32, or None
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N], or None
    M,
    N,
    K,
    y_stride,
    x_stride,
    weight_stride,
    split_len,
    num_splits,
    WHOLE: tl.constexpr,  # one program sums all splits of its tile
    SINGLE: tl.constexpr,  # there is one split
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Split: one program per tile of the output, and per split of K unless WHOLE.
    Traffic: tiles of x and weight pass through LDS, one step ahead of the products.
    Needs: contiguous rows.
    Why: splits are a property of the weight and are added in order, by one program or by `add_splits`, so that few rows and
        many give the same bits.
    """
    tl.assume(x_stride >= 0)
    tl.assume(weight_stride >= 0)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), NUM_XCDS, GROUP_M)
    first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
    # Rows and columns beyond the edge repeat the first one; they are computed and not stored.
    row_in_tile = within(BLOCK_M, M - first_row)
    column_in_tile = within(BLOCK_N, N - first_column)
    k_in_tile = tl.arange(0, BLOCK_K)
    x_tile_ptr = x_ptr + first_row.to(tl.int64) * x_stride
    weight_tile_ptr = weight_ptr + first_column.to(tl.int64) * weight_stride
    x_offsets = row_in_tile[:, None] * x_stride + k_in_tile[None, :]
    weight_offsets = column_in_tile[None, :] * weight_stride + k_in_tile[:, None]
    first_split = 0 if WHOLE else tl.program_id(1)
    last_split = num_splits if WHOLE and not SINGLE else first_split + 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(first_split, last_split):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(split * split_len, tl.minimum(K, (split + 1) * split_len), BLOCK_K):
            if EVEN_K:
                x = tl.load(x_tile_ptr + k + x_offsets)
                weight = tl.load(weight_tile_ptr + k + weight_offsets)
            else:
                x = tl.load(x_tile_ptr + k + x_offsets, mask=(k_in_tile < K - k)[None, :], other=0.0)
                weight = tl.load(weight_tile_ptr + k + weight_offsets, mask=(k_in_tile < K - k)[:, None], other=0.0)
            acc = dot(x, weight, acc)
        total = acc if SINGLE or not WHOLE else total + acc
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    if WHOLE:
        if HAS_BIAS:
            total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + rows[:, None] * y_stride + columns[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        rows += tl.program_id(1).to(tl.int64) * M
        tl.store(partial_ptr + rows[:, None] * N + columns[None, :], total, mask=inside)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: M, N, K, itemsize."""
    block_m, block_n = tiles(arch, dims["M"], dims["N"])
    # 128 bytes of a row: whole cache lines, and two tiles of 128 rows take half of the smallest LDS.
    block_k = 128 // dims["itemsize"]
    return split_tiles(arch, dims, block_m, block_n, block_k)


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    chosen = config(archs.current(call.device), {**call.dims, "itemsize": call.dtypes["x"].itemsize})
    return split_sums(chosen, call.dims["M"], call.dims["N"])


def launch(y: torch.Tensor, partial: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    m, k = x.shape
    n = weight.shape[0]
    if y.numel() == 0:
        return
    check_tile("gemm", x=x, weight=weight)
    arch = archs.current(x.device)
    chosen = config(arch, {"M": m, "N": n, "K": k, "itemsize": x.element_size()})
    whole = chosen["WHOLE"]
    gemm_kernel[split_grid(chosen, m, n)](
        y,
        None if whole else partial,
        x,
        weight,
        bias if whole else None,
        m,
        n,
        k,
        y.stride(0),
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=whole and bias is not None,
        **chosen,
    )
    if not whole:
        add_splits(arch, y, partial, bias)
