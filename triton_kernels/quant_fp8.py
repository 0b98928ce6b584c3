# SPDX-License-Identifier: Apache-2.0
"""Dynamic fp8 quantisation in groups along the row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import as_bytes
from rocm_infer.triton_kernels.common import fp8_args, options, refuse_fp8, store_quantised


@triton.jit(do_not_specialize=["T"])
def quant_fp8_kernel(
    y_ptr,  # [T, K] bytes
    scale_ptr,  # [T, ceil(K / GROUP)] fp32
    x_ptr,  # [T, K]
    T,
    K,
    y_stride,
    scale_stride,
    x_stride,
    x_column_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Split: one program per ROWS rows and BLOCK columns, whole groups.
    Traffic: every element is read once and written once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    inside = (rows < T)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :] * x_column_stride, mask=inside, other=0.0).to(tl.float32)
    groups_ptr = scale_ptr + first // GROUP
    store_quantised(
        x, y_ptr + first, groups_ptr, rows, T, K - first, y_stride, scale_stride, ROWS, BLOCK, GROUP, FP8_BIAS, NATIVE
    )


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: K, group."""
    width = max(16, triton.next_power_of_2(dims["K"]))
    group = min(width, triton.next_power_of_2(dims["group"]))
    # 1024 columns are 16 elements per lane of a wave, and whole groups of any usual size.
    block = max(group, min(width, 1024))
    return {
        "ROWS": max(1, 1024 // block),
        "BLOCK": block,
        "GROUP": group,
        **options(arch, num_warps=min(16, max(1, block // 1024))),
    }


def supports(call: Any) -> str | None:
    if call.scalars["group"] == 0:
        return "group: expected group > 0, got 0"
    return refuse_fp8(call.scalars["group"], call.scalars["out_dtype"], call.dims["K"])


def launch(y: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, *, out_dtype: torch.dtype, group: int) -> None:
    num_rows, width = x.shape
    if x.numel() == 0:
        return
    arch = archs.current(x.device)
    chosen = config(arch, {"K": width, "group": group})
    grid = (triton.cdiv(num_rows, chosen["ROWS"]), triton.cdiv(width, chosen["BLOCK"]))
    quant_fp8_kernel[grid](
        as_bytes(y),
        scale,
        x,
        num_rows,
        width,
        y.stride(0),
        scale.stride(0),
        *x.stride(),
        **fp8_args(arch, out_dtype),
        **chosen,
    )
