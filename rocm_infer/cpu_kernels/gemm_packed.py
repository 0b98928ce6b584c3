# SPDX-License-Identifier: Apache-2.0
"""gemm_packed on csrc/cpu/gemm_packed.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, lanes, pointer, rows

_kernel = Kernel("gemm_packed", "pppp iiii")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "x") or refuse_layout(call)


def refuse_layout(call: Any) -> str | None:
    """The panels are as wide as this machine's vectors."""
    expected = (lanes(), 2 if call.dtypes["x"] == torch.bfloat16 else 1)
    got = (call.dims["L"], call.dims["S"])
    return None if got == expected else f"weight: expected panels of L, S = {expected} on this machine, got {got}"


def launch(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, columns: int) -> None:
    x = rows(x)
    num_rows, depth = x.shape
    pointers = (y.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias))
    _kernel(x.dtype, *pointers, num_rows, columns, depth, x.stride()[0])
