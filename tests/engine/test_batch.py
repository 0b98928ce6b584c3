# SPDX-License-Identifier: Apache-2.0
"""The tensors of a step against the plain definition of each."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.engine.batch import BatchBuilder
from rocm_infer.engine.request import Request
from rocm_infer.engine.scheduler import Step
from tests.engine.test_scheduler import make_request, make_scheduler


def expected_rows(step: Step) -> list[tuple[Request, int]]:
    """(request, position) of every row of T, in order."""
    rows = [(request, len(request.tokens) - 1) for request in step.decodes]
    for chunk in step.chunks:
        rows += [(chunk.request, chunk.start + i) for i in range(chunk.num_tokens)]
    return rows


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 3, 16]),
    max_step_tokens=st.integers(1, 30),
)
def test_tensors_of_every_step(lengths: list[tuple[int, int]], page_size: int, max_step_tokens: int) -> None:
    scheduler = make_scheduler(page_size=page_size, num_pages=40, max_step_tokens=max_step_tokens, conservativeness=0.0)
    for number, (num_prompt, max_tokens) in enumerate(lengths):
        scores = 1 if number % 3 == 0 else None
        scheduler.add(make_request(number, [1 + i % 2 for i in range(num_prompt)], max_tokens, prompt_logprobs=scores))
    builder = BatchBuilder(8, 64, page_size, torch.device("cpu"))
    while scheduler.requests:
        step = scheduler.schedule()
        assert step is not None
        batch = builder.build(step)
        rows, requests = expected_rows(step), step.requests()
        assert batch.num_decodes == len(step.decodes)
        assert batch.token_ids.tolist() == [request.tokens[position] for request, position in rows]
        assert batch.positions.tolist() == [position for _, position in rows]
        assert batch.slots.tolist() == [r.pages[p // page_size] * page_size + p % page_size for r, p in rows]
        counts = [1] * len(step.decodes) + [chunk.num_tokens for chunk in step.chunks]
        assert batch.query_start.tolist() == [sum(counts[:b]) for b in range(len(counts) + 1)]
        assert batch.kv_len.tolist() == [request.num_computed + count for request, count in zip(requests, counts)]
        for b, request in enumerate(requests):
            num_pages = -(-int(batch.kv_len[b]) // page_size)
            assert batch.page_table[b, :num_pages].tolist() == request.pages[:num_pages]
        assert batch.requests == step.sampled()
        assert [rows[row][0] for row in batch.logits_index.tolist()] == batch.requests
        assert [rows[row][1] for row in batch.logits_index.tolist()] == [len(r.tokens) - 1 for r in batch.requests]
        dtypes = {"token_ids": torch.int64, "positions": torch.int64, "slots": torch.int64, "logits_index": torch.int64}
        dtypes |= {"query_start": torch.int32, "kv_len": torch.int32, "page_table": torch.int32}
        assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes
        for scored in batch.scored:
            for i, target in enumerate(scored.targets):
                request, position = rows[scored.start + i]
                assert request is scored.request
                assert target == request.tokens[position + 1]
            scored.request.prompt_logprobs = (scored.request.prompt_logprobs or [None]) + [None] * len(scored.targets)
        for request in requests:
            if request.params.prompt_logprobs is not None and request.num_computed == 0:
                assert any(scored.request is request for scored in batch.scored)
        scheduler.commit(step, [5] * len(batch.requests))


def test_page_table_follows_pages_that_were_exchanged() -> None:
    """Two copies whose first pages are computed in the same step end up on the same page."""
    scheduler = make_scheduler(page_size=4)
    requests = [make_request(number, [1] * 3, 6) for number in range(2)]
    for request in requests:
        scheduler.add(request)
    builder = BatchBuilder(8, 16, 4, torch.device("cpu"))
    step = scheduler.schedule()
    assert step is not None
    for _ in range(3):
        builder.build(step)
        scheduler.commit(step, [1] * 2)
        for request in requests:
            scheduler.cache.insert(request)
        step = scheduler.schedule()
        assert step is not None
    assert requests[0].pages[0] == requests[1].pages[0]
    table = builder.build(step).page_table
    assert table.tolist() == [request.pages for request in requests]
