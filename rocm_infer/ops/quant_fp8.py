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
BLOCK = 128  # side of the square blocks of weights that share a scale, and length of the groups of activations


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


def dequantise_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights (codes [N, K], scale [ceil(N/128), ceil(K/128)]) -> fp32 [N, K]."""
    return dequantise(codes, scale.repeat_interleave(BLOCK, dim=0)[: codes.shape[0]], BLOCK)


def to_fnuz(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values in the dialect of gfx942: e4m3fn codes and fp32 scales -> (e4m3fnuz codes, scales).

    Equal bits mean half the value in fnuz, so the scales double. Byte 0x80 is -0 in fn and NaN in fnuz: it becomes 0.
    Errors: ValueError if a code is NaN (0x7F or 0xFF), which fnuz would read as 240 or -240.
    Source: OCP 8-bit floating point specification; AMD CDNA3 instruction set, section on fp8.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"to_fnuz: codes: expected dtype float8_e4m3fn, got {codes.dtype}")
    raw = codes.view(torch.uint8)
    num_nan = 0 if raw.is_meta else int(((raw & 0x7F) == 0x7F).sum())
    if num_nan:
        raise ValueError(f"to_fnuz: codes: expected finite values, got {num_nan} NaN; the checkpoint is damaged")
    return raw.masked_fill(raw == 0x80, 0).view(torch.float8_e4m3fnuz), scale * 2


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    x = torch.randn(dims["T"], dims["K"], generator=torch.Generator().manual_seed(seed))
    return {"x": x.to(device, dtype), "out_dtype": torch.float8_e4m3fn}


def _cost(dims: dict[str, int], *, itemsize: int = 2, group: int = 128) -> Cost:
    rows, width = dims["T"], dims["K"]
    return Cost(bytes=rows * (width * (itemsize + 1) + 4 * ceil_div(width, group)), flops=3 * rows * width)


@op("x[T, K]:bf16|f16|f32 -> y[T, K]:out_dtype, scale[T, ceil(K/group)]:f32", inputs=_inputs, cost=_cost)
def quant_fp8(x: torch.Tensor, *, out_dtype: torch.dtype, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = max(|x| of the group, 1e-4) / largest finite value of the dialect; y = x / scale, clamped and rounded to nearest even.

    group: elements that share a scale, 128 for the activations of `gemm_fp8`.
    Numerics: fp32 inside; scales are fp32.
    Edges: T = 0 gives empty outputs; the last group of a row may be short; an Inf or NaN makes its own group NaN and no other.
    Errors: ValueError unless out_dtype is an fp8 dialect and group > 0.
    Source: DeepSeek-V3 report 2024, section 3.3 (groups of 1x128).
    """
    return quantise(x.float(), out_dtype, group)
