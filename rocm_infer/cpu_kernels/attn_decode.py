# SPDX-License-Identifier: Apache-2.0
"""attn_decode on csrc/cpu/attn_decode.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("attn_decode", "ppppppp iiiiiiii d i d")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "q", "k_cache")


def launch(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_len: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    window: int,
    cap: float,
    k_scale: float,
    v_scale: float,
) -> None:
    q, page_table = rows(q), rows(page_table)
    k_cache, v_cache, kv_len = k_cache.contiguous(), v_cache.contiguous(), kv_len.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    pointers = [pointer(x) for x in (out, q, k_cache, v_cache, page_table, kv_len, sinks)]
    _, page_size, kv_heads, width = k_cache.shape
    sizes = (q.shape[0], q.shape[1], kv_heads, width, v_cache.shape[3], page_size, page_table.stride()[0], q.stride()[0])
    _kernel(q.dtype, *pointers, *sizes, scale, window, cap)
