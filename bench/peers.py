# SPDX-License-Identifier: Apache-2.0
"""What our kernels are measured beside: torch's own composition of each op, and kernels of other projects found by import.

A peer's call takes the arguments of our op. Peers differ in layout where attention and experts begin, so only ops that all share
are here: norms and the activation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[..., Any]
READS_DEVICE = "torch reference"  # the body of a contract that reads sizes from the device


def _function(path: str) -> Any:
    """`package.module:name`, or None where it cannot be imported."""
    module, name = path.split(":")
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:
        return None  # not installed, or not for this device


def _plain(values: dict[str, Any]) -> bool:
    return not values.get("group")


def _norm(function: Any, *, out: bool = False) -> Call:
    def call(x: torch.Tensor, weight: torch.Tensor, *, eps: float, **others: Any) -> torch.Tensor:
        if not _plain(others):
            raise NotImplementedError("fp8 output differs between projects")
        if not out:
            y: torch.Tensor = function(x, weight, eps)
            return y
        made = torch.empty_like(x)
        function(made, x, weight, eps)
        return made

    return call


def _add_norm(function: Any) -> Call:
    def call(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, **others: Any) -> torch.Tensor:
        if not _plain(others):
            raise NotImplementedError("fp8 output differs between projects")
        function(x, residual, weight, eps)  # both in place: x becomes the result
        return x

    return call


def _silu(function: Any, *, out: bool = False) -> Call:
    def call(x: torch.Tensor, **others: Any) -> torch.Tensor:
        if not _plain(others):
            raise NotImplementedError("fp8 output differs between projects")
        made = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        if out:
            function(made, x)
            return made
        y: torch.Tensor = function(x)
        return y

    return call


def _found(entries: list[tuple[str, str, Callable[[Any], Call]]]) -> list[tuple[str, Call]]:
    return [(name, wrap(function)) for name, path, wrap in entries if (function := _function(path)) is not None]


PEER_PATHS: dict[str, list[tuple[str, str, Callable[[Any], Call]]]] = {
    "rms_norm": [
        ("aiter", "aiter:rms_norm", _norm),
        ("vllm", "vllm._custom_ops:rms_norm", lambda f: _norm(f, out=True)),
        ("flashinfer", "flashinfer.norm:rmsnorm", _norm),
        ("sglang", "sgl_kernel:rmsnorm", _norm),
    ],
    "add_rms_norm": [
        ("vllm", "vllm._custom_ops:fused_add_rms_norm", _add_norm),
        ("flashinfer", "flashinfer.norm:fused_add_rmsnorm", _add_norm),
        ("sglang", "sgl_kernel:fused_add_rmsnorm", _add_norm),
    ],
    "silu_mul": [
        ("flashinfer", "flashinfer.activation:silu_and_mul", _silu),
        ("sglang", "sgl_kernel:silu_and_mul", _silu),
    ],
}


def peers(op: str) -> list[tuple[str, Call]]:
    """(project, call) of the peers of an op that can be imported here."""
    return _found(PEER_PATHS.get(op, []))


def composition(op: str, arguments: dict[str, Any]) -> tuple[str, Call | None]:
    """(name, call) of torch's own way to the result; call None: the reference's, which is plain torch.

    Attention gets keys and values already gathered into one dense tensor, without pages: more than a server could give it.
    """
    if op == "rms_norm" and _plain(arguments):
        return "torch rms_norm", lambda x, weight, *, eps, **_: F.rms_norm(x, weight.shape, weight, eps)
    if op == "attn_decode":
        return "torch sdpa, no pages", _dense_attention(arguments["q"][:, None], arguments)
    if op == "attn_prefill" and len(set(arguments["query_start"].diff().tolist())) == 1:
        q = arguments["q"].view(len(arguments["kv_len"]), -1, *arguments["q"].shape[1:])
        return "torch sdpa, no pages", _dense_attention(q, arguments)
    if op == "mla_decode":
        return "torch sdpa, no pages", _dense_latent(arguments)
    if op in ("gemm", "moe_sum", "silu_mul", "add_rms_norm", "quant_fp8"):
        return "torch", None
    return READS_DEVICE, None


def _dense_attention(q: torch.Tensor, arguments: dict[str, Any]) -> Call:
    """q [B, S, H, D], the last S tokens of sequences that all are as long."""
    lens = arguments["kv_len"].tolist()
    pages = arguments["page_table"].long()
    query = q.transpose(1, 2).contiguous()
    new = query.shape[2]

    def dense(cache: torch.Tensor) -> torch.Tensor:
        rows = cache[pages].flatten(1, 2)[:, : max(lens)].to(query.dtype)
        return rows.transpose(1, 2).contiguous()

    k, v = dense(arguments["k_cache"]), dense(arguments["v_cache"])
    position = torch.arange(k.shape[2], device=k.device)
    mask = None if new == 1 else position[None, :] <= position[-new:, None]
    groups = query.shape[1] != k.shape[1]
    return lambda **_: F.scaled_dot_product_attention(query, k, v, mask, scale=arguments["scale"], enable_gqa=groups)


def _dense_latent(arguments: dict[str, Any]) -> Call:
    """One latent head for all queries: the cache serves as key, its first columns as value."""
    rows = arguments["cache"][arguments["page_table"].long()].flatten(1, 2)[:, : int(arguments["kv_len"].max())]
    latent = arguments.get("latent", 512)
    q = arguments["q"].flatten(1, 2)[:, None]
    keys = rows.to(q.dtype)[:, None].contiguous()
    values = keys[..., :latent].contiguous()
    return lambda **_: F.scaled_dot_product_attention(q, keys, values, scale=arguments["scale"])
