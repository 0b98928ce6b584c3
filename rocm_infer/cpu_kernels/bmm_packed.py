# SPDX-License-Identifier: Apache-2.0
"""bmm_packed on csrc/cpu/gemm_packed.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel
from rocm_infer.cpu_kernels.gemm_packed import refuse_layout

_kernel = Kernel("bmm_packed", "ppp iiiiii")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "x") or refuse_layout(call)


def launch(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, columns: int) -> None:
    x = x if x.stride()[2] == 1 else x.contiguous()
    num_rows, num_heads, depth = x.shape
    pointers = (y.data_ptr(), x.data_ptr(), weight.data_ptr())
    _kernel(x.dtype, *pointers, num_rows, num_heads, columns, depth, *x.stride()[:2])
