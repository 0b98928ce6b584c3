# SPDX-License-Identifier: Apache-2.0
"""add_rms_norm on csrc/cpu/add_rms_norm.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, rows

_kernel = Kernel("add_rms_norm", "pppp iiii d")


def supports(call: Any) -> str | None:
    return "group: fp8 output" if call.scalars["group"] else _kernel.refuses(call, "x")


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int,
    out_dtype: torch.dtype | None,
) -> None:
    x, kept, weight = rows(x), rows(residual), weight.contiguous()
    pointers = (y.data_ptr(), x.data_ptr(), kept.data_ptr(), weight.data_ptr())
    _kernel(x.dtype, *pointers, *x.shape, x.stride()[0], kept.stride()[0], eps)
    if kept is not residual:
        residual.copy_(kept)
