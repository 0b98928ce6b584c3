# SPDX-License-Identifier: Apache-2.0
"""moe_align on csrc/hip/moe_align.hip."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.hip._library import kernel

launch, supports = kernel("moe_align", outputs=3, tensors=5)


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Where the blocks of each expert start, of nobody's slots, and the end."""
    return [((call.scalars["num_experts"] + 2,), torch.int32)]
