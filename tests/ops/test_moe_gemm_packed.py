# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.cpu_kernels._library import lanes
from rocm_infer.ops.moe_gemm_packed import moe_gemm_packed, pack_experts, unpack_experts
from tests import strategies as data
from tests.close import HALF_ULP, assert_close
from tests.ops.test_moe_gemm import aligned, expected, layouts, num_tokens, routed

types = st.sampled_from([torch.bfloat16, torch.float32])
columns = st.sampled_from([1, 16, 63, 64, 65, 130])
depths = st.sampled_from([1, 63, 128, 257])
blocks = st.sampled_from([16, 64])


@given(st.booleans(), columns, depths, data.float_types, data.seeds)
def test_unpack_gives_back_what_was_packed(backend, silu, n, k, dtype, seed):
    weight = data.normal((3, 2 * n if silu else n, k), seed, dtype)
    assert torch.equal(unpack_experts(pack_experts(weight, 16, silu), n, k, silu), weight)


@given(num_tokens, layouts, columns, depths, blocks, types, st.booleans(), st.booleans(), st.booleans(), data.seeds)
def test_agrees_with_float64(backend, device, tokens, layout, n, k, block, dtype, silu, weighted, foreign, seed):
    num_experts, top_k = layout
    ids = routed(tokens, num_experts, top_k, seed, foreign)
    slots_per_row = top_k if silu else 1
    x = data.normal((tokens * top_k // slots_per_row, k), seed + 1, dtype)
    w = data.normal((num_experts, 2 * n if silu else n, k), seed + 2, dtype)
    slot_weights = data.normal((tokens * top_k,), seed + 3) if weighted else None
    got = moe_gemm_packed.using(backend)(
        data.strided(x).to(device),
        pack_experts(w, lanes() or 16, silu).to(device),
        *aligned(ids, num_experts, block, device),
        None if slot_weights is None else slot_weights.to(device),
        columns=n,
        num_slots=tokens * top_k,
        slots_per_row=slots_per_row,
        silu=silu,
    )
    want, noise, size = expected(x.double(), w.double(), ids, slot_weights, slots_per_row, silu, k)
    extra = 2 * HALF_ULP[dtype] * size if backend == "reference" else 0.0  # the library rounds the product once more
    assert_close(got, want, noise=noise + extra, backend=backend)


@data.few
@given(layouts, types, st.integers(2, 20), st.booleans(), data.seeds)
def test_tokens_do_not_know_each_other(backend, device, layout, dtype, tokens, silu, seed):
    """Bit for bit in the CPU kernel: an expert's other rows change nothing."""
    num_experts, top_k = layout
    ids = routed(tokens, num_experts, top_k, seed)
    x, w = data.normal((tokens, 128), seed + 1, dtype), data.normal((num_experts, 96, 128), seed + 2, dtype)
    packed = pack_experts(w, lanes() or 16, silu).to(device)

    def run(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        plan = aligned(chosen, num_experts, 16, device)
        sizes = {"columns": 48 if silu else 96, "num_slots": chosen.numel(), "slots_per_row": top_k}
        return moe_gemm_packed.using(backend)(rows.to(device), packed, *plan, silu=silu, **sizes)

    together, alone = run(x, ids)[top_k : 2 * top_k], run(x[1:2].contiguous(), ids[1:2].contiguous())
    if backend == "reference":
        assert_close(together, alone.double(), roundings=3, noise=1e-3)
    else:
        assert torch.equal(together, alone)
    x[0] = float("nan")
    assert torch.equal(run(x, ids)[top_k : 2 * top_k], together)
