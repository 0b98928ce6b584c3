# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.gemm_fp8 import gemm_fp8
from tests import strategies as data
from tests.close import EPS32, assert_close

LIBRARY = ("reference", "cpu")  # sums in an order that may depend on the number of rows
num_rows = st.sampled_from([0, 1, 2, 15, 17, 33, 65])
num_columns = st.sampled_from([1, 16, 127, 128, 130, 257, 576])
depths = st.sampled_from([1, 64, 127, 128, 129, 256, 640, 1100])


def codes_and_scale(rows: int, width: int, row_block: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rand(-(-rows // row_block), -(-width // 128), generator=torch.Generator().manual_seed(seed)) + 0.25
    return data.normal((rows, width), seed + 1, dtype, 8.0), scale


def wide(codes: torch.Tensor, scale: torch.Tensor, row_block: int) -> torch.Tensor:
    rows, width = codes.shape
    return codes.float().double() * scale.double()[torch.arange(rows)[:, None] // row_block, torch.arange(width)[None] // 128]


@given(num_rows, num_columns, depths, data.fp8_types, data.float_types, data.seeds)
def test_agrees_with_float64(backend, device, m, n, k, fp8, out_dtype, seed):
    a, a_scale = codes_and_scale(m, k, 1, fp8, seed)
    b, b_scale = codes_and_scale(n, k, 128, fp8, seed + 7)
    got = gemm_fp8.using(backend)(a.to(device), a_scale.to(device), b.to(device), b_scale.to(device), out_dtype=out_dtype)
    assert got.dtype == out_dtype
    left, right = wide(a, a_scale, 1), wide(b, b_scale, 128)
    noise = (k + 8) * EPS32 * (left.abs() @ right.abs().T)
    assert_close(got, left @ right.T, noise=noise, backend=backend)


@data.few
@given(st.sampled_from([(257, 300), (65, 1100)]), data.fp8_types, data.seeds)
def test_rows_do_not_know_each_other(backend, device, size, fp8, seed):
    n, k = size
    a, a_scale = (t.to(device) for t in codes_and_scale(20, k, 1, fp8, seed))
    b, b_scale = (t.to(device) for t in codes_and_scale(n, k, 128, fp8, seed + 7))
    together = gemm_fp8.using(backend)(a, a_scale, b, b_scale, out_dtype=torch.bfloat16)
    alone = gemm_fp8.using(backend)(a[3:4].contiguous(), a_scale[3:4].contiguous(), b, b_scale, out_dtype=torch.bfloat16)
    if backend in LIBRARY:
        assert_close(together[3:4], alone.double(), roundings=2, noise=1e-3)
    else:
        assert torch.equal(together[3:4], alone)
    a_scale[0] = float("nan")
    again = gemm_fp8.using(backend)(a, a_scale, b, b_scale, out_dtype=torch.bfloat16)
    assert torch.equal(again[1:], together[1:])
    assert again[0].isnan().all()


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=["fn", "fnuz"])
def test_every_code_counts_with_its_value(backend, device, fp8):
    """All finite codes times the identity, exactly; a NaN code makes its own row NaN."""
    every = torch.arange(256, dtype=torch.uint8).view(fp8)
    every = torch.where(every.float().isnan(), torch.tensor(1.0), every.float())
    a = torch.cat([every, torch.full((128,), float("nan"))]).view(3, 128).to(fp8).to(device)
    b, ones = torch.eye(128).to(fp8).to(device), torch.ones(3, 1, device=device)
    got = gemm_fp8.using(backend)(a, ones, b, ones[:1], out_dtype=torch.float32)
    assert torch.equal(got[:2].flatten().cpu(), every)
    assert got[2].isnan().all()


def test_wrong_arguments_are_named():
    a, b = torch.zeros(2, 200).to(torch.float8_e4m3fn), torch.zeros(300, 200).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"gemm_fp8: b_scale: expected size ceil\(N/128\) = 3, got 2"):
        gemm_fp8(a, torch.ones(2, 2), b, torch.ones(2, 2), out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gemm_fp8: b: expected dtype float8_e4m3fn, got"):
        gemm_fp8(a, torch.ones(2, 2), b.to(torch.float8_e4m3fnuz), torch.ones(3, 2), out_dtype=torch.bfloat16)
