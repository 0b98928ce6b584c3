# SPDX-License-Identifier: Apache-2.0
"""Weights in the CPU library's own layout give the products of the plain ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.cpu_kernels import gemm as cpu_gemm
from rocm_infer.ops.gemm import gemm
from tests import strategies as data
from tests.close import EPS32, assert_close

pytestmark = pytest.mark.skipif(not cpu_gemm.can_pack(), reason="this CPU or this torch has no packed bf16 layout")
sizes = st.sampled_from([1, 2, 7, 16, 37, 64, 100, 257])


@given(st.sampled_from([0, 1, 2, 8, 31, 33]), sizes, sizes, st.booleans(), data.seeds)
def test_packed_product(rows: int, outs: int, width: int, has_bias: bool, seed: int) -> None:
    x, weight = data.normal((rows, width), seed, torch.bfloat16), data.normal((outs, width), seed + 1, torch.bfloat16)
    bias = data.normal((outs,), seed + 2, torch.bfloat16) if has_bias else None
    packed = cpu_gemm.pack(weight)
    assert (packed.shape, packed.dtype) == (weight.shape, weight.dtype)
    assert packed.is_mkldnn
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    noise = (width + 2) * EPS32 * (x.double().abs() @ weight.double().abs().T + 10)
    assert_close(gemm(x, packed, bias), want, noise=noise, backend="cpu")
