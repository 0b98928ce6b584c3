# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rocm_infer.ops.moe_align import moe_align
from rocm_infer.ops.moe_gemm import moe_gemm
from tests import strategies as data
from tests.close import EPS32, HALF_ULP, assert_close

LIBRARY = ("reference", "cpu")  # sums in an order that may depend on the number of rows, and rounds 16-bit products
half = settings(max_examples=max(4, settings().max_examples // 2))
num_tokens = st.sampled_from([0, 1, 2, 7, 20])
layouts = st.sampled_from([(1, 1), (4, 2), (8, 2), (6, 3)])  # experts, top_k
widths = st.sampled_from([2, 30, 128, 130, 256])
depths = st.sampled_from([1, 63, 128, 130, 256])
blocks = st.sampled_from([16, 32, 64, 128])


def routed(tokens: int, num_experts: int, top_k: int, seed: int, foreign: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k].int()
    if foreign:
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    return ids


def expected(
    x: torch.Tensor,
    w: torch.Tensor,
    ids: torch.Tensor,
    slot_weights: torch.Tensor | None,
    slots_per_row: int,
    silu: bool,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, bound on the noise of fp32 sums of k terms, size of what one more rounding of the product is relative to)."""
    width = w.shape[1] // 2 if silu else w.shape[1]
    want, noise, size = (torch.zeros(ids.numel(), width, dtype=torch.float64) for _ in range(3))
    for slot, expert in enumerate(ids.flatten().tolist()):
        if expert < 0:
            continue
        row = x[slot // slots_per_row]
        product, spread = row @ w[expert].T, (k + 8) * EPS32 * (row.abs() @ w[expert].abs().T)
        if silu:
            gate, up = product.chunk(2)
            gate_spread, up_spread = spread.chunk(2)
            act = gate / (1 + (-gate).exp())
            want[slot] = act * up
            # The derivative of silu never exceeds 1.1.
            noise[slot] = (
                1.1 * gate_spread * (up.abs() + up_spread)
                + act.abs() * up_spread
                + (16 + gate.abs()) * EPS32 * (act * up).abs()
            )
            size[slot] = (1.1 * gate.abs() + act.abs()) * up.abs()
        else:
            want[slot], noise[slot], size[slot] = product, spread, product.abs()
        factor = 1.0 if slot_weights is None else float(slot_weights[slot])
        want[slot], noise[slot], size[slot] = want[slot] * factor, noise[slot] * abs(factor), size[slot] * abs(factor)
    return want, noise + 2 * EPS32 * want.abs(), size


def aligned(ids: torch.Tensor, num_experts: int, block: int, device: str) -> list[torch.Tensor]:
    return [t.to(device) for t in moe_align.fn(ids, num_experts=num_experts, block=block)]


@example(1, (1, 1), 2, 1, 16, torch.bfloat16, True, False, False, 0)  # Triton turns arguments of 1 into constants
@given(num_tokens, layouts, widths, depths, blocks, data.float_types, st.booleans(), st.booleans(), st.booleans(), data.seeds)
def test_agrees_with_float64(backend, device, tokens, layout, width, depth, block, dtype, silu, weighted, foreign, seed):
    num_experts, top_k = layout
    ids = routed(tokens, num_experts, top_k, seed, foreign)
    slots_per_row = top_k if silu else 1
    x = data.normal((tokens * top_k // slots_per_row, depth), seed + 1, dtype)
    w = data.normal((num_experts, width, depth), seed + 2, dtype)
    slot_weights = data.normal((tokens * top_k,), seed + 3) if weighted else None
    for expert in set(range(num_experts)) - set(ids.flatten().tolist()):
        w[expert] = float("nan")  # nobody goes there, so nobody may read it
    got = moe_gemm.using(backend)(
        x.to(device),
        w.to(device),
        *aligned(ids, num_experts, block, device),
        None if slot_weights is None else slot_weights.to(device),
        num_slots=tokens * top_k,
        slots_per_row=slots_per_row,
        silu=silu,
    )
    want, noise, size = expected(x.double(), w.double(), ids, slot_weights, slots_per_row, silu, depth)
    if backend in LIBRARY and dtype != torch.float32:
        noise = noise + 1.1 * HALF_ULP[dtype] * size  # the library's own rounding
    assert_close(got, want, noise=noise, backend=backend)


def fp8_arguments(rows: int, num_experts: int, width: int, depth: int, fp8: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def scale(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.25

    row_blocks, depth_blocks = -(-width // 128), -(-depth // 128)
    return {
        "x": data.normal((rows, depth), seed, fp8, 4.0),
        "w": data.normal((num_experts, width, depth), seed + 1, fp8, 4.0),
        "x_scale": scale(rows, depth_blocks),
        "w_scale": scale(num_experts, row_blocks, depth_blocks),
    }


@half
@given(
    num_tokens,
    layouts,
    st.sampled_from([30, 128, 256, 320]),
    st.sampled_from([64, 128, 200, 384]),
    blocks,
    data.fp8_types,
    st.booleans(),
    st.booleans(),
    data.seeds,
)
def test_fp8_blocks_agree_with_float64(backend, device, tokens, layout, width, depth, block, fp8, silu, weighted, seed):
    num_experts, top_k = layout
    ids = routed(tokens, num_experts, top_k, seed, foreign=seed % 2 == 0)
    slots_per_row = top_k if silu else 1
    rows = tokens * top_k // slots_per_row
    given_ = fp8_arguments(rows, num_experts, width, depth, fp8, seed)
    slot_weights = data.normal((tokens * top_k,), seed + 3) if weighted else None
    k_block = torch.arange(depth) // 128
    x = given_["x"].float().double() * given_["x_scale"].double()[:, k_block]
    w = given_["w"].float().double() * given_["w_scale"].double()[:, torch.arange(width) // 128][:, :, k_block]
    got = moe_gemm.using(backend)(
        given_["x"].to(device),
        given_["w"].to(device),
        *aligned(ids, num_experts, block, device),
        None if slot_weights is None else slot_weights.to(device),
        given_["x_scale"].to(device),
        given_["w_scale"].to(device),
        num_slots=tokens * top_k,
        slots_per_row=slots_per_row,
        silu=silu,
        out_dtype=torch.bfloat16,
    )
    assert got.dtype == torch.bfloat16
    want, noise, _ = expected(x, w, ids, slot_weights, slots_per_row, silu, depth)
    assert_close(got, want, noise=noise, backend=backend)


@data.few
@given(st.sampled_from([16, 64]), st.booleans(), data.seeds)
def test_tokens_do_not_know_each_other(backend, device, block, silu, seed):
    """Token 3 of 20 gets the bits it gets alone, also when all others are NaN."""
    num_experts, top_k, width, depth = 4, 2, 128, 256
    ids = routed(20, num_experts, top_k, seed)
    x = data.normal((20 if silu else 40, depth), seed, torch.bfloat16)
    w = data.normal((num_experts, width, depth), seed + 1, torch.bfloat16).to(device)
    per_row = top_k if silu else 1
    rows = slice(3, 4) if silu else slice(6, 8)

    def run(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        args: dict[str, Any] = {"num_slots": ids.numel(), "slots_per_row": per_row, "silu": silu}
        return moe_gemm.using(backend)(x.to(device), w, *aligned(ids, num_experts, block, device), **args)

    together, alone = run(x, ids)[6:8], run(x[rows], ids[3:4])
    if backend in LIBRARY:
        assert_close(together, alone.double(), roundings=8, noise=1e-2)
    else:
        assert torch.equal(together, alone)
    lonely = torch.full_like(x, float("nan"))
    lonely[rows] = x[rows]
    assert torch.equal(run(lonely, ids)[6:8], together)


def test_wrong_arguments_are_named():
    x, w = torch.zeros(4, 8), torch.zeros(2, 6, 8)
    slots, experts, padded = moe_align.fn(torch.zeros(4, 1, dtype=torch.int32), num_experts=2, block=16)
    options = {"num_slots": 4, "slots_per_row": 1}
    fp8 = torch.float8_e4m3fn
    with pytest.raises(ValueError, match="expected all three for fp8 and no scales otherwise"):
        moe_gemm.using("reference")(x.to(fp8), w.to(fp8), slots, experts, padded, **options)
    with pytest.raises(ValueError, match="moe_gemm: w: expected an even N"):
        moe_gemm.using("reference")(x, torch.zeros(2, 7, 8), slots, experts, padded, silu=True, **options)
    with pytest.raises(ValueError, match="moe_gemm: slot_weights: expected size num_slots = 4, got 3"):
        moe_gemm(x, w, slots, experts, padded, torch.ones(3), **options)
