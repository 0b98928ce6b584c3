# SPDX-License-Identifier: Apache-2.0
"""moe_gemm on csrc/cpu/moe_gemm.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("moe_gemm", "pppppp iiiiiiii")


def supports(call: Any) -> str | None:
    if "x_scale" in call.dtypes or "w_scale" in call.dtypes or call.scalars["out_dtype"] not in (None, call.dtypes["x"]):
        return "scales, out_dtype: expected none, and the type of x"
    if call.scalars["silu"] and call.dims["N"] % 2:
        return "w: expected an even N"
    return _kernel.refuses(call, "x")


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded: torch.Tensor,
    slot_weights: torch.Tensor | None,
    x_scale: None,
    w_scale: None,
    *,
    num_slots: int,
    slots_per_row: int,
    silu: bool,
    out_dtype: torch.dtype | None,
) -> None:
    x, w, sorted_slots, block_experts = rows(x), w.contiguous(), sorted_slots.contiguous(), block_experts.contiguous()
    slot_weights = None if slot_weights is None else slot_weights.contiguous()
    blocks = block_experts.numel()
    sizes = (
        blocks,
        sorted_slots.numel() // max(blocks, 1),
        num_slots,
        slots_per_row,
        w.shape[1],
        w.shape[2],
        x.stride(0),
        silu,
    )
    _kernel[x.dtype](*(pointer(part) for part in (y, x, w, sorted_slots, block_experts, slot_weights)), *sizes)
