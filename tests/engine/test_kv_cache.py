# SPDX-License-Identifier: Apache-2.0
"""The KV cache's books under random use, and what the prefix index may and must find."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rocm_infer.config import SamplingParams
from rocm_infer.engine.kv_cache import KVCache
from rocm_infer.engine.request import Request

NUM_PAGES = 12
PAGE = 3


def make_request(rid: str, tokens: list[int], salt: str = "", prompt_logprobs: int | None = None) -> Request:
    return Request(
        rid=rid,
        tokens=list(tokens),
        num_prompt=len(tokens),
        params=SamplingParams(prompt_logprobs=prompt_logprobs),
        max_len=1000,
        stop_ids=frozenset(),
        seed=0,
        arrival=0,
        salt=salt,
    )


def admit(cache: KVCache, request: Request) -> int:
    """Lock what matches, get pages for the rest, compute everything; returns the matched pages."""
    path = cache.match(request)
    cache.lock(request, path)
    assert cache.extend(request, -(-len(request.tokens) // cache.page_size))
    request.num_computed = len(request.tokens)
    return len(path)


def finish(cache: KVCache, request: Request) -> None:
    cache.insert(request)
    cache.release(request)


class KVCacheMachine(RuleBasedStateMachine):
    """`written` is what a device would hold: for each page the history whose K/V were written to it last."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(NUM_PAGES, PAGE)
        self.running: list[Request] = []
        self.written: dict[int, tuple[object, ...]] = {}
        self.count = 0

    def history(self, request: Request, page: int) -> tuple[object, ...]:
        return request.salt, *request.tokens[: (page + 1) * PAGE]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from(["", "", "x"]))
    def start(self, tokens: list[int], salt: str) -> None:
        request = make_request(str(self.count), tokens, salt)
        self.count += 1
        path = self.cache.match(request)
        assert len(path) * PAGE < len(tokens), "the last token must be computed"
        for index, node in enumerate(path):
            assert self.written[node.page] == self.history(request, index), "a page of other tokens was matched"
        self.cache.lock(request, path)
        self.running.append(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 7), is_cached=st.booleans())
    def compute(self, data: st.DataObject, count: int, is_cached: bool) -> None:
        request = data.draw(st.sampled_from(self.running))
        known = request.num_computed
        while len(request.tokens) < known + count:
            request.tokens.append(data.draw(st.integers(0, 1)))
        held, available = list(request.pages), self.cache.num_available
        num_pages = -(-(known + count) // PAGE)
        grown = self.cache.extend(request, num_pages)
        assert grown == (num_pages - len(held) <= available)
        assert request.pages[: len(held)] == held
        if grown:
            request.num_computed = known + count
            for index in range(known // PAGE, request.num_computed // PAGE):
                self.written[request.pages[index]] = self.history(request, index)
            if is_cached:
                self.cache.insert(request)
                assert request.num_shared == request.num_computed // PAGE

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["insert", "release", "forget"]))
    def end(self, data: st.DataObject, how: str) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        if how == "insert":
            self.cache.insert(request)
        if how == "forget":
            self.cache.forget(request)
        else:
            self.cache.release(request)
        assert request.pages == []

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        assert not self.cache.unlocked

    @invariant()
    def books_are_right(self) -> None:
        self.cache.check(self.running)

    @invariant()
    def running_pages_hold_their_own_history(self) -> None:
        for request in self.running:
            for index in range(request.num_computed // PAGE):
                assert self.written[request.pages[index]] == self.history(request, index)


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(max_examples=10 * settings().max_examples, stateful_step_count=40)


def test_second_request_finds_the_full_pages_of_the_first() -> None:
    cache = KVCache(16, 4)
    tokens = list(range(11))
    first = make_request("first", tokens)
    assert admit(cache, first) == 0
    finish(cache, first)
    second = make_request("second", tokens)
    assert admit(cache, second) == 2
    assert second.num_shared == 2
    assert admit(cache, make_request("eight", tokens[:8])) == 1, "the last prompt token is never taken from the cache"


def test_prompt_logprobs_and_other_salts_match_nothing() -> None:
    cache = KVCache(16, 4)
    finish_first = make_request("a", list(range(9)))
    admit(cache, finish_first)
    finish(cache, finish_first)
    assert cache.match(make_request("b", list(range(9)), prompt_logprobs=0)) == []
    assert cache.match(make_request("c", list(range(9)), salt="tenant")) == []
    assert len(cache.match(make_request("d", list(range(9))))) == 2


def test_disabled_index_keeps_nothing() -> None:
    cache = KVCache(8, 4, enable_prefix_cache=False)
    request = make_request("a", list(range(9)))
    admit(cache, request)
    finish(cache, request)
    assert len(cache.free_pages) == 8
    assert cache.match(make_request("b", list(range(9)))) == []


def test_least_recently_used_prefix_goes_first() -> None:
    cache = KVCache(4, 2)
    prompts = {name: [start, start + 1, 99] for name, start in (("old", 10), ("new", 20))}
    for name in ("old", "new", "old"):
        request = make_request(name, prompts[name])
        admit(cache, request)
        finish(cache, request)
    other = make_request("other", [1, 2, 3, 4, 5, 6])
    admit(cache, other)
    assert len(cache.match(make_request("again", prompts["old"]))) == 1
    assert len(cache.match(make_request("again", prompts["new"]))) == 0


def test_same_tokens_computed_twice_are_kept_once() -> None:
    cache = KVCache(8, 2)
    twins = [make_request(rid, [1, 2, 3, 4, 5]) for rid in "ab"]
    for twin in twins:
        admit(cache, twin)
    for twin in twins:
        twin.num_tabled = len(twin.pages)
        cache.insert(twin)
    assert twins[0].pages[:2] == twins[1].pages[:2]
    assert twins[1].num_tabled == 0, "the page table must be told about the changed pages"
    assert cache.num_cached == 2
    cache.check(twins)


def test_forgotten_pages_are_not_found_again() -> None:
    cache = KVCache(8, 2)
    good, bad = make_request("good", [1, 2, 3]), make_request("bad", [1, 2, 3, 4, 5])
    admit(cache, good)
    finish(cache, good)
    holder = make_request("holder", [1, 2, 9])
    admit(cache, holder)
    admit(cache, bad)
    cache.insert(bad)
    cache.forget(bad)
    assert len(cache.match(make_request("again", [1, 2, 3, 4, 5]))) == 1, "what another request holds must stay"
    cache.check([holder])


@pytest.mark.parametrize("damage", ["lost", "twice", "refs", "unlocked", "path"])
def test_check_sees_damage(damage: str) -> None:
    cache = KVCache(8, 2)
    request = make_request("a", [1, 2, 3, 4, 5])
    admit(cache, request)
    cache.insert(request)
    cache.check([request])
    assert request.node is not None
    if damage == "lost":
        cache.free_pages.pop()
    elif damage == "twice":
        cache.free_pages.append(request.pages[-1])
    elif damage == "refs":
        request.node.refs += 1
    elif damage == "unlocked":
        cache.unlocked[request.node] = None
    else:
        request.pages[0], request.pages[1] = request.pages[1], request.pages[0]
    with pytest.raises(AssertionError):
        cache.check([request])


def test_work_per_operation_does_not_grow_with_the_cache() -> None:
    """Counts node visits, not time: matching and evicting touch only the pages of the request at hand."""
    cache = KVCache(3000, 2)
    rng = random.Random(0)
    for number in range(400):
        request = make_request(str(number), [rng.randrange(50) for _ in range(20)])
        admit(cache, request)
        finish(cache, request)
    visits = 0
    key = cache.key

    def counted(request: Request, index: int) -> tuple[int | str, ...]:
        nonlocal visits
        visits += 1
        return key(request, index)

    cache.key = counted  # type: ignore[method-assign]
    request = make_request("last", [77] * 20)
    admit(cache, request)
    finish(cache, request)
    assert visits <= 1 + 10
