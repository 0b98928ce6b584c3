# SPDX-License-Identifier: Apache-2.0
"""sample on csrc/cpu/sample.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer

_kernel = Kernel("sample", "pppp ppppppp ppppppp iii")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "logits")


def launch(ids: torch.Tensor, logprob: torch.Tensor, *tensors: torch.Tensor | None, num_logprobs: int) -> None:
    outputs, given = (tensors[:2], tensors[2:]) if num_logprobs > 0 else ((None, None), tensors)
    kept = [None if x is None else x.contiguous() for x in given]
    pointers = [pointer(x) for x in (ids, logprob, *outputs, *kept)]
    logits = kept[0]
    assert logits is not None
    _kernel(logits.dtype, *pointers, *logits.shape, num_logprobs)
