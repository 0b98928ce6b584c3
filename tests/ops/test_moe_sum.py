# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.moe_sum import moe_sum
from tests import strategies as data
from tests.close import EPS32, assert_close

num_terms = st.sampled_from([0, 1, 2, 6, 8, 9])


@given(data.num_tokens, num_terms, data.widths, data.float_types, st.sampled_from([1.0, 2.5]), st.booleans(), data.seeds)
def test_agrees_with_float64(backend, device, rows, terms, width, dtype, scale, added, seed):
    y = data.normal((rows, terms, width), seed, dtype)
    addend = data.normal((rows, width), seed + 1, dtype) if added else None
    got = moe_sum.using(backend)(
        y.to(device), None if addend is None else data.strided(addend, device=device).to(device), scale=scale
    )
    want, size = y.double().sum(1) * scale, y.double().abs().sum(1) * scale
    if addend is not None:
        want, size = want + addend.double(), size + addend.double().abs()
    assert_close(got, want, noise=(terms + 2) * EPS32 * size, backend=backend)


@data.few
@given(data.float_types, data.seeds)
def test_rows_do_not_know_each_other(backend, device, dtype, seed):
    y = data.normal((5, 8, 300), seed, dtype).to(device)
    together = moe_sum.using(backend)(y, scale=2.5)
    assert torch.equal(moe_sum.using(backend)(y[3:4].contiguous(), scale=2.5), together[3:4])
    y[0] = float("nan")
    assert torch.equal(moe_sum.using(backend)(y, scale=2.5)[1:], together[1:])


def test_the_order_of_the_sum_is_that_of_k(backend, device):
    """In this order the large numbers cancel before the small one arrives; in any other it is lost."""
    y = torch.tensor([[[2.0**30], [-(2.0**30)], [1.0], [0.5]]], device=device)
    assert moe_sum.using(backend)(y).item() == 1.5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"moe_sum: addend: expected size C = 4 \(from y\), got 5"):
        moe_sum(torch.zeros(2, 3, 4), torch.zeros(2, 5))
