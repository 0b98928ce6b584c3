# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation of rows; the kernel also serves `add_rms_norm`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import as_bytes
from rocm_infer.triton_kernels.common import fp8_args, options, refuse_fp8, store_quantised

LONGEST_ROW = 32768


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    y_ptr,  # [T, C], or bytes of fp8
    scale_ptr,  # [T, ceil(C / GROUP)] fp32, or None
    x_ptr,  # [T, C]
    residual_ptr,  # [T, C], or None
    weight_ptr,  # [C]
    eps,
    T,
    C,
    y_stride,
    scale_stride,
    x_stride,
    x_column_stride,
    residual_stride,
    residual_column_stride,
    weight_stride,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,  # 0: no fp8
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Split: one program per ROWS rows.
    Traffic: rows are read once and stay in registers until they are written; the weight comes from the cache.
    Why: the row's sum of squares is reduced in an order that only C decides.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < T)[:, None] & (columns < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :] * x_column_stride, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + rows[:, None] * residual_stride + columns[None, :] * residual_column_stride
        x += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_ptrs, x.to(residual_ptr.dtype.element_ty), mask=inside)
    weight = tl.load(weight_ptr + columns * weight_stride, mask=columns < C, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    y = x * inverse[:, None] * weight[None, :]
    if GROUP:
        store_quantised(y, y_ptr, scale_ptr, rows, T, C, y_stride, scale_stride, ROWS, BLOCK_C, GROUP, FP8_BIAS, NATIVE)
    else:
        tl.store(y_ptr + rows[:, None] * y_stride + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: C."""
    block = max(16, triton.next_power_of_2(dims["C"]))
    # Short rows (heads) share a wave: 8 elements, 16 bytes, per lane.
    rows = max(1, 512 // block)
    # Long rows get a lane per 16 elements, up to a whole workgroup.
    waves = min(16, max(1, block // 1024))
    return {"ROWS": rows, "BLOCK_C": block, **options(arch, num_warps=waves)}


def supports(call: Any) -> str | None:
    width = call.dims["C"]
    if width > LONGEST_ROW:
        return f"x: a row is kept in registers, expected C of at most {LONGEST_ROW}, got {width}"
    return refuse_fp8(call.scalars["group"], call.scalars["out_dtype"], width)


def start(
    outputs: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group: int,
) -> None:
    """Launch with or without a residual; outputs are y and, with a group, scale."""
    y, scale = outputs if group else (outputs[0], None)
    num_rows, width = x.shape
    if x.numel() == 0:
        return
    arch = archs.current(x.device)
    chosen = config(arch, {"C": width})
    rms_norm_kernel[(triton.cdiv(num_rows, chosen["ROWS"]),)](
        as_bytes(y),
        scale,
        x,
        residual,
        weight,
        float(eps),
        num_rows,
        width,
        y.stride(0),
        0 if scale is None else scale.stride(0),
        *x.stride(),
        *((0, 0) if residual is None else residual.stride()),
        weight.stride(0),
        HAS_RESIDUAL=residual is not None,
        GROUP=min(group, chosen["BLOCK_C"]) if group < width else chosen["BLOCK_C"] if group else 0,
        **fp8_args(arch, y.dtype),
        **chosen,
    )


def launch(*tensors: torch.Tensor, eps: float, group: int, out_dtype: torch.dtype | None) -> None:
    *outputs, x, weight = tensors
    start(tuple(outputs), x, None, weight, eps, group)
