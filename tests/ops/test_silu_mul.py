# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.quant_fp8 import dequantise
from rocm_infer.ops.silu_mul import silu_mul
from tests import strategies as data
from tests.close import EPS32, assert_close


def expected(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def noise(x: torch.Tensor) -> torch.Tensor:
    """The exponential of a gate is off by a few ulps of fp32, plus the rounding of its argument."""
    gate, _ = x.double().chunk(2, -1)
    return (8 + 2 * gate.abs()) * EPS32 * expected(x).abs()


@given(data.num_tokens, data.widths, data.float_types, data.seeds, st.booleans())
def test_agrees_with_float64(backend, device, rows, width, dtype, seed, gaps):
    x = data.normal((rows, 2 * width), seed, dtype, 4.0)
    got = silu_mul.using(backend)((data.strided(x, device=device) if gaps else x).to(device))
    assert_close(got, expected(x), noise=noise(x), backend=backend)


@given(data.num_tokens, data.widths, data.fp8_types, st.sampled_from([64, 128, 0]), data.seeds)
def test_fp8_output_is_the_rounded_fp32_row(backend, device, rows, width, fp8, group, seed):
    group = group or width
    x = data.normal((rows, 2 * width), seed, torch.bfloat16, 4.0)
    codes, scale = silu_mul.using(backend)(x.to(device), group=group, out_dtype=fp8)
    assert codes.dtype == fp8
    assert scale.shape == (rows, -(-width // group))
    step = scale.double().cpu().repeat_interleave(group, -1)[:, :width]
    bound = step * 2.0**-10 + 2.0**-19 * expected(x).abs()
    assert_close(dequantise(codes.cpu(), scale.cpu(), group), expected(x), noise=bound, rounded_to=fp8, backend=backend)


def test_far_from_zero(backend, device):
    gate = torch.tensor([-1000.0, -100.0, -0.0, 0.0, 100.0, 1000.0])
    got = silu_mul.using(backend)(torch.cat([gate, torch.full((6,), 2.0)])[None].to(device))
    assert_close(got, torch.tensor([[0.0, -200 * 2.0**-144, 0.0, 0.0, 200.0, 2000.0]]).double(), noise=1e-37, backend=backend)


def test_nan_stays_in_its_element(backend, device):
    x = torch.ones(2, 8)
    x[0, 1], x[1, 6] = float("nan"), float("nan")
    got = silu_mul.using(backend)(x.to(device)).cpu()
    assert got.isnan().nonzero().tolist() == [[0, 1], [1, 2]]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="silu_mul: x: expected an even row length, gate and up side by side, got 7"):
        silu_mul.using("reference")(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="expected out_dtype float8_e4m3fn or float8_e4m3fnuz, got None"):
        silu_mul.using("reference")(torch.zeros(2, 8), group=4)
