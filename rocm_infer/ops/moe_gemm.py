# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product: every row meets the weight of its expert, over slots sorted by `moe_align`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from rocm_infer.ops._op import FP8, Call, Cost, op
from rocm_infer.ops.gemm_fp8 import random_blocks
from rocm_infer.ops.moe_align import moe_align
from rocm_infer.ops.quant_fp8 import BLOCK, dequantise, dequantise_blocks, quantise


def _inputs(
    dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, silu: bool = False, seed: int = 0
) -> dict[str, Any]:
    """dims: T tokens, E, N, K, top_k, block. silu: the first product of an expert layer, else the second, with weights."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = dims["T"] * dims["top_k"]
    ids = torch.rand(dims["T"], dims["E"], generator=generator).argsort(-1)[:, : dims["top_k"]].int()
    slots, experts, num_padded = moe_align.fn(ids, num_experts=dims["E"], block=dims["block"])
    x = torch.randn(dims["T"] if silu else num_slots, dims["K"], generator=generator)
    made: dict[str, Any] = {"sorted_slots": slots, "block_experts": experts, "num_padded": num_padded}
    if dtype in FP8:
        made["x"], made["x_scale"] = quantise(x, dtype, BLOCK)
        shape = (dims["E"], dims["N"], dims["K"])
        made["w"], made["w_scale"] = random_blocks(shape, dtype, generator, max(dims["K"], 1) ** -0.5)
    else:
        made["x"] = x.to(dtype)
        weight = torch.randn(dims["E"], dims["N"], dims["K"], generator=generator) / max(dims["K"], 1) ** 0.5
        made["w"] = weight.to(dtype)
    if not silu:
        made["slot_weights"] = torch.rand(num_slots, generator=generator)
    scalars = {"num_slots": num_slots, "slots_per_row": dims["top_k"] if silu else 1, "silu": silu}
    out_dtype = torch.bfloat16 if dtype in FP8 else None
    return {**{name: tensor.to(device) for name, tensor in made.items()}, **scalars, "out_dtype": out_dtype}


def _cost(dims: dict[str, int], *, itemsize: int = 2, out_itemsize: int = 2, silu: bool = False) -> Cost:
    """Weights of experts that can have been chosen are read once: min(E, slots) of them."""
    slots, n, k = dims["T"] * dims["top_k"], dims["N"], dims["K"]
    read = min(dims["E"], slots) * n * k + (dims["T"] if silu else slots) * k
    return Cost(bytes=read * itemsize + slots * (n // 2 if silu else n) * out_itemsize, flops=2 * slots * n * k)


def _owned(
    sorted_slots: torch.Tensor, block_experts: torch.Tensor, num_padded: torch.Tensor, num_slots: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, its slots) for every expert that has any; -1 for slots that nobody owns."""
    if not block_experts.numel():
        return
    block = sorted_slots.numel() // block_experts.numel()
    used = int(num_padded) // block
    experts, counts = torch.unique_consecutive(block_experts[:used], return_counts=True)
    parts = sorted_slots[: used * block].split((counts * block).tolist())
    for expert, slots in zip(experts.tolist(), parts):
        yield expert, slots[slots < num_slots].long()


def _check(call: Call) -> str | None:
    is_fp8, n = call.dtypes["x"] in FP8, call.dims["N"]
    scales = [name in call.dtypes for name in ("x_scale", "w_scale")]
    if any(given != is_fp8 for given in scales) or (is_fp8 and call.scalars["out_dtype"] is None):
        return "x_scale, w_scale, out_dtype: expected all three for fp8 and no scales otherwise"
    if call.scalars["silu"] and n % 2:
        return f"w: expected an even N, gate and up one after the other, got {n}"
    return None


@op(
    "x[R, K]:bf16|f16|f32|fp8, w[E, N, K]:x, sorted_slots[Z]:i32, block_experts[Y]:i32, num_padded[1]:i32, "
    "slot_weights?[num_slots]:f32, x_scale?[R, ceil(K/128)]:f32, w_scale?[E, ceil(N/128), ceil(K/128)]:f32 "
    "-> y[num_slots, N//2 if silu else N]:out_dtype or x",
    inputs=_inputs,
    cost=_cost,
    check=_check,
)
def moe_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded: torch.Tensor,
    slot_weights: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    *,
    num_slots: int,
    slots_per_row: int,
    silu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y[s] = slot_weights[s] * act(x[s // slots_per_row] @ w[expert of s]^T).

    sorted_slots, block_experts, num_padded: from `moe_align`. slots_per_row: top_k for the first product of an expert layer,
        whose x has a row per token; 1 for the second, whose x has a row per slot.
    silu: act(g | u) = silu(g) * u over the two halves of N; otherwise act is the identity.
    x_scale, w_scale: both for fp8, groups of 128 and blocks of 128x128 as in `gemm_fp8`; None otherwise.
    out_dtype: type of y, by default that of x; required for fp8.
    Numerics: fp32 accumulation, scales in fp32 once per 128 of K, one rounding at the end. With 16-bit x the reference uses
        the library product, which rounds to x's type once more, before act.
    Edges: slots in blocks of expert -1 give zeros. Experts without slots are not read. num_slots = 0 gives an empty output.
    Errors: ValueError if scales or out_dtype do not fit the type of x, or N is odd with silu.
    Source: Gale et al. 2022 (grouped products over sorted tokens); Shazeer 2020 (SwiGLU).
    """
    width = w.shape[1] // 2 if silu else w.shape[1]
    y = torch.zeros(num_slots, width, dtype=out_dtype or x.dtype, device=x.device)
    for expert, slots in _owned(sorted_slots, block_experts, num_padded, num_slots):
        if expert < 0:
            continue
        rows = torch.div(slots, slots_per_row, rounding_mode="floor")
        if x_scale is not None and w_scale is not None:
            product = dequantise(x[rows], x_scale[rows], BLOCK) @ dequantise_blocks(w[expert], w_scale[expert]).T
        else:
            product = F.linear(x[rows], w[expert]).float()
        if silu:
            gate, up = product.chunk(2, -1)
            product = F.silu(gate) * up
        if slot_weights is not None:
            product = product * slot_weights[slots, None]
        y[slots] = product.to(y.dtype)
    return y
