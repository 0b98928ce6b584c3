# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product with weights laid out for vectors: as a CPU reads them."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, op
from rocm_infer.ops.gemm_packed import pack, unpack
from rocm_infer.ops.moe_gemm import moe_gemm


def pack_experts(weight: torch.Tensor, lanes: int, silu: bool) -> torch.Tensor:
    """[..., N, K] -> panels as `pack` makes them; with silu those of the gate, N / 2 columns, then those of up."""
    if not silu:
        return pack(weight, lanes)
    return pack(weight.unflatten(-2, (2, -1)), lanes).flatten(-5, -4)


def unpack_experts(packed: torch.Tensor, columns: int, depth: int, silu: bool) -> torch.Tensor:
    """What `pack_experts` was given."""
    if not silu:
        return unpack(packed, columns, depth)
    return unpack(packed.unflatten(-4, (2, -1)), columns, depth).flatten(-3, -2)


def _inputs(
    dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, silu: bool = False, seed: int = 0
) -> dict[str, Any]:
    """dims: as for `moe_gemm`, and L."""
    made = moe_gemm.inputs(dims, device=device, dtype=dtype, silu=silu, seed=seed)
    weight = pack_experts(made.pop("w"), dims["L"], silu)
    made.pop("out_dtype")
    return {**made, "weight": weight, "columns": dims["N"] // 2 if silu else dims["N"]}


def _cost(dims: dict[str, int], *, itemsize: int = 2, silu: bool = False) -> Cost:
    return moe_gemm.cost(dims, itemsize=itemsize, out_itemsize=itemsize, silu=silu)


@op(
    "x[R, K]:bf16|f16|f32, weight[E, (1 + silu)*ceil(columns/L), ceil(K/S), L, S]:x, sorted_slots[Z]:i32, "
    "block_experts[Y]:i32, num_padded[1]:i32, slot_weights?[num_slots]:f32 -> y[num_slots, columns]:x",
    inputs=_inputs,
    cost=_cost,
    order=("reference",),
)
def moe_gemm_packed(
    x: torch.Tensor,
    weight: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded: torch.Tensor,
    slot_weights: torch.Tensor | None = None,
    *,
    columns: int,
    num_slots: int,
    slots_per_row: int,
    silu: bool = False,
) -> torch.Tensor:
    """`moe_gemm` with the weights as `pack_experts` lays them out.

    columns: of y; with silu the weight has twice as many.
    Numerics: fp32 accumulation in the order of K for every slot alike, one rounding at the end; the reference rounds 16-bit
        products once more, before the activation.
    Edges: as `moe_gemm`.
    """
    plain = unpack_experts(weight, columns, x.shape[1], silu)
    arguments = (x, plain, sorted_slots, block_experts, num_padded, slot_weights)
    return moe_gemm.fn(*arguments, num_slots=num_slots, slots_per_row=slots_per_row, silu=silu)
