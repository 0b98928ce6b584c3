# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.cpu_kernels._library import lanes
from rocm_infer.ops.gemm_packed import gemm_packed, pack, unpack
from tests import strategies as data
from tests.close import EPS32, assert_close

num_rows = st.sampled_from([0, 1, 2, 5, 6, 7, 15, 33, 65])
num_columns = st.sampled_from([1, 15, 16, 63, 64, 65, 130, 257, 768])
depths = st.sampled_from([0, 1, 2, 15, 64, 65, 300, 1100])
types = st.sampled_from([torch.bfloat16, torch.float32])


@given(num_columns, depths, data.float_types, st.sampled_from([1, 4, 8, 16]), data.seeds)
def test_unpack_gives_back_what_was_packed(backend, n, k, dtype, width, seed):
    weight = data.normal((3, n, k), seed, dtype)
    packed = pack(weight, width)
    assert packed.shape == (3, -(-n // width), -(-k * dtype.itemsize // 4), width, 4 // dtype.itemsize)
    assert torch.equal(unpack(packed, n, k), weight)
    if n and k:
        assert (
            packed[2, (n - 1) // width, (k - 1) * dtype.itemsize // 4, (n - 1) % width].flatten()[
                (k - 1) % (4 // dtype.itemsize)
            ]
            == (weight[2, n - 1, k - 1])
        )


@given(num_rows, num_columns, depths, types, st.booleans(), st.booleans(), data.seeds)
def test_agrees_with_float64(backend, device, m, n, k, dtype, with_bias, gaps, seed):
    x, weight = data.normal((m, k), seed, dtype), data.normal((n, k), seed + 1, dtype)
    bias = data.normal((n,), seed + 2, dtype) if with_bias else None
    given_x = data.strided(x, 8) if gaps else x
    packed = pack(weight, lanes() or 16).to(device)
    got = gemm_packed.using(backend)(given_x.to(device), packed, None if bias is None else bias.to(device), columns=n)
    want = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    assert_close(got, want, noise=(k + 2) * EPS32 * size, backend=backend)


@data.few
@given(num_columns, st.sampled_from([64, 1101]), types, st.integers(2, 40), data.seeds)
def test_rows_do_not_know_each_other(backend, device, n, k, dtype, m, seed):
    """Bit for bit in the CPU kernel, in any number of rows; the library behind the reference promises only that nothing leaks."""
    x, weight = data.normal((m, k), seed, dtype).to(device), data.normal((n, k), seed + 1, dtype)
    packed = pack(weight, lanes() or 16).to(device)
    run = gemm_packed.using(backend)
    together = run(x, packed, columns=n)
    if backend == "reference":
        assert_close(together[1:2], run(x[1:2].contiguous(), packed, columns=n).double(), roundings=2, noise=1e-4)
    else:
        for row in range(m):
            assert torch.equal(together[row : row + 1], run(x[row : row + 1].contiguous(), packed, columns=n))
    x[0] = float("nan")
    assert torch.equal(run(x, packed, columns=n)[1:], together[1:])


def test_wrong_arguments_are_named(backend):
    packed = pack(torch.zeros(20, 8), lanes() or 16)
    with pytest.raises(ValueError, match=r"gemm_packed: weight: expected size ceil\(K/S\) = 9, got 8"):
        gemm_packed.using(backend)(torch.zeros(2, 9), packed, columns=20)
    with pytest.raises(ValueError, match="gemm_packed: bias: expected size columns = 20, got 19"):
        gemm_packed.using(backend)(torch.zeros(2, 8), packed, torch.zeros(19), columns=20)


def test_panels_of_another_machine_are_refused():
    if not lanes():
        pytest.skip("no C++ compiler for the CPU library")
    packed = pack(torch.ones(20, 8), 2 * lanes())
    _, backend, reason = gemm_packed.plan("auto", torch.ones(2, 8), packed, columns=20)
    assert backend == "reference"
    assert "weight: expected panels of L, S" in reason
    assert torch.equal(gemm_packed(torch.ones(2, 8), packed, columns=20), torch.full((2, 20), 8.0))
