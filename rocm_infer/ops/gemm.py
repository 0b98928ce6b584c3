# SPDX-License-Identifier: Apache-2.0
"""Dense matrix product with a weight stored row by row per output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rocm_infer.ops._op import Cost, op


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(dims["M"], dims["K"], generator=generator)
    weight = torch.randn(dims["N"], dims["K"], generator=generator) / max(dims["K"], 1) ** 0.5
    return {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}


def _cost(dims: dict[str, int], *, itemsize: int = 2) -> Cost:
    m, n, k = dims["M"], dims["N"], dims["K"]
    return Cost(bytes=(m * k + n * k + m * n) * itemsize, flops=2 * m * n * k)


# On a GPU the reference is the vendor's library through torch, the default; Triton's batch-invariant form is the option.
@op("x[M, K]:bf16|f16|f32, weight[N, K]:x, bias?[N]:x -> y[M, N]:x", inputs=_inputs, cost=_cost, order=("reference",))
def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ weight^T + bias.

    Numerics: fp32 accumulation, one rounding at the end. The library may sum in an order that depends on M;
        `gemm.using("triton")` gives a row the same bits in any batch.
    Edges: M = 0 gives an empty output; K = 0 gives the bias, or zeros.
    """
    return F.linear(x, weight, bias)
