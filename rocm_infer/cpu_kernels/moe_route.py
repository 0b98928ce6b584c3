# SPDX-License-Identifier: Apache-2.0
"""moe_route on csrc/cpu/moe_route.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("moe_route", "pppp iiiiiiii d i")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "logits")


def launch(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    score: str,
    renormalise: bool,
    scale: float,
    num_shared: int,
) -> None:
    logits, bias = rows(logits), None if bias is None else bias.contiguous()
    sizes = (*logits.shape, logits.stride()[0], top_k, num_groups, top_groups, score == "softmax", renormalise)
    pointers = (weights.data_ptr(), ids.data_ptr(), logits.data_ptr(), pointer(bias))
    _kernel(logits.dtype, *pointers, *sizes, scale, num_shared)
