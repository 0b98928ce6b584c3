# SPDX-License-Identifier: Apache-2.0
"""moe_gemm_packed on csrc/cpu/moe_gemm_packed.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows
from rocm_infer.cpu_kernels.gemm_packed import refuse_layout

_kernel = Kernel("moe_gemm_packed", "pppppp iiiiiiii")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "x") or refuse_layout(call)


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded: torch.Tensor,
    slot_weights: torch.Tensor | None,
    *,
    columns: int,
    num_slots: int,
    slots_per_row: int,
    silu: bool,
) -> None:
    x, blocks = rows(x), block_experts.numel()
    pointers = [pointer(part) for part in (y, x, weight, sorted_slots, block_experts, slot_weights)]
    block = sorted_slots.numel() // max(blocks, 1)
    _kernel(x.dtype, *pointers, blocks, block, num_slots, slots_per_row, columns, x.shape[1], x.stride()[0], silu)
