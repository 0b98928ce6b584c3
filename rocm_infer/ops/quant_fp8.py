# SPDX-License-Identifier: Apache-2.0
"""Dynamic fp8 quantisation in groups along the row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rocm_infer.ops._op import FP8, Cost, ceil_div, op

# fnuz has no infinity: casts beyond the largest finite value become NaN, so values are clamped before the cast.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
SMALLEST_AMAX = 1e-4


def quantise(x: torch.Tensor, dtype: torch.dtype | None, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 rows [T, K] -> (codes [T, K], scale [T, ceil(K/group)]); value = code * scale."""
    if dtype not in FP8:
        raise ValueError(f"fp8 output: expected out_dtype float8_e4m3fn or float8_e4m3fnuz, got {dtype}")
    if group <= 0:
        raise ValueError(f"fp8 output: expected group > 0, got {group}")
    num_rows, width = x.shape
    groups = ceil_div(width, group)
    padded = F.pad(x, (0, groups * group - width)).view(num_rows, groups, group)
    largest = LARGEST[dtype]
    scale = padded.abs().amax(-1).clamp(min=SMALLEST_AMAX) / largest if padded.numel() else x.new_zeros(num_rows, groups)
    codes = (padded / scale[..., None]).clamp(-largest, largest).view(num_rows, groups * group)[:, :width]
    return codes.to(dtype), scale


def dequantise(codes: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """(codes [T, K], scale [T, ceil(K/group)]) -> fp32 [T, K]."""
    return codes.float() * scale.repeat_interleave(group, dim=-1)[:, : codes.shape[-1]]


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    x = torch.randn(dims["T"], dims["K"], generator=torch.Generator().manual_seed(seed))
    return {"x": x.to(device, dtype), "out_dtype": torch.float8_e4m3fn}


def _cost(dims: dict[str, int], *, itemsize: int = 2, group: int = 128) -> Cost:
    rows, width = dims["T"], dims["K"]
    return Cost(bytes=rows * (width * (itemsize + 1) + 4 * ceil_div(width, group)), flops=3 * rows * width)


@op("x[T, K]:bf16|f16|f32 -> y[T, K]:out_dtype, scale[T, ceil(K/group)]:f32", inputs=_inputs, cost=_cost)
def quant_fp8(x: torch.Tensor, *, out_dtype: torch.dtype, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = max(|x| of the group, 1e-4) / largest finite value of the dialect; y = x / scale, clamped and rounded to nearest even.

    Numerics: fp32 inside; scales are fp32.
    Edges: T = 0 gives empty outputs; the last group of a row may be short; NaN stays NaN in its own group.
    """
    return quantise(x.float(), out_dtype, group)
