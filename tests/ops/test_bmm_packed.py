# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.cpu_kernels._library import lanes
from rocm_infer.ops.bmm_packed import bmm_packed
from rocm_infer.ops.gemm_packed import pack
from tests import strategies as data
from tests.close import EPS32, assert_close

types = st.sampled_from([torch.bfloat16, torch.float32])


@given(
    st.sampled_from([0, 1, 6, 7, 33]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([1, 64, 65, 130, 512]),
    st.sampled_from([0, 1, 63, 64, 128]),
    types,
    data.seeds,
)
def test_agrees_with_float64(backend, device, m, heads, n, k, dtype, seed):
    """x is a part of wider rows, as the queries of latent attention are."""
    whole, weight = data.normal((m, heads, k + 16), seed, dtype), data.normal((heads, n, k), seed + 1, dtype)
    x = whole[..., :k].to(device)
    got = bmm_packed.using(backend)(x, pack(weight, lanes() or 16).to(device), columns=n)
    want = torch.einsum("mhk,hnk->mhn", x.double().cpu(), weight.double())
    size = torch.einsum("mhk,hnk->mhn", x.double().abs().cpu(), weight.double().abs())
    assert_close(got, want, noise=(k + 2) * EPS32 * size, backend=backend)


@data.few
@given(st.sampled_from([64, 130]), types, st.integers(2, 20), data.seeds)
def test_rows_do_not_know_each_other(backend, device, n, dtype, m, seed):
    x, weight = data.normal((m, 3, 96), seed, dtype).to(device), data.normal((3, n, 96), seed + 1, dtype)
    packed, run = pack(weight, lanes() or 16).to(device), bmm_packed.using(backend)
    together, alone = run(x, packed, columns=n), run(x[1:2].contiguous(), packed, columns=n)
    if backend == "reference":
        assert_close(together[1:2], alone.double(), roundings=2, noise=1e-4)
    else:
        assert torch.equal(together[1:2], alone)
    x[0] = float("nan")
    assert torch.equal(run(x, packed, columns=n)[1:], together[1:])
