# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.moe_route import moe_route
from tests import strategies as data
from tests.close import EPS32, assert_close

num_tokens = st.sampled_from([0, 1, 2, 5, 17, 33])
# (experts, groups, groups kept, top_k): Mixtral, Qwen3, DeepSeek-V2-Lite, V2, V3, odd ones
layouts = st.sampled_from(
    [
        (8, 1, 1, 2),
        (128, 1, 1, 8),
        (64, 1, 1, 6),
        (160, 8, 3, 6),
        (256, 8, 4, 8),
        (5, 1, 1, 5),
        (1, 1, 1, 1),
        (6, 6, 2, 2),
        (60, 3, 1, 4),
        (1024, 1, 1, 12),
        (480, 24, 2, 33),
    ]
)


def scores_of(logits: torch.Tensor, score: str) -> torch.Tensor:
    wide = logits.double()
    return wide.softmax(-1) if score == "softmax" else 1 / (1 + (-wide).exp())


def chosen(choice: list[float], top_k: int, num_groups: int, top_groups: int, best_of: int) -> list[int]:
    """The rule in plain Python: the best groups, then the best experts in them, ties to the lowest id."""
    size = len(choice) // num_groups
    value = [sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:best_of]) for g in range(num_groups)]
    kept = sorted(range(num_groups), key=lambda g: (-value[g], g))[:top_groups]
    allowed = [e for e in range(len(choice)) if e // size in kept]
    return sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]


@given(
    num_tokens,
    layouts,
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.booleans(),
    data.float_types,
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([0, 1, 2]),
    data.seeds,
)
def test_agrees_with_the_rule(backend, device, tokens, layout, score, with_bias, renormalise, dtype, scale, num_shared, seed):
    num_experts, num_groups, top_groups, top_k = layout
    logits = data.normal((tokens, num_experts), seed, dtype, 2.0)
    # Biases a quarter apart: what is chosen then never hangs on the last bits of an exponential, but groups and ids still mix.
    bias = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)) * 0.25 if with_bias else None
    if with_bias and score == "softmax":
        logits = logits / 16
    weights, ids = moe_route.using(backend)(
        logits.to(device),
        None if bias is None else bias.to(device),
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        score=score,
        renormalise=renormalise,
        scale=scale,
        num_shared=num_shared,
    )
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    scores = scores_of(logits, score)
    choice = logits.double() if bias is None else scores + bias.double()
    for token in range(tokens):
        want = chosen(choice[token].tolist(), top_k, num_groups, top_groups, 1 if bias is None else 2)
        got = ids[token, :top_k].tolist()
        if bias is None:
            assert got == want
        else:
            near = torch.tensor([choice[token, e] for e in got]) - torch.tensor([choice[token, e] for e in want])
            assert near.abs().max() < 1e-5, f"token {token}: expected {want}, got {got}"
    assert ids[:, top_k:].tolist() == [list(range(num_experts, num_experts + num_shared))] * tokens
    want_weights = scores.gather(-1, ids[:, :top_k].long().cpu())
    if renormalise:
        want_weights = want_weights / (want_weights.sum(-1, keepdim=True) + 1e-20)
    noise = (32 + num_experts) * EPS32 * (1 + logits.double().abs().amax(-1, keepdim=True)) * want_weights * scale
    assert_close(weights[:, :top_k], want_weights * scale, noise=noise, backend=backend)
    assert (weights[:, top_k:] == 1).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ties_go_to_the_lowest_id(backend, device, score, with_bias):
    logits = torch.tensor([[1.0] * 16, [0.0] * 7 + [1.0, 1.0] + [0.0] * 7, [-50.0] * 16], device=device)
    bias = torch.zeros(16, device=device) if with_bias else None
    options = {"top_k": 3, "score": score, "renormalise": True}
    _, ids = moe_route.using(backend)(logits, bias, **options)
    assert ids.tolist() == [[0, 1, 2], [7, 8, 0], [0, 1, 2]]
    _, ids = moe_route.using(backend)(logits, bias, num_groups=4, top_groups=2, **options)
    assert ids.tolist() == [[0, 1, 2], [7, 8, 4], [0, 1, 2]]


def test_saturated_sigmoids_are_ordered_by_their_logit(backend, device):
    logits = torch.tensor([[20.0, 30.0, 25.0, -1.0]], device=device)
    _, ids = moe_route.using(backend)(logits, top_k=2, score="sigmoid", renormalise=False)
    assert ids.tolist() == [[1, 2]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_harms_its_own_token_only(backend, device, score):
    logits = data.normal((3, 32), 5).to(device)
    options = {"top_k": 4, "num_groups": 4, "top_groups": 2, "score": score, "renormalise": True}
    bias = torch.zeros(32, device=device)
    weights, ids = moe_route.using(backend)(logits, bias, **options)
    logits[1] = float("nan")
    with_nan, with_nan_ids = moe_route.using(backend)(logits, bias, **options)
    assert torch.equal(with_nan[[0, 2]], weights[[0, 2]])
    assert torch.equal(with_nan_ids[[0, 2]], ids[[0, 2]])
    assert with_nan[1].isnan().all()
    assert sorted(with_nan_ids[1].tolist()) == with_nan_ids[1].tolist()
    assert len(set(with_nan_ids[1].tolist())) == 4
    assert with_nan_ids[1].max() < 32


def test_deepseek_by_hand(backend, device):
    """Expert 0 scores highest, but its group is weak: groups 1 and 2 of three are kept."""
    score = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.5, 0.1, 0.4, 0.7, 0.1]])
    logits = (score / (1 - score)).log().to(device)
    weights, ids = moe_route.using(backend)(
        logits,
        torch.zeros(9, device=device),
        top_k=2,
        num_groups=3,
        top_groups=2,
        score="sigmoid",
        renormalise=True,
        scale=2.5,
        num_shared=1,
    )
    assert ids.tolist() == [[7, 3, 9]]
    assert_close(weights, torch.tensor([[2.5 * 0.7 / 1.3, 2.5 * 0.6 / 1.3, 1.0]]).double(), noise=1e-5, backend=backend)


def test_wrong_arguments_are_named():
    logits = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="moe_route: score: expected softmax or sigmoid, got 'relu'"):
        moe_route.using("reference")(logits, top_k=2, renormalise=True, score="relu")
    with pytest.raises(ValueError, match="groups that divide 8 experts"):
        moe_route.using("reference")(logits, top_k=2, renormalise=True, num_groups=3)
    with pytest.raises(ValueError, match="top_k: expected 1 to the 4 experts of the kept groups, got 5"):
        moe_route.using("reference")(logits, top_k=5, renormalise=True, num_groups=2)
