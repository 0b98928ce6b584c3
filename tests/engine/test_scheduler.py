# SPDX-License-Identifier: Apache-2.0
"""The scheduler under random use, and its policies one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rocm_infer.config import SamplingParams
from rocm_infer.engine.kv_cache import KVCache
from rocm_infer.engine.request import Request, RequestRefused, Status
from rocm_infer.engine.scheduler import Scheduler, Step

STOP = 0


def make_request(
    number: int, prompt: list[int], max_tokens: int, priority: int = 0, prompt_logprobs: int | None = None
) -> Request:
    return Request(
        rid=f"r{number}",
        tokens=list(prompt),
        num_prompt=len(prompt),
        params=SamplingParams(prompt_logprobs=prompt_logprobs),
        max_len=len(prompt) + max_tokens,
        stop_ids=frozenset([STOP]),
        seed=0,
        arrival=number,
        priority=priority,
    )


def make_scheduler(num_pages: int = 64, page_size: int = 2, **settings: object) -> Scheduler:
    defaults: dict[str, object] = {"max_running": 8, "max_waiting": 100, "max_step_tokens": 64, "conservativeness": 1.0}
    return Scheduler(KVCache(num_pages, page_size), **{**defaults, **settings})  # type: ignore[arg-type]


def run_step(scheduler: Scheduler, token: int = 5) -> Step | None:
    step = scheduler.schedule()
    if step is not None:
        scheduler.commit(step, [token] * len(step.sampled()))
    scheduler.check()
    return step


def run_all(scheduler: Scheduler, limit: int = 2000) -> int:
    """Steps until nothing is left."""
    for count in range(limit):
        if not scheduler.requests:
            return count
        assert run_step(scheduler) is not None, "there is work but nothing was scheduled"
    raise AssertionError("the scheduler does not come to an end")


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(6, 20),
        max_running=st.integers(1, 5),
        max_step_tokens=st.integers(1, 20),
        conservativeness=st.sampled_from([0.0, 0.3, 1.0]),
        is_caching=st.booleans(),
    )
    def begin(self, num_pages: int, max_running: int, max_step_tokens: int, conservativeness: float, is_caching: bool) -> None:
        cache = KVCache(num_pages, 2, is_caching)
        self.scheduler = Scheduler(cache, max_running, 6, max_step_tokens, conservativeness)
        self.known: dict[str, tuple[list[int], Request]] = {}
        self.count = 0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        max_tokens=st.integers(0, 9),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        scores=st.sampled_from([None, None, 1]),
    )
    def add(self, prompt: list[int], max_tokens: int, priority: int, scores: int | None) -> None:
        request = make_request(self.count, prompt, max_tokens, priority, scores)
        self.count += 1
        fits = -(-request.max_len // 2) <= self.scheduler.cache.num_pages
        if fits and self.scheduler.num_waiting < 6:
            self.scheduler.add(request)
            self.known[request.rid] = (list(prompt), request)
        else:
            with pytest.raises(RequestRefused) as refusal:
                self.scheduler.add(request)
            assert refusal.value.info.code == ("queue_full" if fits else "context_length_exceeded")

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        scheduler = self.scheduler
        step = scheduler.schedule()
        if step is None:
            assert not scheduler.requests, "there is work but nothing was scheduled"
            return
        num_prompt_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        assert num_prompt_tokens <= max(1, scheduler.max_step_tokens - len(step.decodes))
        assert len({request.rid for request in step.requests()}) == len(step.requests()) <= scheduler.max_running
        for request in step.decodes:
            assert request.num_computed == len(request.tokens) - 1
            assert len(request.pages) * 2 >= len(request.tokens)
        for request, start, num_tokens, samples in step.chunks:
            assert start == request.num_computed
            assert num_tokens >= 1
            assert len(request.pages) * 2 >= start + num_tokens
            assert samples == (start + num_tokens == len(request.tokens) < request.max_len)
            if request.needs_prompt_logprobs and start + num_tokens >= request.num_prompt:
                request.prompt_logprobs = [None] * request.num_prompt
        tokens = data.draw(st.lists(st.sampled_from([1, 2, 2, 2, STOP, -1]), min_size=len(step.sampled()), max_size=8))
        for request in scheduler.commit(step, tokens[: len(step.sampled())]):
            assert request.status is Status.FINISHED
            assert request.finish_reason is not None

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        rid = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        request = self.scheduler.requests[rid]
        if fails:
            self.scheduler.fail(request, "internal_error", "test")
        else:
            assert self.scheduler.abort(rid) is request
        assert request.finish_reason == ("error" if fails else "abort")
        assert self.scheduler.abort(rid) is None

    @rule()
    def flush(self) -> None:
        self.scheduler.cache.flush()

    @invariant()
    def books_are_right(self) -> None:
        self.scheduler.check()

    @invariant()
    def tokens_are_kept(self) -> None:
        for prompt, request in self.known.values():
            assert request.tokens[: len(prompt)] == prompt
            assert len(request.tokens) <= request.max_len

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            run_all(self.scheduler)
            assert self.scheduler.cache.num_available == self.scheduler.cache.num_pages
            assert self.scheduler.num_promised == 0
            assert all(request.status is Status.FINISHED for _, request in self.known.values())


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=10 * settings().max_examples, stateful_step_count=40)


def test_prompt_is_cut_into_chunks_and_decodes_come_first() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(0, [1] * 4, 20))
    run_step(scheduler)
    scheduler.add(make_request(1, [2] * 12, 20))
    steps = [run_step(scheduler) for _ in range(4)]
    shapes = [(len(step.decodes), [chunk.num_tokens for chunk in step.chunks]) for step in steps if step]
    assert shapes == [(1, [5]), (1, [5]), (1, [2]), (2, [])]


def test_first_come_first_served_except_for_priority() -> None:
    scheduler = make_scheduler(max_running=1)
    for number, priority in enumerate([0, 0, 5]):
        scheduler.add(make_request(number, [number + 1], 1, priority))
    order = []
    while scheduler.requests:
        step = run_step(scheduler)
        assert step is not None
        order += [request.rid for request in step.requests()]
    assert order == ["r2", "r0", "r1"]


def test_full_queue_and_used_id_are_refused() -> None:
    scheduler = make_scheduler(max_waiting=1)
    scheduler.add(make_request(0, [1], 1))
    with pytest.raises(RequestRefused, match="in use") as refusal:
        scheduler.add(make_request(0, [1], 1))
    assert refusal.value.info.code == "duplicate_request_id"
    with pytest.raises(RequestRefused, match="waiting") as refusal:
        scheduler.add(make_request(1, [1], 1))
    assert refusal.value.info.code == "queue_full"
    run_all(scheduler)
    scheduler.add(make_request(0, [1], 1))


def test_request_longer_than_the_cache_is_refused() -> None:
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_request(0, [1] * 4, 4))
    with pytest.raises(RequestRefused, match=r"9 tokens .* do not fit the KV cache of 8"):
        scheduler.add(make_request(1, [1] * 4, 5))


def test_full_reservation_never_preempts() -> None:
    scheduler = make_scheduler(num_pages=12, conservativeness=1.0)
    for number in range(7):
        scheduler.add(make_request(number, [number + 1] * 3, 9))
    run_step(scheduler)
    assert scheduler.num_running == 2, "two reservations of six pages fill the cache"
    run_all(scheduler)
    assert scheduler.counters["preemptions"] == 0


def test_no_reservation_preempts_the_newest_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(num_pages=6, conservativeness=0.0)
    requests = [make_request(number, [number + 1] * 4, 8) for number in range(2)]
    for request in requests:
        scheduler.add(request)
    preempted = None
    while scheduler.requests:
        run_step(scheduler)
        if scheduler.counters["preemptions"] and preempted is None:
            preempted = list(requests[1].tokens)
            assert requests[0].status is Status.RUNNING
            assert requests[1].status is Status.WAITING
            assert len(preempted) > 4
    assert preempted is not None
    assert requests[1].tokens[: len(preempted)] == preempted
    assert [request.num_output for request in requests] == [8, 8]


def test_copies_of_a_prompt_use_the_pages_of_the_first() -> None:
    """n > 1: the second copy waits until the first has computed the page it would compute, then takes it."""
    scheduler = make_scheduler(page_size=4)
    copies = [make_request(number, list(range(1, 12)), 3) for number in range(4)]
    for request in copies:
        scheduler.add(request)
    steps = [run_step(scheduler) for _ in range(2)]
    assert steps[0] is not None
    assert steps[1] is not None
    assert [chunk.request for chunk in steps[0].chunks] == copies[:1]
    assert [(chunk.request, chunk.num_tokens) for chunk in steps[1].chunks] == [(request, 3) for request in copies[1:]]
    assert len({request.pages[0] for request in copies}) == 1
    run_all(scheduler)


def test_different_prompts_do_not_wait_for_each_other() -> None:
    scheduler = make_scheduler(page_size=4)
    for number in range(4):
        scheduler.add(make_request(number, [number + 1] * 11, 3))
    step = run_step(scheduler)
    assert step is not None
    assert len(step.chunks) == 4


def test_aborted_while_waiting_is_skipped() -> None:
    scheduler = make_scheduler(max_running=1)
    for number in range(3):
        scheduler.add(make_request(number, [number + 1], 2))
    scheduler.abort("r0")
    scheduler.abort("r1")
    step = run_step(scheduler)
    assert step is not None
    assert [request.rid for request in step.requests()] == ["r2"]


def test_blocked_head_is_not_matched_again_in_every_step() -> None:
    scheduler = make_scheduler(num_pages=10)
    scheduler.add(make_request(0, [1] * 4, 12))
    scheduler.add(make_request(1, [2] * 4, 12))
    calls = 0
    match = scheduler.cache.match

    def counted(request: Request) -> list[object]:
        nonlocal calls
        calls += 1
        return match(request)  # type: ignore[return-value]

    scheduler.cache.match = counted  # type: ignore[method-assign, assignment]
    for _ in range(8):
        run_step(scheduler)
    assert calls <= 3
    run_all(scheduler)


def test_aborting_a_blocked_head_lets_the_next_one_in() -> None:
    scheduler = make_scheduler(num_pages=10)
    scheduler.add(make_request(0, [1] * 4, 8))
    scheduler.add(make_request(1, [2] * 4, 12))
    scheduler.add(make_request(2, [3] * 4, 3))
    run_step(scheduler)
    run_step(scheduler)
    assert scheduler.num_running == 1
    scheduler.abort("r1")
    run_step(scheduler)
    assert scheduler.num_running == 2


def test_aborted_waiting_requests_are_not_kept() -> None:
    scheduler = make_scheduler(num_pages=10)
    scheduler.add(make_request(0, [1] * 4, 12))
    run_step(scheduler)
    for number in range(1, 500):
        scheduler.add(make_request(number, [2] * 4, 12))
        scheduler.abort(f"r{number}")
    assert len(scheduler.waiting) < 20
    run_all(scheduler)
