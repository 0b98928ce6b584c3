# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.quant_fp8 import LARGEST, dequantise
from rocm_infer.ops.rms_norm import rms_norm
from tests import strategies as data
from tests.close import EPS32, assert_close


def expected(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@given(data.num_tokens, data.widths, data.float_types, data.seeds, st.sampled_from([1e-5, 1e-6]), st.booleans())
def test_agrees_with_float64(backend, device, rows, width, dtype, seed, eps, gaps):
    x, weight = data.normal((rows, width), seed, dtype, 3.0), data.normal((width,), seed + 1, dtype)
    given_x = data.strided(x, device=device) if gaps else x
    got = rms_norm.using(backend)(given_x.to(device), weight.to(device), eps=eps)
    want = expected(x, weight, eps)
    assert_close(got, want, noise=8 * EPS32 * want.abs(), backend=backend)


@given(data.num_tokens, data.widths, data.fp8_types, st.sampled_from([64, 128, 0]), data.seeds)
def test_fp8_output_is_the_rounded_fp32_row(backend, device, rows, width, fp8, group, seed):
    group = group or width
    x, weight = data.normal((rows, width), seed, torch.bfloat16), data.normal((width,), seed + 1, torch.bfloat16)
    codes, scale = rms_norm.using(backend)(x.to(device), weight.to(device), eps=1e-6, group=group, out_dtype=fp8)
    assert codes.dtype == fp8
    assert scale.shape == (rows, -(-width // group))
    want = expected(x, weight, 1e-6)
    step = scale.double().cpu().repeat_interleave(group, -1)[:, :width]
    # Half an ulp of the code, or half the smallest subnormal step near zero; the scale itself is rounded to fp32.
    noise = step * 2.0**-10 + 2.0**-20 * want.abs()
    assert_close(dequantise(codes.cpu(), scale.cpu(), group), want, noise=noise, rounded_to=fp8, backend=backend)
    if rows and width:
        assert (codes.float().abs() <= LARGEST[fp8]).all()


@data.few
@given(data.widths, data.float_types, data.seeds)
def test_rows_do_not_know_each_other(backend, device, width, dtype, seed):
    x, weight = data.normal((5, width), seed, dtype).to(device), data.normal((width,), seed + 1, dtype).to(device)
    together = rms_norm.using(backend)(x, weight, eps=1e-6)
    alone = rms_norm.using(backend)(x[3:4].contiguous(), weight, eps=1e-6)
    assert torch.equal(together[3:4], alone)
    x[0] = float("nan")
    assert torch.equal(rms_norm.using(backend)(x, weight, eps=1e-6)[1:], together[1:])


def test_wrong_arguments_are_named():
    x, weight = torch.zeros(3, 8), torch.zeros(9)
    with pytest.raises(ValueError, match=r"rms_norm: weight: expected size C = 8 \(from x\), got 9"):
        rms_norm(x, weight, eps=1e-6)
    with pytest.raises(ValueError, match=r"rms_norm: weight: expected dtype float32, got torch\.float64"):
        rms_norm(x, torch.zeros(8, dtype=torch.float64), eps=1e-6)
    with pytest.raises(ValueError, match="rms_norm: x: expected 2 dimensions"):
        rms_norm(x[0], weight, eps=1e-6)
    with pytest.raises(TypeError, match=r"rms_norm: missing arguments \['eps'\]"):
        rms_norm(x, torch.zeros(8))
    with pytest.raises(ValueError, match="expected out_dtype float8_e4m3fn or float8_e4m3fnuz, got None"):
        rms_norm.using("reference")(x, torch.zeros(8), eps=1e-6, group=8, out_dtype=None)


def test_a_backend_that_cannot_serve_raises():
    with pytest.raises(NotImplementedError, match="rms_norm: backend 'cuda' cannot serve this call: unknown backend"):
        rms_norm.using("cuda")(torch.zeros(3, 8), torch.zeros(8), eps=1e-6)
