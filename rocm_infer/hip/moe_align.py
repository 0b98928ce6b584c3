# SPDX-License-Identifier: Apache-2.0
"""moe_align on csrc/hip/moe_align.hip."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.hip._library import kernel

launch, supports = kernel("moe_align", outputs=3, tensors=5)


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Slots of each expert, and of nobody, in each chunk: of 256 slots, or more, for every chunk reads the counts of all."""
    num_chunks = max(1, min(32, -(-call.dims["T"] * call.dims["K"] // 256)))
    return [((num_chunks, call.scalars["num_experts"] + 1), torch.int32)]
