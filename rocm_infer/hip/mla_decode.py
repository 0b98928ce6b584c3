# SPDX-License-Identifier: Apache-2.0
"""mla_decode on csrc/hip/mla_decode.hip."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.hip._library import kernel, num_splits, refuse_wide_floats, refuse_widths

launch, _supports = kernel("mla_decode", outputs=1, tensors=10)


def supports(call: Any) -> str | None:
    """The reason why these sizes or types cannot be served, or None."""
    width, latent = call.dims["Q"], call.scalars["latent"]
    if not 0 < latent <= width:
        return _supports(call)  # the kernel says what is wrong
    wide = call.dtypes["q"] == torch.float32
    return (
        _supports(call)
        or refuse_widths({"Q": width}, 288 if wide else 576)
        or refuse_widths({"latent": latent}, 256 if wide else 512)
        or refuse_wide_floats(call, "q")
    )


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Sums of weight times latent of each split, query and head, with the largest score and the sum of weights."""
    rows = (call.dims["B"], num_splits(call.dims), call.dims["S"] * call.dims["H"])
    return [((*rows, call.scalars["latent"]), torch.float32), ((*rows, 2), torch.float32)]
