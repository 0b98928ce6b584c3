# SPDX-License-Identifier: Apache-2.0
"""Write new keys and values into the paged cache, with the rotary embedding of queries and keys on the way."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, op
from rocm_infer.ops._paged import check_rope, rotate, write_rows


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: T, H, G, D, P, and R (0: no rotary embedding). The cache holds 2 * T tokens, each token a random slot."""
    generator = torch.Generator().manual_seed(seed)
    tokens, page, width = dims["T"], dims["P"], dims["R"]
    shape = (-(-2 * tokens // page) + 1, page, dims["G"], dims["D"])
    made: dict[str, Any] = {
        "k": torch.randn(tokens, dims["G"], dims["D"], generator=generator).to(device, dtype),
        "v": torch.randn(tokens, dims["G"], dims["D"], generator=generator).to(device, dtype),
        "k_cache": torch.zeros(shape, dtype=dtype, device=device),
        "v_cache": torch.zeros(shape, dtype=dtype, device=device),
        "slots": torch.randperm(shape[0] * page, generator=generator)[:tokens].to(device),
    }
    if width:
        angle = torch.rand(4096, width // 2, generator=generator) * 6.28
        made["q"] = torch.randn(tokens, dims["H"], dims["D"], generator=generator).to(device, dtype)
        made["positions"] = torch.randint(0, 4096, (tokens,), generator=generator).to(device)
        made["table"] = torch.cat([angle.cos(), angle.sin()], -1).to(device)
    return made


def _cost(dims: dict[str, int], *, itemsize: int = 2, cache_itemsize: int = 2) -> Cost:
    keys = 2 * dims["T"] * dims["G"] * dims["D"]
    rotated = 2 * dims["T"] * dims["H"] * dims["R"] if dims["R"] else 0
    flops = 3 * dims["T"] * (dims["H"] + dims["G"]) * dims["R"]
    return Cost(bytes=keys * (itemsize + cache_itemsize) + rotated * itemsize + dims["T"] * (8 + 4 * dims["R"]), flops=flops)


@op(
    "k[T, G, D]:bf16|f16|f32, v[T, G, Dv]:k, k_cache![N, P, G, D]:k|fp8, v_cache![N, P, G, Dv]:k_cache, slots[T]:i64, "
    "q!?[T, H, D]:k, positions?[T]:i64, table?[L, R]:f32 -> ()",
    inputs=_inputs,
    cost=_cost,
    check=lambda call: check_rope(call, "q", "positions", "table"),
)
def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """k_cache[slot // P, slot % P] = RoPE(k) / k_scale, v_cache the same of v / v_scale, q = RoPE(q).

    slots: page * P + offset; -1 writes nothing for that token. Two tokens never share a slot.
    table: cos(R/2) | sin(R/2) per position, as `rope_table` makes it; rotates the first R of D. None: no rotation, and
        `q` and `positions` must be None too.
    k_scale, v_scale: value = code * scale; only an fp8 cache uses them.
    Numerics: the rotation is done in fp32 and rounded once, to the type of the cache or of q; fp8 values are clamped first.
    Edges: T = 0 does nothing. A token with slot -1 still has its q rotated.
    Writes: the rows named by `slots`, and q. k and v are not modified.
    Errors: ValueError if only some of q, positions and table are given.
    Source: paged cache of Kwon et al. 2023; rotary embedding of Su et al. 2021.
    """
    if q is not None and positions is not None and table is not None:
        q.copy_(rotate(q, positions, table, interleaved))
        k = rotate(k, positions, table, interleaved)
    write_rows(k_cache, slots, k, k_scale)
    write_rows(v_cache, slots, v, v_scale)
