# SPDX-License-Identifier: Apache-2.0
"""moe_sum on csrc/cpu/moe_sum.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("moe_sum", "ppp iiii d")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "y")


def launch(out: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None, *, scale: float) -> None:
    y, addend = y.contiguous(), None if addend is None else rows(addend)
    stride = 0 if addend is None else addend.stride()[0]
    _kernel(y.dtype, out.data_ptr(), y.data_ptr(), pointer(addend), *y.shape, stride, scale)
