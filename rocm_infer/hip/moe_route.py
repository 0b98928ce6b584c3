# SPDX-License-Identifier: Apache-2.0
"""moe_route on csrc/hip/moe_route.hip."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.hip._library import kernel

_launch, supports = kernel("moe_route", outputs=2, tensors=4)
SCORES = ("softmax", "sigmoid")


def launch(*tensors: torch.Tensor | None, score: str, **scalars: Any) -> None:
    """The kernel takes the place of `score` in SCORES. Errors: ValueError for an unknown one."""
    if score not in SCORES:
        raise ValueError(f"moe_route: score: expected {' or '.join(SCORES)}, got {score!r}")
    order = ("top_k", "num_groups", "top_groups", "score", "renormalise", "scale", "num_shared")
    numbers = {**scalars, "score": SCORES.index(score)}
    _launch(*tensors, **{name: numbers[name] for name in order})
