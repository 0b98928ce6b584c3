# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.quant_fp8 import LARGEST, dequantise, dequantise_blocks, quant_fp8, to_fnuz
from tests import strategies as data
from tests.close import assert_close

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def value_of(byte: int, dialect: torch.dtype) -> float:
    """What a byte means, from the definition of the format."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if (byte & 0x7F == 0x7F) if dialect == FN else (byte == 0x80):
        return float("nan")
    bias = 7 if dialect == FN else 8
    return sign * (mantissa / 8 * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - bias))


@pytest.mark.parametrize("dialect", [FN, FNUZ], ids=["fn", "fnuz"])
def test_every_code_means_what_the_format_says(dialect):
    want = torch.tensor([value_of(byte, dialect) for byte in range(256)])
    assert torch.equal(ALL_BYTES.view(dialect).float().nan_to_num(12345.0), want.nan_to_num(12345.0))
    assert want.nan_to_num(0).max() == LARGEST[dialect]


@pytest.mark.parametrize("dialect", [FN, FNUZ], ids=["fn", "fnuz"])
def test_every_code_is_found_again(backend, device, dialect):
    """A row that holds all finite codes, times 3: scale is 3 and each value returns to its own code."""
    codes = torch.tensor([byte for byte in range(256) if value_of(byte, dialect) == value_of(byte, dialect)], dtype=torch.uint8)
    values = codes.view(dialect).float() * 3
    got, scale = quant_fp8.using(backend)(values[None].to(device), out_dtype=dialect, group=len(codes))
    assert scale.item() == 3
    assert torch.equal(got.cpu().view(torch.uint8)[0], codes)


@given(data.num_tokens, data.widths, data.float_types, data.fp8_types, st.sampled_from([32, 128, 0]), data.seeds, st.booleans())
def test_each_value_goes_to_the_nearest_code(backend, device, rows, width, dtype, fp8, group, seed, gaps):
    group = group or width
    x = data.normal((rows, width), seed, dtype, 5.0)
    codes, scale = quant_fp8.using(backend)(
        (data.strided(x, device=device) if gaps else x).to(device), out_dtype=fp8, group=group
    )
    codes, scale = codes.cpu(), scale.cpu()
    for start in range(0, width, group):
        largest = x[:, start : start + group].double().abs().amax(-1).clamp(min=1e-4)
        assert_close(scale[:, start // group], largest / LARGEST[fp8], roundings=3, backend=backend, what="scale")
    step = scale.double().repeat_interleave(group, -1)[:, :width]
    noise = step * 2.0**-10 + 2.0**-20 * x.double().abs()  # half the smallest step; the rounding of the quotient
    assert_close(dequantise(codes, scale, group), x.double(), noise=noise, rounded_to=fp8, backend=backend)


@pytest.mark.parametrize("dialect", [FN, FNUZ], ids=["fn", "fnuz"])
def test_edges(backend, device, dialect):
    x = torch.zeros(3, 8)
    x[0, 4], x[1, 5], x[2, :4] = float("nan"), float("inf"), 1e-9
    codes, scale = quant_fp8.using(backend)(x.to(device), out_dtype=dialect, group=4)
    values = dequantise(codes.cpu(), scale.cpu(), 4)
    assert values[:2, :4].abs().max() == 0
    assert values[2].abs().max() <= 1e-6
    assert values[0, 4].isnan()
    assert values[1, 5].isnan()
    assert scale[2, 0].item() == pytest.approx(1e-4 / LARGEST[dialect])


@data.few
@given(data.fp8_types, data.seeds)
def test_rows_and_groups_do_not_know_each_other(backend, device, fp8, seed):
    x = data.normal((3, 256), seed, torch.bfloat16).to(device)
    codes, scale = quant_fp8.using(backend)(x, out_dtype=fp8)
    alone_codes, alone_scale = quant_fp8.using(backend)(x[1:2, 128:].contiguous(), out_dtype=fp8)
    assert torch.equal(codes[1:2, 128:].view(torch.uint8), alone_codes.view(torch.uint8))
    assert torch.equal(scale[1:2, 1:], alone_scale)


def test_conversion_to_fnuz_keeps_every_value():
    finite = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]
    scale = torch.tensor([[0.375]])
    codes, doubled = to_fnuz(finite.view(FN)[None], scale)
    assert codes.dtype == FNUZ
    assert torch.equal(codes.float() * doubled, finite.view(FN).float()[None] * scale)
    assert not codes.float().isnan().any()
    assert codes.view(torch.uint8)[finite[None] == 0x80].tolist() == [0]


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_conversion_refuses_nan(byte):
    with pytest.raises(ValueError, match="to_fnuz: codes: expected finite values, got 1 NaN"):
        to_fnuz(torch.tensor([[1, byte]], dtype=torch.uint8).view(FN), torch.ones(1, 1))
    with pytest.raises(ValueError, match="to_fnuz: codes: expected dtype float8_e4m3fn"):
        to_fnuz(torch.zeros(1, 1).to(FNUZ), torch.ones(1, 1))


@given(st.sampled_from([1, 127, 128, 129, 576]), st.sampled_from([1, 128, 300]), data.fp8_types, data.seeds)
def test_blocks_of_a_weight(num_rows, width, fp8, seed):
    codes = data.normal((num_rows, width), seed, fp8, 30.0)
    scale = torch.rand(-(-num_rows // 128), -(-width // 128), generator=torch.Generator().manual_seed(seed))
    got = dequantise_blocks(codes, scale)
    for n, k in ((0, 0), (num_rows - 1, 0), (0, width - 1), (num_rows - 1, width - 1), (num_rows // 2, width // 2)):
        assert got[n, k] == codes[n, k].float() * scale[n // 128, k // 128]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="fp8 output: expected group > 0, got -1"):
        quant_fp8.using("reference")(torch.zeros(2, 4), out_dtype=FN, group=-1)
    with pytest.raises(ValueError, match="quant_fp8: x: expected dtype bfloat16 or float16 or float32"):
        quant_fp8(torch.zeros(2, 4, dtype=torch.float64), out_dtype=FN)
