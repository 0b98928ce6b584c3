# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation of rows, with optional fp8 output."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, ceil_div, op
from rocm_infer.ops.quant_fp8 import quantise


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """fp32 rows [T, C] -> x / sqrt(mean(x^2) + eps) * weight, fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(dims["T"], dims["C"], generator=generator).to(device, dtype)
    weight = (1 + 0.1 * torch.randn(dims["C"], generator=generator)).to(device, dtype)
    return {"x": x, "weight": weight, "eps": 1e-6}


def _cost(dims: dict[str, int], *, itemsize: int = 2, group: int = 0) -> Cost:
    rows, width = dims["T"], dims["C"]
    written = rows * (width + 4 * ceil_div(width, group)) if group else rows * width * itemsize
    return Cost(bytes=(rows + 1) * width * itemsize + written, flops=4 * rows * width)


@op(
    "x[T, C]:bf16|f16|f32, weight[C]:x -> y[T, C]:out_dtype or x, scale[T, ceil(C/group)]:f32 if group",
    inputs=_inputs,
    cost=_cost,
)
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, group: int = 0, out_dtype: torch.dtype | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight, row by row.

    group: 0 for plain output; 128 for fp8 with one scale per 128 elements, C for one scale per row.
    out_dtype: the fp8 dialect, needed with `group`.
    Numerics: fp32 inside, one rounding at the end; with fp8 the unrounded fp32 row is quantised.
    Edges: T = 0 gives empty outputs. An Inf or NaN makes its own row NaN and no other.
    Source: Zhang and Sennrich 2019; order of operations as in Hugging Face Llama, but the weight is applied in fp32.
    """
    y = normalise(x.float(), weight, eps)
    return quantise(y, out_dtype, group) if group else y.to(x.dtype)
