# SPDX-License-Identifier: Apache-2.0
"""Add up what a token's experts returned."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, op


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(dims["T"], dims["K"], dims["C"], generator=generator)
    addend = torch.randn(dims["T"], dims["C"], generator=generator)
    return {"y": y.to(device, dtype), "addend": addend.to(device, dtype), "scale": 2.5}


def _cost(dims: dict[str, int], *, itemsize: int = 2) -> Cost:
    size = dims["T"] * dims["C"]
    return Cost(bytes=(dims["K"] + 2) * size * itemsize, flops=(dims["K"] + 2) * size)


@op("y[T, K, C]:bf16|f16|f32, addend?[T, C]:y -> out[T, C]:y", inputs=_inputs, cost=_cost)
def moe_sum(y: torch.Tensor, addend: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
    """out[t] = scale * (y[t, 0] + y[t, 1] + ...) + addend[t].

    addend: the shared expert's output, which `scale` does not touch.
    Numerics: fp32, in the order of K, one rounding at the end.
    Edges: T = 0 gives an empty output; K = 0 gives the addend, or zeros.
    """
    total = torch.zeros(y.shape[0], y.shape[2], dtype=torch.float32, device=y.device)
    for k in range(y.shape[1]):
        total += y[:, k].float()
    total *= scale
    return (total if addend is None else total + addend.float()).to(y.dtype)
