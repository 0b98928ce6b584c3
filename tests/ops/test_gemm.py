# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.gemm import gemm
from tests import strategies as data
from tests.close import EPS32, assert_close

LIBRARY = ("reference", "cpu")  # sums in an order that may depend on the number of rows
num_rows = st.sampled_from([0, 1, 2, 15, 17, 33, 65])
num_columns = st.sampled_from([1, 16, 63, 128, 130, 257])
depths = st.sampled_from([0, 1, 15, 64, 65, 128, 300, 1100])


@given(num_rows, num_columns, depths, data.float_types, st.booleans(), st.booleans(), data.seeds)
def test_agrees_with_float64(backend, device, m, n, k, dtype, with_bias, gaps, seed):
    x, weight = data.normal((m, k), seed, dtype), data.normal((n, k), seed + 1, dtype)
    bias = data.normal((n,), seed + 2, dtype) if with_bias else None
    given_x, given_weight = (data.strided(x, 8, device=device), data.strided(weight, 8, device=device)) if gaps else (x, weight)
    got = gemm.using(backend)(given_x.to(device), given_weight.to(device), None if bias is None else bias.to(device))
    want = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    assert_close(got, want, noise=(k + 2) * EPS32 * size, backend=backend)


@data.few
@given(num_columns, st.sampled_from([64, 1100]), data.float_types, data.seeds)
def test_rows_do_not_know_each_other(backend, device, n, k, dtype, seed):
    """Bit for bit in our kernels; the library behind the reference promises only that nothing leaks from row to row."""
    x, weight = data.normal((20, k), seed, dtype).to(device), data.normal((n, k), seed + 1, dtype).to(device)
    together, alone = gemm.using(backend)(x, weight), gemm.using(backend)(x[3:4].contiguous(), weight)
    if backend in LIBRARY:
        assert_close(together[3:4], alone.double(), roundings=2, noise=1e-4)
    else:
        assert torch.equal(together[3:4], alone)
    x[0] = float("nan")
    assert torch.equal(gemm.using(backend)(x, weight)[1:], together[1:])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"gemm: weight: expected size K = 4 \(from x\), got 5"):
        gemm(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"gemm: bias: expected size N = 3 \(from weight\), got 2"):
        gemm(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2))
