# SPDX-License-Identifier: Apache-2.0
"""Rows reach the op `sample` with their own parameters, whatever their neighbours are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.config import SamplingParams
from rocm_infer.engine.request import Request
from rocm_infer.engine.sampler import Sampler, score
from rocm_infer.ops.sample import sample
from tests.engine.test_engine import params

VOCAB = 61


def make_request(number: int, chosen: SamplingParams, num_output: int) -> Request:
    tokens = [(7 * number + 3 * i) % VOCAB for i in range(4 + num_output)]
    return Request(f"r{number}", tokens, 4, chosen, 1000, frozenset([1, 2]), chosen.seed or number, number)


def expected(logits: torch.Tensor, request: Request) -> list[Any]:
    """The op on one row, its tables made from the request's tokens."""
    p = request.params
    counts = torch.zeros(1, VOCAB, dtype=torch.int32)
    for token in request.output_ids:
        counts[0, token] += 1
    seen = torch.zeros(1, VOCAB, dtype=torch.uint8)
    seen[0, request.tokens[:4]] = 1
    bias = torch.zeros(1, VOCAB)
    for token, value in p.logit_bias:
        bias[0, token] = value
    if request.num_output < p.min_tokens:
        bias[0, list(request.stop_ids)] = -torch.inf
    f32 = [torch.tensor([x]) for x in (p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty)]
    found = sample(
        logits[None],
        f32[0],
        torch.tensor([p.top_k], dtype=torch.int32),
        f32[1],
        f32[2],
        torch.tensor([request.seed]),
        torch.tensor([request.num_output]),
        counts,
        seen,
        f32[3],
        f32[4],
        torch.tensor([p.repetition_penalty]),
        bias,
        num_logprobs=-1 if p.logprobs is None else p.logprobs,
    )
    return [each[0].tolist() for each in found]


@given(chosen=st.lists(st.tuples(params, st.integers(0, 6)), min_size=1, max_size=8), data=st.data())
def test_rows_are_sampled_as_if_alone(chosen: list[tuple[SamplingParams, int]], data: st.DataObject) -> None:
    sampler = Sampler(sample, VOCAB, torch.device("cpu"))
    requests = [
        make_request(number, dataclasses.replace(p, min_tokens=number % 9), num_output)
        for number, (p, num_output) in enumerate(chosen)
    ]
    generator = torch.Generator().manual_seed(len(chosen))
    for _ in range(4):
        batch = data.draw(st.permutations(requests)) if data.draw(st.booleans()) else requests
        batch = batch[: data.draw(st.integers(1, len(batch)))]
        logits = 4 * torch.randn(len(batch), VOCAB, generator=generator)
        found = sampler.sample(logits, batch)
        assert len(found.ids) == len(batch)
        for row, request in enumerate(batch):
            one = expected(logits[row], request)
            assert found.ids[row] == one[0]
            if request.params.logprobs is not None:
                assert found.logprobs is not None
                entry = found.logprobs[row]
                assert entry is not None
                assert (entry.token_id, entry.logprob) == (one[0], one[1])
                assert entry.top == (list(zip(one[2], one[3])) if request.params.logprobs else [])
            request.tokens.append(found.ids[row])
    for request in requests:
        sampler.release(request)
    assert len(sampler.tables.free_rows) == len(sampler.tables.counts) - 1


def test_nan_row_is_reported_and_others_are_not_touched() -> None:
    sampler = Sampler(sample, VOCAB, torch.device("cpu"))
    requests = [make_request(i, SamplingParams(temperature=0.0, presence_penalty=0.5 * (i % 2)), 2) for i in range(4)]
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, 5] = logits[2, 7] = torch.nan
    ids = sampler.sample(logits, requests).ids
    assert ids[1] == ids[2] == -1
    assert min(ids[0], ids[3]) >= 0


def test_all_greedy_batches_build_their_tensors_once() -> None:
    sampler = Sampler(sample, VOCAB, torch.device("cpu"))
    requests = [make_request(i, SamplingParams(temperature=0.0), 0) for i in range(3)]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    sampler.sample(logits, requests)
    groups = sampler.groups
    sampler.sample(logits, list(requests))
    assert sampler.groups is groups
    assert len(groups) == 1
    assert groups[0].bias is None
    assert groups[0].table_rows is None
    sampler.sample(logits[:2], requests[:2])
    assert sampler.groups is not groups


def test_score_is_the_log_softmax() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1))
    entries = score(logits, [3, 1, 4, 1, 5], 2)
    exact = logits.double().log_softmax(-1)
    for row, entry in enumerate(entries):
        assert abs(entry.logprob - float(exact[row, entry.token_id])) < 1e-5
        assert entry.top[0][0] == int(exact[row].argmax())
        assert len(entry.top) == 2
    assert score(logits[:0], [], 2) == []
