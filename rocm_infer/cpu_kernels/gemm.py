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
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and _has_bf16()


def _has_bf16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] bf16 in the library's layout: same shape, values and type, no strides; only `run` reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
