# SPDX-License-Identifier: Apache-2.0
"""Matrix product by the CPU's library, on weights in its own layout where `pack` has made one.

Why: oneDNN multiplies bf16 in blocks. A weight in row-major order is read with strides, or reordered in every call; reordered
once, a single row streams it at nearly the rate of memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def can_pack() -> bool:
    """Whether this torch has the layout and this CPU the instructions that make it worthwhile."""
    ops = torch.ops.mkldnn
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(ops, name) for name in needed) and bool(ops._is_mkldnn_bf16_supported())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] bf16 in the library's layout: same shape, values and type, no strides; only `run` reads it."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
