# SPDX-License-Identifier: Apache-2.0
"""Residual sum and root-mean-square normalisation in one pass, with optional fp8 output."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, ceil_div, op
from rocm_infer.ops.quant_fp8 import quantise
from rocm_infer.ops.rms_norm import normalise


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(dims["T"], dims["C"], generator=generator).to(device, dtype) for _ in range(2))
    weight = (1 + 0.1 * torch.randn(dims["C"], generator=generator)).to(device, dtype)
    return {"x": x, "residual": residual, "weight": weight, "eps": 1e-6}


def _cost(dims: dict[str, int], *, itemsize: int = 2, group: int = 0) -> Cost:
    rows, width = dims["T"], dims["C"]
    written = rows * (width + 4 * ceil_div(width, group)) if group else rows * width * itemsize
    return Cost(bytes=(3 * rows + 1) * width * itemsize + written, flops=5 * rows * width)


@op(
    "x[T, C]:bf16|f16|f32, residual![T, C]:x, weight[C]:x -> y[T, C]:out_dtype or x, scale[T, ceil(C/group)]:f32 if group",
    inputs=_inputs,
    cost=_cost,
)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """residual = x + residual; y = residual / sqrt(mean(residual^2) + eps) * weight, row by row.

    group, out_dtype: as in `rms_norm`; 0 and None for plain output.
    Numerics: the sum is made in fp32. It is rounded once to be stored, and normalised as it was before that rounding.
    Edges: T = 0 gives empty outputs. An Inf or NaN makes its own row NaN and no other.
    Writes: residual.
    Source: Zhang and Sennrich 2019.
    """
    total = x.float() + residual.float()
    residual.copy_(total)
    y = normalise(total, weight, eps)
    return quantise(y, out_dtype, group) if group else y.to(x.dtype)
