# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from rocm_infer import arch as archs


@pytest.mark.parametrize("arch", archs.ARCHS.values(), ids=archs.ARCHS)
def test_records_are_plausible(arch):
    assert arch.name in archs.ARCHS
    assert arch.wave in (32, 64)
    assert arch.num_cus % arch.num_xcds == 0
    assert arch.lds_bytes % 1024 == 0
    assert arch.matrix_shapes
    assert 0 < arch.bf16_flops <= (arch.fp8_flops or arch.bf16_flops)
    assert 0.5e12 < arch.bytes_per_s < 10e12


def test_each_dialect_is_native_where_it_should_be():
    fn, fnuz = torch.float8_e4m3fn, torch.float8_e4m3fnuz
    assert [archs.of("gfx942").multiplies(dtype) for dtype in (fn, fnuz, torch.bfloat16)] == [False, True, False]
    assert [archs.of("gfx950").multiplies(dtype) for dtype in (fn, fnuz, torch.bfloat16)] == [True, False, False]
    assert not archs.of("gfx90a").multiplies(fn)


def test_fp8_of_a_device_is_the_dialect_of_its_matrix_cores():
    meta = torch.device("meta")
    for name, arch in archs.ARCHS.items():
        with archs.played_by_meta(arch):
            expected = torch.float8_e4m3fnuz if name == "gfx942" else torch.float8_e4m3fn
            assert archs.fp8_dtype(meta) == arch.fp8_dtype == expected
            assert archs.current(meta) is arch
    assert archs.fp8_dtype(torch.device("cpu")) == archs.fp8_dtype(meta) == torch.float8_e4m3fn
    with pytest.raises(NotImplementedError, match="played_by_meta"):
        archs.current(meta)


def test_an_unknown_architecture_is_named():
    with pytest.raises(NotImplementedError, match=r"arch: expected one of gfx90a, .*, got 'gfx803'"):
        archs.of("gfx803")


def test_the_cpu_plays_a_gfx942():
    assert archs.current(torch.device("cpu")).name == "gfx942"
