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
    assert 0 <= arch.bf16_flops <= (arch.fp8_flops or arch.bf16_flops)


def test_each_dialect_is_native_where_it_should_be():
    fn, fnuz = torch.float8_e4m3fn, torch.float8_e4m3fnuz
    assert [archs.of("gfx942").multiplies(dtype) for dtype in (fn, fnuz, torch.bfloat16)] == [False, True, False]
    assert [archs.of("gfx950").multiplies(dtype) for dtype in (fn, fnuz, torch.bfloat16)] == [True, False, False]
    assert not archs.of("gfx90a").multiplies(fn)


def test_an_unknown_architecture_is_named():
    with pytest.raises(NotImplementedError, match=r"arch: expected one of gfx90a, .*, got 'gfx803'"):
        archs.of("gfx803")


def test_the_cpu_plays_a_gfx942():
    assert archs.current(torch.device("cpu")).name == "gfx942"
