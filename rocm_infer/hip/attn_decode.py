# SPDX-License-Identifier: Apache-2.0
"""attn_decode on csrc/hip/attn_decode.hip."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.hip._library import kernel, num_splits, refuse_wide_floats, refuse_widths

launch, _supports = kernel("attn_decode", outputs=1, tensors=9)


def supports(call: Any) -> str | None:
    """The reason why these sizes or types cannot be served, or None."""
    widths = {"D": call.dims["D"], "Dv": call.dims["Dv"]}
    return _supports(call) or refuse_widths(widths, 256) or refuse_wide_floats(call, "q")


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Sums of weight times value of each split and head, with the largest score and the sum of weights."""
    rows = (call.dims["B"], num_splits(call.dims), call.dims["H"])
    return [((*rows, call.dims["Dv"]), torch.float32), ((*rows, 2), torch.float32)]
