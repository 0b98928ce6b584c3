# SPDX-License-Identifier: Apache-2.0
"""Matrix product of fp8 activations and block-quantised fp8 weights."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, ceil_div, op
from rocm_infer.ops.quant_fp8 import BLOCK, dequantise, dequantise_blocks, quantise

CHUNK = 8 * BLOCK  # weight rows held in fp32 at once


def random_blocks(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights [..., N, K] as (codes, scale [..., ceil(N/128), ceil(K/128)])."""
    rows, width = shape[-2:]
    blocks = (*shape[:-2], ceil_div(rows, BLOCK), ceil_div(width, BLOCK))
    codes = (torch.randn(shape, generator=generator) * 50).clamp(-240, 240).to(dtype)
    return codes, (0.5 + torch.rand(blocks, generator=generator)) * scale / 50


def _inputs(
    dims: dict[str, int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float8_e4m3fn,
    out_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    a, a_scale = quantise(torch.randn(dims["M"], dims["K"], generator=generator), dtype, BLOCK)
    b, b_scale = random_blocks((dims["N"], dims["K"]), dtype, generator, max(dims["K"], 1) ** -0.5)
    made = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
    return {**{name: tensor.to(device) for name, tensor in made.items()}, "out_dtype": out_dtype}


def _cost(dims: dict[str, int], *, out_itemsize: int = 2) -> Cost:
    m, n, k = dims["M"], dims["N"], dims["K"]
    scales = 4 * ceil_div(k, BLOCK) * (m + ceil_div(n, BLOCK))
    return Cost(bytes=m * k + n * k + m * n * out_itemsize + scales, flops=2 * m * n * k)


@op(
    "a[M, K]:fp8, a_scale[M, ceil(K/128)]:f32, b[N, K]:a, b_scale[ceil(N/128), ceil(K/128)]:f32 -> c[M, N]:out_dtype",
    inputs=_inputs,
    cost=_cost,
)
def gemm_fp8(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, *, out_dtype: torch.dtype
) -> torch.Tensor:
    """c[m, n] = sum over k of a[m, k] a_scale[m, k // 128] b[n, k] b_scale[n // 128, k // 128].

    a, a_scale: activations in groups of 1x128, as `quant_fp8` makes them. b, b_scale: weights in blocks of 128x128; blocks
        at the lower and right edge may be partial. Both in one dialect of fp8.
    Numerics: products of codes are exact and accumulate in fp32; scales are applied in fp32 once per 128 of K; one rounding
        at the end.
    Edges: M = 0 gives an empty output, K = 0 zeros.
    Source: DeepSeek-V3 report 2024, section 3.3.
    """
    wide = dequantise(a, a_scale, BLOCK)
    c = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    for start in range(0, b.shape[0], CHUNK):
        scale = b_scale[start // BLOCK : (start + CHUNK) // BLOCK]
        c[:, start : start + CHUNK] = wide @ dequantise_blocks(b[start : start + CHUNK], scale).T
    return c
