# SPDX-License-Identifier: Apache-2.0
"""attn_prefill on csrc/cpu/attn_prefill.cpp."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.cpu_kernels._library import Kernel, pointer, rows

_kernel = Kernel("attn_prefill", "pppppppp iiiiiiiii d ii d")


def supports(call: Any) -> str | None:
    return _kernel.refuses(call, "q", "k_cache")


def launch(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    cap: float,
    k_scale: float,
    v_scale: float,
) -> None:
    q, page_table = rows(q), rows(page_table)
    k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    query_start, kv_len = query_start.contiguous(), kv_len.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    pointers = [pointer(x) for x in (out, q, k_cache, v_cache, page_table, query_start, kv_len, sinks)]
    _, page_size, kv_heads, width = k_cache.shape
    heads = (q.shape[1], kv_heads, width, v_cache.shape[3])
    sizes = (q.shape[0], kv_len.shape[0], *heads, page_size, page_table.stride()[0], q.stride()[0])
    _kernel(q.dtype, *pointers, *sizes, scale, causal, window, cap)
