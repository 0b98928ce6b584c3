# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention of a few new tokens per sequence over the paged latent cache, absorbed form."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import FP8, Call, Cost, op
from rocm_infer.ops._paged import attend, check_rope, hidden_keys, read_rows, rotate, write_rows


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: B, S, H, K (tokens of every sequence, the S new ones included), L, R, P; pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    batch, new, length, page, width = dims["B"], dims["S"], dims["K"], dims["P"], dims["R"]
    row, pages = dims["L"] + width, -(-length // page)
    angle = torch.rand(length, width // 2, generator=generator) * 6.28
    return {
        "q": torch.randn(batch, new, dims["H"], row, generator=generator).to(device, dtype),
        "kv_new": torch.randn(batch, new, row, generator=generator).to(device, dtype),
        "cache": torch.randn(batch * pages, page, row, generator=generator).to(device, dtype),
        "page_table": torch.randperm(batch * pages, generator=generator).view(batch, pages).int().to(device),
        "kv_len": torch.full((batch,), length, dtype=torch.int32, device=device),
        "positions": (torch.arange(new) + length - new).expand(batch, new).contiguous().to(device),
        "table": torch.cat([angle.cos(), angle.sin()], -1).to(device),
        "scale": (128 + width) ** -0.5,
    }


def _cost(dims: dict[str, int], *, itemsize: int = 2, cache_itemsize: int = 2) -> Cost:
    queries, row = dims["B"] * dims["S"] * dims["H"], dims["L"] + dims["R"]
    latent = dims["B"] * dims["K"] * row * cache_itemsize
    new = dims["B"] * dims["S"] * row * (itemsize + cache_itemsize)
    return Cost(bytes=latent + new + queries * (row + dims["L"]) * itemsize, flops=2 * queries * dims["K"] * (row + dims["L"]))


def _check(call: Call) -> str | None:
    width, latent = call.dims["Q"], call.scalars["latent"]
    if not 0 < latent <= width:
        return f"latent: expected 1 to Q = {width}, got {latent}"
    return check_rope(call, "kv_new", "positions", "table")


@op(
    "q[B, S, H, Q]:bf16|f16|f32, kv_new?[B, S, Q]:q, cache![N, P, Q]:q|fp8, page_table[B, W]:i32, kv_len[B]:i32, "
    "positions?[B, S]:i64, table?[M, Q - latent]:f32 -> o[B, S, H, latent]:q",
    inputs=_inputs,
    cost=_cost,
    check=_check,
)
def mla_decode(
    q: torch.Tensor,
    kv_new: torch.Tensor | None,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_len: torch.Tensor,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    *,
    scale: float,
    latent: int = 512,
    interleaved: bool = True,
    cap: float = 0.0,
    kv_scale: float = 1.0,
) -> torch.Tensor:
    """o = softmax(s) c with s = scale * (q_c . c + q_pe . k_pe), over cache rows [c | k_pe] that all heads share.

    q: [q_c | q_pe], q_c already multiplied by W_UK. latent: width of c; Q - latent is the rotary width R.
    kv_new: rows [c | k_pe] of the S new tokens; q_pe and k_pe are rotated by table[positions] (cos(R/2) | sin(R/2)) here and
        each new row is written to the cache once, where page_table says. None: q is rotated and the cache complete.
    kv_len counts the new tokens: query s is token kv_len - S + s and sees the tokens up to itself.
    Token j of sequence b is row j % P of page page_table[b, j // P].
    cap: > 0: s becomes cap * tanh(s / cap). kv_scale: value = code * scale, for an fp8 cache.
    Numerics: q_pe and k_pe are rotated in fp32 and rounded to the type of q and of the cache, as store_mla does; scores, softmax
        and sums in fp32; one rounding at the end. GPU kernels round the weights to the type of q.
    Edges: a query before the sequence's start (kv_len < S, kv_len 0) gives zeros and writes nothing.
        Nothing is read beyond kv_len, nor a page that is not in use.
    Writes: the S new rows of the cache, equal to those of store_mla. q and kv_new are not modified.
    Errors: ValueError if only some of kv_new, positions and table are given, or latent is not below Q.
    Source: DeepSeek-V2 technical report 2024, section 2.1 (absorbed form).
    """
    num_new = q.shape[1]
    tables, lens = page_table.tolist(), kv_len.tolist()
    if kv_new is not None and positions is not None and table is not None:
        q = _rotated(q, latent, positions, table, interleaved).to(q.dtype)
        rows = _rotated(kv_new[:, :, None], latent, positions, table, interleaved)
        slots = [
            _slot(pages, length - num_new + new, cache.shape[1])
            for pages, length in zip(tables, lens)
            for new in range(num_new)
        ]
        write_rows(cache, torch.tensor(slots, dtype=torch.int64, device=cache.device), rows.flatten(0, 2), kv_scale)
    out = q.new_zeros(*q.shape[:3], latent)
    factor = kv_scale if cache.dtype in FP8 else 1.0
    for row, (pages, length) in enumerate(zip(tables, lens)):
        seen = min(num_new, length)
        if seen == 0:
            continue
        keys = read_rows(cache, pages, 0, length)[:, None].float()
        hidden = hidden_keys(length - seen, seen, 0, length, causal=True, window=0)
        hidden = None if hidden is None else hidden.to(q.device)
        found = attend(q[row, -seen:], keys, keys[..., :latent], scale=scale * factor, cap=cap, hidden=hidden)
        out[row, -seen:] = found * factor
    return out


def _rotated(x: torch.Tensor, latent: int, positions: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [B, S, H, Q] with the part beyond `latent` rotated, fp32."""
    turned = rotate(x[..., latent:].flatten(0, 1), positions.flatten(), table, interleaved).view(
        *x.shape[:3], x.shape[3] - latent
    )
    return torch.cat([x[..., :latent].float(), turned], -1)


def _slot(pages: list[int], token: int, page_size: int) -> int:
    return pages[token // page_size] * page_size + token % page_size if token >= 0 else -1
