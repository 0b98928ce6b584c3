# SPDX-License-Identifier: Apache-2.0
"""rms_norm on csrc/cpu/rms_norm.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, rows

_kernel = Kernel("rms_norm", "ppp iii d")


def supports(call: Any) -> str | None:
    return "group: fp8 output" if call.scalars["group"] else _kernel.refuses(call, "x")


def launch(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, eps: float, group: int, out_dtype: torch.dtype | None
) -> None:
    x, weight = rows(x), weight.contiguous()
    _kernel(x.dtype, y.data_ptr(), x.data_ptr(), weight.data_ptr(), *x.shape, x.stride()[0], eps)
