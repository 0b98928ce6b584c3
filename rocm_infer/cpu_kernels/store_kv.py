# SPDX-License-Identifier: Apache-2.0
"""store_kv on csrc/cpu/store_kv.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("store_kv", "pppppppp iiiiiiiiii")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "k", "k_cache")


def launch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    interleaved: bool,
    k_scale: float,
    v_scale: float,
) -> None:
    k, v, turned = rows(k), rows(v), None if q is None else rows(q)
    keys, values = k_cache.contiguous(), v_cache.contiguous()
    slots = slots.contiguous()
    positions = None if positions is None else positions.contiguous()
    table = None if table is None else table.contiguous()
    pointers = [pointer(x) for x in (k, v, keys, values, slots, turned, positions, table)]
    tokens, kv_heads, width = k.shape
    heads, q_stride, angles = (
        (0, 0, 0) if turned is None or table is None else (turned.shape[1], turned.stride()[0], table.shape[1])
    )
    sizes = (tokens, kv_heads, width, v.shape[2], heads, angles, k.stride()[0], v.stride()[0], q_stride, interleaved)
    _kernel(k.dtype, *pointers, *sizes)
    for given, used in ((k_cache, keys), (v_cache, values), (q, turned)):
        if given is not None and used is not None and used is not given:
            given.copy_(used)
