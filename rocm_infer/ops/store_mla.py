# SPDX-License-Identifier: Apache-2.0
"""Write new latent rows of multi-head latent attention into the paged cache, with the rotary embedding on the way."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, op
from rocm_infer.ops._paged import check_rope, rotate, write_rows


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: T, H, L, R, P. The cache holds 2 * T tokens, each token a random slot."""
    generator = torch.Generator().manual_seed(seed)
    tokens, page, width = dims["T"], dims["P"], dims["R"]
    shape = (-(-2 * tokens // page) + 1, page, dims["L"] + width)
    angle = torch.rand(4096, width // 2, generator=generator) * 6.28
    return {
        "c": torch.randn(tokens, dims["L"], generator=generator).to(device, dtype),
        "k_pe": torch.randn(tokens, width, generator=generator).to(device, dtype),
        "cache": torch.zeros(shape, dtype=dtype, device=device),
        "slots": torch.randperm(shape[0] * page, generator=generator)[:tokens].to(device),
        "q_pe": torch.randn(tokens, dims["H"], width, generator=generator).to(device, dtype),
        "positions": torch.randint(0, 4096, (tokens,), generator=generator).to(device),
        "table": torch.cat([angle.cos(), angle.sin()], -1).to(device),
    }


def _cost(dims: dict[str, int], *, itemsize: int = 2, cache_itemsize: int = 2) -> Cost:
    tokens, width = dims["T"], dims["R"]
    row, queries = dims["L"] + width, 2 * dims["H"] * width
    flops = 3 * tokens * (dims["H"] + 1) * width
    return Cost(bytes=tokens * (row * (itemsize + cache_itemsize) + queries * itemsize + 8 + 4 * width), flops=flops)


@op(
    "c[T, L]:bf16|f16|f32, k_pe[T, R]:c, cache![N, P, L + R]:c|fp8, slots[T]:i64, q_pe!?[T, H, R]:c, positions?[T]:i64, "
    "table?[M, R]:f32 -> ()",
    inputs=_inputs,
    cost=_cost,
    check=lambda call: check_rope(call, "q_pe", "positions", "table"),
)
def store_mla(
    c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    q_pe: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    *,
    interleaved: bool = True,
    kv_scale: float = 1.0,
) -> None:
    """cache[slot // P, slot % P] = [c | RoPE(k_pe)] / kv_scale, q_pe = RoPE(q_pe).

    c: the normalised latent; k_pe: the rotary key that all heads share.
    slots: page * P + offset; -1 writes nothing for that token. Two tokens never share a slot.
    table: cos(R/2) | sin(R/2) per position, as `rope_table` makes it. None: no rotation, and `q_pe` and `positions` must be
        None too.
    kv_scale: value = code * scale; only an fp8 cache uses it.
    Numerics: the rotation is done in fp32 and rounded once, to the type of the cache or of q_pe; fp8 values are clamped first.
    Edges: T = 0 does nothing. A token with slot -1 still has its q_pe rotated.
    Writes: the rows named by `slots`, and q_pe. c and k_pe are not modified.
    Errors: ValueError if only some of q_pe, positions and table are given.
    Source: DeepSeek-V2 technical report 2024, section 2.1.
    """
    if q_pe is not None and positions is not None and table is not None:
        q_pe.copy_(rotate(q_pe, positions, table, interleaved))
        k_pe = rotate(k_pe[:, None], positions, table, interleaved)[:, 0]
    write_rows(cache, slots, torch.cat([c.to(k_pe.dtype), k_pe], -1), kv_scale)
