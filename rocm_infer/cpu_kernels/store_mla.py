# SPDX-License-Identifier: Apache-2.0
"""store_mla on csrc/cpu/store_mla.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("store_mla", "ppppppp iiiiiiiii")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "c", "cache")


def launch(
    c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    q_pe: torch.Tensor | None,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    interleaved: bool,
    kv_scale: float,
) -> None:
    c, k_pe, kept, slots = rows(c), rows(k_pe), cache.contiguous(), slots.contiguous()
    turned = None if q_pe is None else q_pe if q_pe.stride()[2] == 1 else q_pe.contiguous()
    positions = None if positions is None else positions.contiguous()
    table = None if table is None else table.contiguous()
    pointers = [pointer(x) for x in (c, k_pe, kept, slots, turned, positions, table)]
    heads, strides = (0, (0, 0)) if turned is None else (turned.shape[1], turned.stride()[:2])
    _kernel(c.dtype, *pointers, *c.shape, k_pe.shape[1], heads, c.stride()[0], k_pe.stride()[0], *strides, interleaved)
    for given, used in ((cache, kept), (q_pe, turned)):
        if given is not None and used is not None and used is not given:
            given.copy_(used)
