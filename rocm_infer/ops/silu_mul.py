# SPDX-License-Identifier: Apache-2.0
"""The gated activation of the feed-forward layer, with optional fp8 output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rocm_infer.ops._op import Call, Cost, ceil_div, op
from rocm_infer.ops.quant_fp8 import quantise


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    x = torch.randn(dims["T"], 2 * dims["I"], generator=torch.Generator().manual_seed(seed))
    return {"x": x.to(device, dtype)}


def _cost(dims: dict[str, int], *, itemsize: int = 2, group: int = 0) -> Cost:
    rows, width = dims["T"], dims["I"]
    written = rows * (width + 4 * ceil_div(width, group)) if group else rows * width * itemsize
    return Cost(bytes=2 * rows * width * itemsize + written, flops=5 * rows * width)


def _check(call: Call) -> str | None:
    width = call.dims["N"]
    return f"x: expected an even row length, gate and up side by side, got {width}" if width % 2 else None


@op(
    "x[T, N]:bf16|f16|f32 -> y[T, N//2]:out_dtype or x, scale[T, ceil(N/(2*group))]:f32 if group",
    inputs=_inputs,
    cost=_cost,
    check=_check,
)
def silu_mul(
    x: torch.Tensor, *, group: int = 0, out_dtype: torch.dtype | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = gate / (1 + exp(-gate)) * up, where gate is the first half of the row and up the second.

    group, out_dtype: 0 and None for plain output; 128 and an fp8 dialect for one scale per 128 elements.
    Numerics: fp32 inside, one rounding at the end; with fp8 the unrounded fp32 row is quantised.
    Edges: T = 0 gives empty outputs. Inf and NaN stay in their own element, with fp8 in their own group.
    Errors: ValueError if the row length is odd, or for `group` without an fp8 out_dtype.
    Source: Shazeer 2020 (SwiGLU).
    """
    gate, up = x.float().chunk(2, -1)
    y = F.silu(gate) * up
    return quantise(y, out_dtype, group) if group else y.to(x.dtype)
