# SPDX-License-Identifier: Apache-2.0
"""Add up what a token's experts returned."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels.common import options


@triton.jit
def moe_sum_kernel(
    out_ptr,  # [T, C]
    y_ptr,  # [T, K, C]
    addend_ptr,  # [T, C], or None
    scale,
    C,
    out_stride,
    y_stride,
    y_slot_stride,
    y_column_stride,
    addend_stride,
    addend_column_stride,
    HAS_ADDEND: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split: one program per token and BLOCK columns.
    Traffic: each term is read once; the loads of all K do not wait for each other.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    total = tl.zeros([BLOCK], tl.float32)
    row_ptr = y_ptr + token * y_stride
    for k in tl.static_range(K):
        slot_ptr = row_ptr + tl.full([], k, tl.int64) * y_slot_stride
        total += tl.load(slot_ptr + columns * y_column_stride, mask=inside, other=0.0).to(tl.float32)
    total *= scale
    if HAS_ADDEND:
        addend_ptrs = addend_ptr + token * addend_stride + columns * addend_column_stride
        total += tl.load(addend_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: C. 8 columns, 16 bytes, per lane of one wave: K loads in flight are enough work for it."""
    return {"BLOCK": min(512, max(16, triton.next_power_of_2(dims["C"]))), **options(arch, num_warps=1)}


def launch(out: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None, *, scale: float) -> None:
    num_tokens, num_terms, width = y.shape
    if out.numel() == 0:
        return
    arch = archs.current(y.device)
    chosen = config(arch, {"C": width})
    moe_sum_kernel[(num_tokens, triton.cdiv(width, chosen["BLOCK"]))](
        out,
        y,
        addend,
        float(scale),
        width,
        out.stride(0),
        *y.stride(),
        *((0, 0) if addend is None else addend.stride()),
        HAS_ADDEND=addend is not None,
        K=num_terms,
        **chosen,
    )
