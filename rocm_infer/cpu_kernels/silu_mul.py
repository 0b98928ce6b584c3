# SPDX-License-Identifier: Apache-2.0
"""silu_mul on csrc/cpu/silu_mul.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, rows

_kernel = Kernel("silu_mul", "pp iii")


def supports(call: Any) -> str | None:
    return "group: fp8 output" if call.scalars["group"] else _kernel.refuses(call, "x")


def launch(y: torch.Tensor, x: torch.Tensor, *, group: int, out_dtype: torch.dtype | None) -> None:
    x = rows(x)
    _kernel(x.dtype, y.data_ptr(), x.data_ptr(), *y.shape, x.stride()[0])
