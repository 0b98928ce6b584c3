# SPDX-License-Identifier: Apache-2.0
"""mla_decode on csrc/cpu/mla_decode.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("mla_decode", "pppppppp iiiiiii d i d")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "q", "cache")


def launch(
    out: torch.Tensor,
    q: torch.Tensor,
    kv_new: torch.Tensor | None,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_len: torch.Tensor,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    scale: float,
    latent: int,
    interleaved: bool,
    cap: float,
    kv_scale: float,
) -> None:
    q, kept, page_table, kv_len = q.contiguous(), cache.contiguous(), rows(page_table), kv_len.contiguous()
    new, positions, table = (None if x is None else x.contiguous() for x in (kv_new, positions, table))
    pointers = [pointer(x) for x in (out, q, new, kept, page_table, kv_len, positions, table)]
    sizes = (*q.shape, latent, cache.shape[1], page_table.stride()[0])
    _kernel(q.dtype, *pointers, *sizes, scale, interleaved, cap)
    if kept is not cache:
        cache.copy_(kept)
