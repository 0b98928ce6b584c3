# SPDX-License-Identifier: Apache-2.0
"""A matrix product per head, with weights laid out for vectors: as a CPU reads them."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, op
from rocm_infer.ops.gemm_packed import pack, unpack


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: M, H, N, K, L."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(dims["M"], dims["H"], dims["K"], generator=generator)
    weight = torch.randn(dims["H"], dims["N"], dims["K"], generator=generator) / max(dims["K"], 1) ** 0.5
    packed = pack(weight.to(dtype), dims["L"]).to(device)
    return {"x": x.to(device, dtype), "weight": packed, "columns": dims["N"]}


def _cost(dims: dict[str, int], *, itemsize: int = 2) -> Cost:
    m, h, n, k = dims["M"], dims["H"], dims["N"], dims["K"]
    return Cost(bytes=h * (m * k + n * k + m * n) * itemsize, flops=2 * m * h * n * k)


@op(
    "x[M, H, K]:bf16|f16|f32, weight[H, ceil(columns/L), ceil(K/S), L, S]:x -> y[M, H, columns]:x",
    inputs=_inputs,
    cost=_cost,
    order=("reference",),
)
def bmm_packed(x: torch.Tensor, weight: torch.Tensor, *, columns: int) -> torch.Tensor:
    """y[:, h] = x[:, h] @ W[h]^T, where `weight` is W [H, columns, K] as `pack` lays it out.

    Numerics: fp32 accumulation in the order of K for every row alike, one rounding at the end.
    Edges: M = 0 gives an empty output.
    """
    return torch.bmm(x.transpose(0, 1), unpack(weight, columns, x.shape[2]).mT).transpose(0, 1)
