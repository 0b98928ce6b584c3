# SPDX-License-Identifier: Apache-2.0
"""Dense matrix product with a weight laid out for vectors: as a CPU reads it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rocm_infer.ops._op import Cost, op


def pack(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """[..., N, K] -> [..., ceil(N/lanes), ceil(K/S), lanes, S], zeros beyond N and K; S = 2 for 16-bit types, 1 for fp32.

    Panel y holds columns y * lanes and on; of each, S neighbours of K lie together, as one multiplication takes them.
    """
    step = 4 // weight.dtype.itemsize
    num_columns, depth = weight.shape[-2:]
    padded = F.pad(weight, (0, -depth % step, 0, -num_columns % lanes))
    panels: torch.Tensor = padded.unflatten(-1, (-1, step)).unflatten(-3, (-1, lanes))
    return panels.transpose(-2, -3).contiguous()


def unpack(packed: torch.Tensor, columns: int, depth: int) -> torch.Tensor:
    """What `pack` was given: [..., columns, depth]."""
    return packed.transpose(-2, -3).flatten(-2).flatten(-3, -2)[..., :columns, :depth]


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: M, N, K, L."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(dims["M"], dims["K"], generator=generator)
    weight = torch.randn(dims["N"], dims["K"], generator=generator) / max(dims["K"], 1) ** 0.5
    packed = pack(weight.to(dtype), dims["L"]).to(device)
    return {"x": x.to(device, dtype), "weight": packed, "columns": dims["N"]}


def _cost(dims: dict[str, int], *, itemsize: int = 2) -> Cost:
    m, n, k = dims["M"], dims["N"], dims["K"]
    return Cost(bytes=(m * k + n * k + m * n) * itemsize, flops=2 * m * n * k)


@op(
    "x[M, K]:bf16|f16|f32, weight[ceil(columns/L), ceil(K/S), L, S]:x, bias?[columns]:x -> y[M, columns]:x",
    inputs=_inputs,
    cost=_cost,
    order=("reference",),
)
def gemm_packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, columns: int) -> torch.Tensor:
    """y = x @ W^T + bias, where `weight` is W [columns, K] as `pack` lays it out.

    Numerics: fp32 accumulation in the order of K for every row alike, one rounding at the end.
    Edges: M = 0 gives an empty output; K = 0 gives the bias, or zeros.
    """
    return F.linear(x, unpack(weight, columns, x.shape[1]), bias)
