# SPDX-License-Identifier: Apache-2.0
"""moe_align on csrc/cpu/moe_align.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, library

_kernel = Kernel("moe_align", "pppp iiii")


def supports(call: Any) -> str | None:
    return library()[1]


def launch(
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded: torch.Tensor,
    ids: torch.Tensor,
    *,
    num_experts: int,
    block: int,
) -> None:
    ids = ids.contiguous()
    pointers = (sorted_slots.data_ptr(), block_experts.data_ptr(), num_padded.data_ptr(), ids.data_ptr())
    _kernel(ids.dtype, *pointers, ids.numel(), num_experts, block, block_experts.numel())
