# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.moe_align import moe_align
from tests import strategies as data

num_tokens = st.sampled_from([0, 1, 2, 7, 16, 17, 33, 130])
blocks = st.sampled_from([1, 2, 16, 64, 128])
experts = st.sampled_from([1, 2, 8, 33])


def expected(ids: torch.Tensor, num_experts: int, block: int) -> tuple[list[int], list[int]]:
    """(slots, expert of each block), written as one would do it by hand."""
    flat = ids.flatten().tolist()
    slots: list[int] = []
    owners: list[int] = []
    for expert in [*range(num_experts), -1]:
        mine = [s for s, e in enumerate(flat) if (e if 0 <= e < num_experts else -1) == expert]
        mine += [len(flat)] * (-len(mine) % block)
        slots += mine
        owners += [expert] * (len(mine) // block)
    return slots, owners


def assert_right(got: tuple[torch.Tensor, ...], ids: torch.Tensor, num_experts: int, block: int) -> None:
    """Exactly the slots and experts of `expected`, then blocks of nothing to the end of the outputs."""
    slots, owners, num_padded = got
    want_slots, want_owners = expected(ids, num_experts, block)
    assert {t.dtype for t in got} == {torch.int32}
    assert num_padded.tolist() == [len(want_slots)]
    assert len(slots) == len(owners) * block
    assert slots.tolist() == want_slots + [ids.numel()] * (len(slots) - len(want_slots))
    assert owners.tolist() == want_owners + [-1] * (len(owners) - len(want_owners))


@given(num_tokens, experts, st.sampled_from([1, 2, 8]), blocks, st.booleans(), st.booleans(), data.seeds)
def test_slots_are_sorted_and_padded(backend, device, tokens, num_experts, top_k, block, skewed, foreign, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_experts, (tokens, top_k), generator=generator)
    if skewed:
        ids = ids // 3
    if foreign:
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
        ids[torch.rand(ids.shape, generator=generator) < 0.1] = num_experts + 5
    assert_right(moe_align.using(backend)(ids.int().to(device), num_experts=num_experts, block=block), ids, num_experts, block)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_prompt_of_many_slots(backend, device, share):
    """More slots than any kernel counts at once, `share` of them of expert 3, and some of nobody in between."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 9, (1201, 8), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < share] = 3
    assert_right(moe_align.using(backend)(ids.int().to(device), num_experts=8, block=16), ids, 8, 16)


def test_more_experts_than_slots(backend, device):
    ids = torch.randint(0, 65, (4, 9), generator=torch.Generator().manual_seed(1))
    assert_right(moe_align.using(backend)(ids.int().to(device), num_experts=65, block=64), ids, 65, 64)


def test_strided_ids(backend, device):
    ids = torch.tensor([[1, 0, 9], [1, 2, 9], [0, 1, 9]], dtype=torch.int32, device=device)[:, :2]
    slots, owners, num_padded = moe_align.using(backend)(ids, num_experts=3, block=2)
    assert slots.tolist()[:8] == [1, 4, 0, 2, 5, 6, 3, 6]
    assert owners.tolist()[:4] == [0, 1, 1, 2]
    assert num_padded.item() == 8


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="moe_align: block, num_experts: expected positive numbers, got 0, 4"):
        moe_align(torch.zeros(2, 2, dtype=torch.int32), num_experts=4, block=0)
    with pytest.raises(ValueError, match="moe_align: ids: expected dtype int32"):
        moe_align(torch.zeros(2, 2, dtype=torch.int64), num_experts=4, block=4)
