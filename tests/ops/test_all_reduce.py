# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.all_reduce import WORLD_SIZES, all_reduce, region_bytes
from tests import strategies as data
from tests.close import EPS32, assert_close

worlds = st.sampled_from(WORLD_SIZES)
shots = st.sampled_from([0, 1, 2])
num_vectors = st.sampled_from([0, 1, 2, 7, 64, 65, 129, 300])


class Group:
    """Regions of `world` ranks, and what they hold."""

    def __init__(self, world: int, max_bytes: int, device: str) -> None:
        self.world = world
        self.shared = torch.zeros(world, region_bytes(max_bytes), dtype=torch.uint8, device=device)
        self.regions = torch.tensor([row.data_ptr() for row in self.shared], device=device)

    def reduce(self, backend, x, **scalars):
        return all_reduce.using(backend)(x, self.shared, self.regions, **scalars)


def rows(world: int, width: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    return data.normal((world, width), seed, dtype).to(device)


def in_order(x: torch.Tensor) -> torch.Tensor:
    """The sum in fp32, rank after rank: what every rank must have, to the bit."""
    total = x[0].float()
    for row in x[1:]:
        total += row.float()
    return total.to(x.dtype).expand_as(x)


@given(worlds, num_vectors, data.float_types, shots, data.seeds)
def test_agrees_with_float64_and_all_ranks_with_each_other(backend, device, world, vectors, dtype, shots, seed):
    x = rows(world, vectors * 16 // dtype.itemsize, dtype, seed, device)
    got = Group(world, vectors * 16, device).reduce(backend, x, shots=shots)
    exact = x.double().sum(0, keepdim=True).expand_as(x)
    assert_close(got, exact, noise=world * EPS32 * x.double().abs().sum(0), backend=backend, what="sum")
    assert torch.equal(got, in_order(x))


@pytest.mark.parametrize(("world", "width"), [(8, 16 * 7168), (4, 3 * 8192), (2, 8192)])
def test_real_sizes(backend, device, world, width):
    """DeepSeek-V3 at TP 8 with 16 tokens, Llama 70B at TP 4 and TP 2: above and below the border between the shots."""
    x = rows(world, width, torch.bfloat16, width, device)
    assert torch.equal(Group(world, 2 * width, device).reduce(backend, x), in_order(x))


@data.few
@given(worlds, st.lists(st.tuples(num_vectors, shots), min_size=4, max_size=8), data.seeds)
def test_a_region_serves_call_after_call(backend, device, world, calls, seed):
    """Sizes and shots change between calls, and with them the number of blocks that count."""
    group = Group(world, 300 * 16, device)
    for number, (vectors, shot) in enumerate(calls):
        x = rows(world, vectors * 4, torch.float32, seed + number, device)
        assert torch.equal(group.reduce(backend, x, shots=shot), in_order(x)), f"call {number} of {calls}"


@data.few
@given(data.seeds)
def test_inputs_are_left_alone_and_nan_stays_where_it_is(backend, device, seed):
    x = data.strided(rows(4, 264, torch.bfloat16, seed), gap=8, device=device)
    x[2, 17] = float("nan")
    before = x.clone()
    got = Group(4, 1024, device).reduce(backend, x)
    assert torch.equal(torch.isnan(got).any(0).nonzero(), torch.tensor([[17]], device=device))
    assert torch.equal(x.isnan(), before.isnan())
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


def test_wrong_arguments_are_named(backend, device):
    group, x = Group(4, 64, device), rows(4, 8, torch.bfloat16, 0, device)
    for wrong, message in [
        ({"x": x[:, :7]}, "x: expected rows of a multiple of 16 bytes, got 14 bytes"),
        ({"x": rows(4, 40, torch.bfloat16, 0, device)}, "shared: expected at least 4768 bytes for rows of 80 bytes, got 4736"),
        ({"x": x[:3], "shared": group.shared[:3], "regions": group.regions[:3]}, "regions: expected 2, 4, 6 or 8 ranks, got 3"),
        ({"rank": 1}, "rank: expected x to hold ranks within 0 to 3, got 1 to 4"),
        ({"shots": 3}, "shots: expected 1, 2, or 0 to choose by size, got 3"),
        ({"shared": group.shared[:2]}, r"shared: expected size L = 4 \(from x\), got 2"),
        ({"regions": group.regions.int()}, "regions: expected dtype int64, got torch.int32"),
    ]:
        given = {"x": x, "shared": group.shared, "regions": group.regions, **wrong}
        with pytest.raises(ValueError, match=f"all_reduce: {message}"):
            all_reduce.using(backend)(**given)
