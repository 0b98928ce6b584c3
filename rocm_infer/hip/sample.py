# SPDX-License-Identifier: Apache-2.0
"""sample on csrc/hip/sample.hip."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.hip._library import kernel

SPLIT_TOKENS, NUM_BINS = 4096, 64  # kSplit and kBins in csrc/hip/sample.hip

launch, supports = kernel("sample", outputs=4, tensors=25)


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Logits after penalties, bias and mask, where there are any; then what the kernels tell each other, see SampleParams."""
    rows, vocab = call.dims["B"], call.dims["V"]
    splits = -(-vocab // SPLIT_TOKENS)
    is_shaped = any(name in call.dtypes for name in ("presence", "frequency", "repetition", "bias", "mask"))
    return [
        ((rows if is_shaped else 0, vocab), torch.float32),
        ((rows, 2, splits), torch.int64),
        ((rows, splits), torch.float32),
        ((rows, splits, NUM_BINS), torch.int32),
        ((rows, vocab), torch.float32),
        ((rows, splits), torch.int32),
        ((rows, splits), torch.int64),
    ]
