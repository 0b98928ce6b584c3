# SPDX-License-Identifier: Apache-2.0
"""The gated activation of the feed-forward layer, with optional fp8 output."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels import quant_fp8
from rocm_infer.triton_kernels._paged import as_bytes
from rocm_infer.triton_kernels.common import fp8_args, refuse_fp8, silu, store_quantised


@triton.jit(do_not_specialize=["T"])
def silu_mul_kernel(
    y_ptr,  # [T, I], or bytes of fp8
    scale_ptr,  # [T, ceil(I / GROUP)] fp32, or None
    x_ptr,  # [T, 2 * I]
    T,
    I,  # noqa: E741
    y_stride,
    scale_stride,
    x_stride,
    x_column_stride,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Split: one program per ROWS rows and BLOCK columns of the output, whole groups.
    Traffic: every element is read once and written once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    inside = (rows < T)[:, None] & (columns < I)[None, :]
    row_ptr = x_ptr + rows[:, None] * x_stride
    gate = tl.load(row_ptr + columns[None, :] * x_column_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + (columns + I)[None, :] * x_column_stride, mask=inside, other=0.0).to(tl.float32)
    y = silu(gate) * up
    if HAS_SCALE:
        store_quantised(
            y, y_ptr + first, scale_ptr + first // GROUP, rows, T, I - first, y_stride, scale_stride,
            ROWS, BLOCK, GROUP, FP8_BIAS, NATIVE,
        )  # fmt: skip
    else:
        tl.store(y_ptr + rows[:, None] * y_stride + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: I, group (0: no fp8). Tiles as in `quant_fp8`."""
    return quant_fp8.config(arch, {"K": dims["I"], "group": dims["group"] or 16})


def supports(call: Any) -> str | None:
    return refuse_fp8(call.scalars["group"], call.scalars["out_dtype"], call.dims["N"] // 2)


def launch(*tensors: torch.Tensor, group: int, out_dtype: torch.dtype | None) -> None:
    *outputs, x = tensors
    y, scale = outputs if group else (outputs[0], None)
    num_rows, width = y.shape
    if y.numel() == 0:
        return
    arch = archs.current(x.device)
    chosen = config(arch, {"I": width, "group": group})
    grid = (triton.cdiv(num_rows, chosen["ROWS"]), triton.cdiv(width, chosen["BLOCK"]))
    silu_mul_kernel[grid](
        as_bytes(y),
        scale,
        x,
        num_rows,
        width,
        y.stride(0),
        0 if scale is None else scale.stride(0),
        *x.stride(),
        HAS_SCALE=scale is not None,
        **fp8_args(arch, y.dtype),
        **chosen,
    )
