# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.sample import philox, sample, uniform
from tests import strategies as data
from tests.close import EPS32, assert_close
from tests.ops import paged

vocabularies = st.sampled_from([1, 2, 31, 32, 33, 257, 1000, 1025, 3001, 4096, 4097])
SPLITS = 9001  # tokens: kernels that split the vocabulary get several splits, the last one ragged
temperatures = st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0])
top_ks = st.sampled_from([0, 1, 2, 5, 50, 100000])
top_ps = st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
min_ps = st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])
rows_of_parameters = st.lists(st.tuples(temperatures, top_ks, top_ps, min_ps), min_size=1, max_size=4)
BORDER = 1e-4  # share of the probability within which another order of fp32 sums may decide otherwise


def plain(rows: int, **values) -> dict[str, torch.Tensor]:
    """Neutral parameters with temperature 1 and seed = row, changed by `values`."""
    made = {
        "temperature": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int32),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "seeds": torch.arange(rows),
        "counters": torch.zeros(rows, dtype=torch.int64),
    }
    return made | {name: torch.as_tensor(value, dtype=made[name].dtype).expand(rows).clone() for name, value in values.items()}


def call(backend, device, logits, params, **more):
    tensors = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in {**params, **more}.items()}
    return tuple(x.cpu() for x in sample.using(backend)(logits.to(device), **tensors))


def kept_weights(
    row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[dict[int, float], bool]:
    """Weights by id after the filters, from the definitions, and whether a border lies too near to call."""
    logits = row.double().tolist()
    ranked = sorted((v for v in range(len(logits)) if logits[v] > -math.inf), key=lambda v: (-logits[v], v))
    ranked = ranked[: top_k or None]
    weight = {v: math.exp((logits[v] - logits[ranked[0]]) / temperature) for v in ranked}
    total, before, kept, doubtful = sum(weight.values()), 0.0, {}, False
    for v in ranked:
        doubtful |= before > 0 and top_p < 1 and abs(before / total - top_p) < BORDER
        if before > 0 and top_p < 1 and before >= top_p * total:
            break
        doubtful |= abs(weight[v] - min_p) < BORDER * min_p and weight[v] < 1
        if weight[v] >= min_p:
            kept[v] = weight[v]
        before += weight[v]
    return kept, doubtful


def is_drawn(token: int, share: float, kept: dict[int, float]) -> bool:
    """Whether `token` holds `share` of the cumulated weights in order of ids, or shares the border next to it."""
    total = sum(kept.values())
    before = sum(weight for v, weight in kept.items() if v < token) / total
    return token in kept and before - BORDER <= share <= before + kept[token] / total + BORDER


def check_draw(token: int, share: float, kept: dict[int, float]) -> None:
    assert is_drawn(token, share, kept), (token, share, kept.get(token))


@given(vocabularies, rows_of_parameters, data.seeds, st.sampled_from([1.0, 4.0]), data.float_types)
def test_agrees_with_the_definitions(backend, device, vocab, params, seed, spread, dtype):
    rows = len(params)
    logits = data.normal((rows, vocab), seed, dtype, spread)
    temperature, top_k, top_p, min_p = zip(*params)
    seeds = torch.arange(rows) + seed
    given_params = plain(rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds, counters=7)
    ids, _ = call(backend, device, logits, given_params)
    shares = uniform(seeds, given_params["counters"]).tolist()
    for row, token in enumerate(ids.tolist()):
        if temperature[row] == 0:
            assert token == max(range(vocab), key=lambda v: (logits[row, v].item(), -v))
            continue
        kept, doubtful = kept_weights(logits[row], *params[row])
        if not doubtful:
            check_draw(token, shares[row], kept)


@given(st.sampled_from([0.0, 1.0]), top_ks, top_ps, data.seeds)
def test_equal_logits_are_taken_by_lowest_id(backend, device, temperature, top_k, top_p, seed):
    """Few distinct values, so that every threshold falls inside a run of equals."""
    logits = torch.randint(0, 3, (3, 70), generator=torch.Generator().manual_seed(seed)).float()
    ids, _ = call(backend, device, logits, plain(3, temperature=temperature, top_k=top_k, top_p=top_p, seeds=seed))
    share = uniform(torch.tensor([seed]), torch.tensor([0])).item()
    for row, token in enumerate(ids.tolist()):
        if temperature == 0:
            assert token == int((logits[row] == logits[row].max()).nonzero()[0])
            continue
        kept, doubtful = kept_weights(logits[row], temperature, top_k, top_p, 0.0)
        if not doubtful:
            check_draw(token, share, kept)


def few_values(seed: int, num_likely: int = 300) -> torch.Tensor:
    """A row of SPLITS logits whose mass lies in `num_likely` tokens of three values, scattered over all splits."""
    draw = torch.Generator().manual_seed(seed)
    row = data.normal((SPLITS,), seed) - 40
    row[torch.randperm(SPLITS, generator=draw)[:num_likely]] = torch.randint(0, 3, (num_likely,), generator=draw).float()
    return row


def check_row(backend, device, row: torch.Tensor, temperature: float, top_k: int, top_p: float, num_draws: int = 5) -> None:
    """Draws from all over one row, whose tokens may be so light that one lies within the rounding of top_p: it may stay or go, no
    other."""
    counters = torch.arange(1000)
    order = uniform(torch.zeros_like(counters), counters).argsort()
    spread = counters[order][torch.linspace(40, 990, num_draws).long()]
    params = plain(num_draws, temperature=temperature, top_k=top_k, top_p=top_p, seeds=0) | {"counters": spread}
    ids, _ = call(backend, device, row.expand(num_draws, -1).contiguous(), params)
    choices = [kept_weights(row, temperature, top_k, top_p * (1 + near), 0.0)[0] for near in (-1e-6, 1e-6)]
    for token, share in zip(ids.tolist(), uniform(params["seeds"], params["counters"]).tolist()):
        assert any(is_drawn(token, share, kept) for kept in choices), (token, share)


@pytest.mark.parametrize(("top_k", "top_p"), [(150, 1.0), (150, 0.9), (301, 1.0), (0, 0.02), (0, 0.9)])
def test_ties_at_the_thresholds_lie_in_several_splits(backend, device, top_k, top_p):
    """A tie too many or too few, or one of the wrong split, moves the shares of all that follow."""
    row = few_values(top_k)
    check_row(backend, device, row, 1.0, top_k, top_p)
    assert call(backend, device, row[None], plain(1, temperature=0.0))[0] == int((row == row.max()).nonzero()[0])


def test_top_p_is_reached_exactly(backend, device):
    row = torch.full((SPLITS,), -200.0)
    row[[40, 4500, 4700, 8800]] = 1.0
    ids, _ = call(backend, device, row.expand(6, -1).contiguous(), plain(6, top_p=0.5))
    assert set(ids.tolist()) == {40, 4500}


@pytest.mark.parametrize(
    ("top_k", "top_p", "heights"),
    [(0, 0.9, (3.0, 0.0, 1.5)), (50, 1.0, (3.0, 0.0, 1.5)), (50, 0.5, (0.0, 1.5, 3.0)), (3000, 1.0, (20.0, 0.0, 19.0))],
)
def test_splits_of_unlike_height(backend, device, top_k, top_p, heights):
    """What is deep in its own split may be kept, and the best of a split may be far below."""
    row = torch.tensor(heights).repeat_interleave(4096)[:SPLITS] + data.normal((SPLITS,), 1, scale=0.01)
    highest = heights.index(max(heights)) * 4096
    row[highest + 1 : highest + 500] = row[highest + 501 : highest + 4096] = -40.0
    check_row(backend, device, row, 1.0, top_k, top_p, 3)


@pytest.mark.parametrize(("top_k", "top_p", "spread"), [(0, 0.5, 0.0), (0, 0.95, 0.3), (4000, 0.9, 1e-3)])
def test_nearly_equal_logits(backend, device, top_k, top_p, spread):
    """No token can be ruled out before the thresholds are known."""
    check_row(backend, device, data.normal((SPLITS,), 2, torch.float32, spread), 2.0, top_k, top_p, 3)


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_few_allowed_tokens_in_distant_splits(backend, device, top_k):
    rows, allowed = 5, [3, 4095, 4096, 9000]
    logits = torch.full((rows, SPLITS), -math.inf)
    logits[:, allowed] = torch.tensor([0.5, 1.0, 1.0, 0.0])
    params = plain(rows, top_k=top_k, top_p=0.95)
    ids, logprob = call(backend, device, logits, params, num_logprobs=0)
    kept, doubtful = kept_weights(logits[0], 1.0, top_k, 0.95, 0.0)
    assert not doubtful
    for token, share in zip(ids.tolist(), uniform(params["seeds"], params["counters"]).tolist()):
        check_draw(token, share, kept)
    want = logits[0].double().log_softmax(0)[ids]
    assert_close(logprob, want, noise=8 * EPS32, backend=backend)


def test_the_smallest_and_the_largest_temperatures(backend, device):
    """Differences over the temperature overflow, or vanish; forbidden tokens stay forbidden."""
    logits = data.normal((6, SPLITS), 3)
    logits[:, ::3] = -math.inf
    params = plain(
        6, temperature=[1e-30, 1e-38, 1e-42, 1e30, 1e38, 1e38], top_k=[0, 40, 0, 0, 40, 0], top_p=[1, 1, 0.9, 1, 1, 0.9]
    )
    ids, _ = call(backend, device, logits, params)
    assert torch.equal(ids[:3], logits[:3].argmax(-1))
    assert (logits[torch.arange(6), ids] > -math.inf).all()
    assert ids[4] in logits[4].topk(40).indices


def test_a_real_vocabulary(backend, device):
    logits = data.normal((6, 129280), 1, torch.float32, 3.0)
    logits[:, 100000] = logits.amax() + 1
    settings = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (1.0, 50, 1.0, 0.0),
        (0.6, 0, 0.95, 0.0),
        (1.0, 2000, 0.9, 0.1),
        (2.0, 0, 0.999, 0.0),
    ]
    temperature, top_k, top_p, min_p = zip(*settings)
    params = plain(6, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=[3, 4, 5, 6, 7, 8])
    ids, _ = call(backend, device, logits, params)
    assert ids[0] == 100000
    for row in range(1, 6):
        # The tail is too flat to be clear of the border: a token on the wrong side of it weighs next to nothing.
        kept, _ = kept_weights(logits[row], temperature[row], top_k[row], top_p[row] + BORDER / 10, min_p[row])
        check_draw(int(ids[row]), uniform(params["seeds"], params["counters"])[row].item(), kept)


@paged.few
@given(st.sampled_from([5, 40, 300]), data.seeds)
def test_penalties_bias_and_mask(backend, device, vocab, seed):
    rows = 3
    draw = torch.Generator().manual_seed(seed)
    logits = data.normal((rows, vocab), seed, torch.float32, 2.0)
    counts = torch.randint(0, 3, (rows, vocab), generator=draw).int()
    seen = torch.randint(0, 2, (rows, vocab), generator=draw).to(torch.uint8)
    presence, frequency = torch.tensor([0.0, 0.7, -1.0]), torch.tensor([0.3, 0.0, 2.0])
    repetition = torch.tensor([1.0, 1.3, 0.8])
    bias = data.normal((rows, vocab), seed + 1)
    bias[0, 0] = -math.inf
    allowed = torch.rand(rows, vocab, generator=draw) < 0.6
    allowed[:, -1] = True
    words = torch.zeros(rows, -(-vocab // 32), dtype=torch.int64)
    for row, token in allowed.nonzero().tolist():
        words[row, token // 32] |= 1 << (token % 32)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    more = {
        "output_counts": counts, "prompt_seen": seen, "presence": presence, "frequency": frequency,
        "repetition": repetition, "bias": bias, "mask": words,
    }  # fmt: skip
    want = logits.double()
    touched = (counts > 0) | (seen > 0)
    factor = repetition.double()[:, None]
    want = torch.where(touched, torch.where(want > 0, want / factor, want * factor), want)
    want = want - frequency.double()[:, None] * counts - presence.double()[:, None] * (counts > 0) + bias
    want = want.masked_fill(~allowed, -math.inf)
    greedy, _ = call(backend, device, logits, plain(rows, temperature=0.0), **more)
    for row, token in enumerate(greedy.tolist()):
        assert want[row, token] >= want[row].max() - 1e-5
    params = plain(rows, top_k=[0, 3, 0], top_p=[1.0, 1.0, 0.8], seeds=seed)
    ids, _ = call(backend, device, logits, params, **more)
    for row, token in enumerate(ids.tolist()):
        kept, doubtful = kept_weights(want[row], 1.0, *[params[name][row].item() for name in ("top_k", "top_p", "min_p")])
        if not doubtful:
            check_draw(token, uniform(params["seeds"], params["counters"])[row].item(), kept)


@pytest.mark.parametrize("name", ["presence", "frequency", "repetition"])
def test_a_penalty_without_tables_does_nothing(backend, device, name):
    logits = data.normal((2, 50), 1)
    alone = call(backend, device, logits, plain(2))
    assert torch.equal(call(backend, device, logits, plain(2), **{name: torch.tensor([2.0, 1.5])})[0], alone[0])


@paged.few
@given(vocabularies, st.sampled_from([-1, 0, 1, 5]), data.seeds)
def test_log_probabilities_are_of_the_raw_logits(backend, device, vocab, num, seed):
    num = min(num, vocab)
    logits = data.normal((3, vocab), seed, torch.float32, 3.0)
    logits[2] = logits[2].round()
    bias = torch.full((3, vocab), 0.5)
    found = call(backend, device, logits, plain(3, temperature=[0.0, 0.5, 1.0], top_k=2), bias=bias, num_logprobs=num)
    assert len(found) == (4 if num > 0 else 2)
    want = logits.double().log_softmax(-1)
    if num < 0:
        assert found[1].isnan().all()
        return
    noise = 4 * EPS32 * (logits.abs().amax() + math.log(vocab) + 4)
    assert_close(found[1], want.gather(1, found[0][:, None])[:, 0], noise=noise, backend=backend)
    if num > 0:
        ranked = [sorted(range(vocab), key=lambda v: (-row[v], v))[:num] for row in logits.tolist()]
        assert found[2].tolist() == ranked
        assert_close(found[3], want.gather(1, found[2]), noise=noise, backend=backend)


@pytest.mark.parametrize(("num", "num_likely"), [(1, 2), (20, 12), (20, 300)])
def test_the_likeliest_lie_in_any_split(backend, device, num, num_likely):
    """Ties span splits, and one split may hold many of the places."""
    logits = torch.stack([few_values(1, num_likely), torch.zeros(SPLITS), few_values(2, num_likely)])
    logits[2, :5000] = -math.inf
    logits[2, 4094:4100] = 1.0
    found = call(backend, device, logits, plain(3, temperature=0.0), num_logprobs=num)
    ranked = [sorted(range(SPLITS), key=lambda v: (-row[v], v))[:num] for row in logits.tolist()]
    assert found[2].tolist() == ranked
    want = logits.double().log_softmax(-1).gather(1, found[2])
    assert_close(found[3], want, noise=4 * EPS32 * (logits[logits > -math.inf].abs().max() + 14), backend=backend)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_row_gives_minus_one_and_spoils_no_other(backend, device, poison):
    logits = data.normal((4, 300), 5)
    params = plain(4, temperature=[0.0, 1.0, 1.0, 0.7], top_k=[0, 0, 5, 0], top_p=[1, 1, 1, 0.9])
    good = call(backend, device, logits, params, num_logprobs=2)
    for row in range(4):
        broken = logits.clone()
        broken[row, 299] = poison
        got = call(backend, device, broken, params, num_logprobs=2)
        assert got[0][row] == -1
        assert got[1][row].isnan()
        assert (got[2][row] == -1).all()
        assert got[3][row].isnan().all()
        others = [other for other in range(4) if other != row]
        assert all(torch.equal(mine[others], theirs[others]) for mine, theirs in zip(got, good))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_mask_hides_no_broken_logit(backend, device, poison):
    logits = data.normal((2, 300), 5)
    logits[0, 37] = poison
    mask = torch.full((2, 10), -1, dtype=torch.int32)
    mask[:, 1] = ~(1 << 5)  # token 37 is forbidden
    ids, logprob = call(backend, device, logits, plain(2, temperature=[0.0, 0.0]), mask=mask, num_logprobs=0)
    assert (ids[0], ids[1] >= 0) == (-1, True)
    assert logprob.isnan().tolist() == [True, False]


def test_no_allowed_token_gives_minus_one(backend, device):
    logits = torch.full((2, 40), -math.inf)
    logits[1, 7] = 0.0
    assert call(backend, device, logits, plain(2))[0].tolist() == [-1, 7]
    nothing = torch.zeros(2, 2, dtype=torch.int32)
    assert call(backend, device, torch.zeros(2, 40), plain(2, temperature=[0.0, 1.0]), mask=nothing)[0].tolist() == [-1, -1]


def test_the_likeliest_token_stays_whatever_the_parameters(backend, device):
    """Out of range as they are, they must neither hang nor give an id that does not exist."""
    logits = data.normal((5, 90), 2)
    params = plain(5, min_p=[2.0, math.inf, 0.0, 0.0, 1.0], top_p=[1.0, 0.5, 0.0, -1.0, 1.0], top_k=[0, 3, 0, -1, -5])
    assert torch.equal(call(backend, device, logits, params)[0], logits.argmax(-1))


@paged.few
@given(st.sampled_from([500, SPLITS]), data.seeds)
def test_a_row_is_a_function_of_its_own_arguments(backend, device, vocab, seed):
    logits = data.normal((4, vocab), seed)
    params = plain(4, temperature=[0.0, 1.0, 0.8, 1.2], top_k=[0, 0, 20, 0], top_p=[1, 1, 1, 0.9], seeds=seed)
    together = call(backend, device, logits, params, num_logprobs=3)
    for row in range(4):
        alone = {name: x[row : row + 1] for name, x in params.items()}
        found = call(backend, device, logits[row : row + 1], alone, num_logprobs=3)
        assert all(torch.equal(mine[0], theirs[row]) for mine, theirs in zip(found, together))


def test_strided_rows(backend, device):
    logits = data.normal((3, 100), 1)
    assert torch.equal(
        call(backend, device, data.strided(logits, device=device), plain(3))[0], call(backend, device, logits, plain(3))[0]
    )


def test_no_rows(backend, device):
    ids, logprob = call(backend, device, torch.zeros(0, 10), plain(0))
    assert ids.shape == logprob.shape == (0,)


def test_draws_follow_the_probabilities():
    """Chi-square over 20,000 draws, 7 degrees of freedom: 24.3 is exceeded once in a thousand seeds."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -2.0, 1.5, 0.1])
    num = 20000
    params = plain(num, seeds=12345)
    params["counters"] = torch.arange(num)
    ids = sample.fn(logits.expand(num, -1), **params)[0]
    expected = logits.double().softmax(0) * num
    assert ((torch.bincount(ids, minlength=8) - expected) ** 2 / expected).sum() < 24.3


def test_philox_known_answers():
    """The known-answer vectors of philox 4x32-10 in Random123's kat_vectors."""
    cases = [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for key, counter, want in cases:
        words = philox(tuple(torch.tensor([word]) for word in key), tuple(torch.tensor([word]) for word in counter))
        assert tuple(int(word) for word in words) == want


def test_uniform_uses_all_bits_of_seed_and_counter():
    seeds = torch.tensor([0, 1, 2**32, -1, 0, 0, 0])
    counters = torch.tensor([0, 0, 0, 0, 1, 2**32, -1])
    values = uniform(seeds, counters)
    assert len(set(values.tolist())) == 7
    assert ((values >= 0) & (values < 1)).all()


def test_wrong_arguments_are_named(backend, device):
    with pytest.raises(ValueError, match="sample: num_logprobs: expected at most V = 5, got 6"):
        call(backend, device, torch.zeros(1, 5), plain(1), num_logprobs=6)
    with pytest.raises(ValueError, match="sample: top_k: expected dtype int32"):
        call(backend, device, torch.zeros(1, 5), {**plain(1), "top_k": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"sample: mask: expected size ceil\(V/32\) = 1, got 2"):
        call(backend, device, torch.zeros(1, 5), plain(1), mask=torch.zeros(1, 2, dtype=torch.int32))
