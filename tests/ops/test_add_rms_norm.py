# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.add_rms_norm import add_rms_norm
from rocm_infer.ops.quant_fp8 import dequantise
from tests import strategies as data
from tests.close import EPS32, assert_close


def normalised(total: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return total / (total.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def arguments(rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual = data.normal((rows, width), seed, dtype), data.normal((rows, width), seed + 1, dtype, 3.0)
    return x, residual, data.normal((width,), seed + 2, dtype)


@given(data.num_tokens, data.widths, data.float_types, data.seeds, st.sampled_from([1e-5, 1e-6]), st.booleans())
def test_agrees_with_float64(backend, device, rows, width, dtype, seed, eps, gaps):
    x, residual, weight = arguments(rows, width, dtype, seed)
    total = x.double() + residual.double()
    given_x, given_residual = (
        (data.strided(x, device=device), data.strided(residual, device=device)) if gaps else (x, residual.clone())
    )
    given_x, given_residual = given_x.to(device), given_residual.to(device)
    got = add_rms_norm.using(backend)(given_x, given_residual, weight.to(device), eps=eps)
    want = normalised(total, weight, eps)
    # The sum is off by half an ulp of fp32 before it is normalised; elements are of different size than their row.
    noise = (
        8 * EPS32 * (want.abs() + (x.double().abs() + residual.double().abs()) / total.pow(2).mean(-1, True).add(eps).sqrt())
    )
    assert_close(got, want, noise=noise * weight.double().abs().clamp(min=1), backend=backend)
    assert_close(given_residual, total, noise=EPS32 * total.abs(), backend=backend, what="residual")
    assert torch.equal(given_x.cpu(), x)


@given(st.sampled_from([1, 3, 17]), st.sampled_from([64, 257, 512]), data.fp8_types, st.sampled_from([128, 0]), data.seeds)
def test_fp8_output_is_the_rounded_fp32_row(backend, device, rows, width, fp8, group, seed):
    x, residual, weight = arguments(rows, width, torch.bfloat16, seed)
    want = normalised(x.double() + residual.double(), weight, 1e-6)
    group = group or width
    codes, scale = add_rms_norm.using(backend)(
        x.to(device), residual.to(device), weight.to(device), eps=1e-6, group=group, out_dtype=fp8
    )
    assert codes.dtype == fp8
    step = scale.double().cpu().repeat_interleave(group, -1)[:, :width]
    noise = step * 2.0**-10 + 2.0**-20 * want.abs() + 2.0**-20 * weight.double().abs()
    assert_close(dequantise(codes.cpu(), scale.cpu(), group), want, noise=noise, rounded_to=fp8, backend=backend)


def test_what_is_normalised_was_not_rounded(backend, device):
    """Three sums of 1 + 2^-8 are stored as 1, yet they make the norm of the row large enough to move the fourth element."""
    x = torch.tensor([[2.0**-8, 2.0**-8, 2.0**-8, 0.0]], dtype=torch.bfloat16, device=device)
    residual = torch.ones(1, 4, dtype=torch.bfloat16, device=device)
    got = add_rms_norm.using(backend)(x, residual, torch.ones_like(x[0]), eps=1e-6)
    assert residual.tolist() == [[1.0] * 4]
    assert got[0, 3].item() == 1 - 2.0**-8


@data.few
@given(data.widths, data.float_types, data.seeds)
def test_rows_do_not_know_each_other(backend, device, width, dtype, seed):
    x, residual, weight = (t.to(device) for t in arguments(5, width, dtype, seed))
    residuals = [residual.clone() for _ in range(3)]
    together = add_rms_norm.using(backend)(x, residuals[0], weight, eps=1e-6)
    alone = residuals[1][3:4]
    assert torch.equal(together[3:4], add_rms_norm.using(backend)(x[3:4].contiguous(), alone, weight, eps=1e-6))
    assert torch.equal(residuals[0][3:4], alone)
    x[0] = float("inf")
    assert torch.equal(add_rms_norm.using(backend)(x, residuals[2], weight, eps=1e-6)[1:], together[1:])


def test_wrong_arguments_are_named():
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual: expected size T = 3 \(from x\), got 2"):
        add_rms_norm(x, torch.zeros(2, 8), weight, eps=1e-6)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual: expected dtype float32, got torch\.float16"):
        add_rms_norm(x, torch.zeros(3, 8).half(), weight, eps=1e-6)
