# SPDX-License-Identifier: Apache-2.0
"""Which request computes which tokens in the next step, and what happens to it afterwards. Integers only, no tensors.

One step mixes one token of every decoding request with chunks of prompts, up to a token budget. The first running request in
order of service (priority, then arrival) advances in every step, so that none starves. Waiting requests are admitted in the same
order once the pages they will need, prompt and expected output, can be set aside. If that expectation was too low and pages run
out, the last request in order of service is preempted: it keeps its tokens, gives back its pages, and is computed again later.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from rocm_infer.engine.kv_cache import Key, KVCache, Node
from rocm_infer.engine.messages import ErrorCode, ErrorInfo, FinishReason
from rocm_infer.engine.request import Request, RequestRefused, Status

# Output tokens set aside for one request at most. Few answers are longer; those that are may cause a preemption.
MAX_RESERVED_OUTPUT = 4096


class Chunk(NamedTuple):
    """Compute `num_tokens` tokens of a request from position `start` on; `samples`: they are its last known ones and a next follows."""

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclass(slots=True)
class Step:
    """The work of one forward pass. `decodes` compute their last token."""

    decodes: list[Request]
    chunks: list[Chunk]

    def sampled(self) -> list[Request]:
        """The requests that get a token from this step, in the order `commit` expects them."""
        if not self.chunks:
            return self.decodes
        return self.decodes + [chunk.request for chunk in self.chunks if chunk.samples]

    def requests(self) -> list[Request]:
        return self.decodes + [chunk.request for chunk in self.chunks]

    def split(self) -> list[Step]:
        """The same work, one request per step."""
        return [Step([request], []) for request in self.decodes] + [Step([], [chunk]) for chunk in self.chunks]


class Scheduler:
    """Queues of one engine. `schedule`, run the step, `commit` its tokens; `add` and `abort` in between.

    `max_step_tokens` bounds the tokens of one step (decodes always run; at least one prompt token does).
    """

    def __init__(
        self, cache: KVCache, max_running: int, max_waiting: int, max_step_tokens: int, conservativeness: float = 1.0
    ) -> None:
        self.cache = cache
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_step_tokens = max_step_tokens
        self.conservativeness = conservativeness
        self.requests: dict[str, Request] = {}  # living ones
        self.waiting: list[tuple[tuple[int, int], Request]] = []  # heap; may hold finished requests, skipped when they surface
        self.num_waiting = 0
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self.free_rows = list(range(max_running - 1, -1, -1))
        self.num_promised = 0  # pages reserved for running requests beyond those they hold
        self.is_blocked = False  # the head of the queue did not fit and nothing has changed since
        self.counters: Counter[str] = Counter()

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def num_slots(self) -> int:
        """Tokens the whole KV cache holds."""
        return self.cache.num_pages * self.cache.page_size

    def running(self) -> list[Request]:
        return self.prefilling + self.decoding

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestRefused: rid in use, longer than the whole cache, or queue full."""
        if request.rid in self.requests:
            raise RequestRefused("duplicate_request_id", f"request id {request.rid!r} is in use; choose another", "rid")
        if self._pages_for(request.max_len) > self.cache.num_pages:
            message = f"{request.max_len} tokens (prompt plus output) do not fit the KV cache of {self.num_slots} tokens"
            raise RequestRefused("context_length_exceeded", message)
        if self.num_waiting >= self.max_waiting:
            raise RequestRefused("queue_full", f"{self.num_waiting} requests are waiting, the most allowed; try again later")
        self.requests[request.rid] = request
        self._enqueue(request)

    def schedule(self) -> Step | None:
        """The next step, or None if there is nothing to do."""
        self._grow_decodes()
        budget = max(1, self.max_step_tokens - len(self.decoding))
        chunks = self._continue_prompts(budget)
        if self.num_waiting and not self.is_blocked:
            self._admit(chunks, budget - sum(chunk.num_tokens for chunk in chunks))
        if not self.decoding and not chunks:
            return None
        return Step(list(self.decoding), chunks)

    def commit(self, step: Step, tokens: list[int]) -> list[Request]:
        """Book a step: `tokens` are the sampled ids of `step.sampled()`, -1 where the logits were not finite. Returns the finished."""
        for request in step.decodes:
            request.num_computed += 1
        ended = self._commit_chunks(step.chunks)
        for request, token in zip(step.sampled(), tokens):
            known = request.tokens
            known.append(token)
            if token in request.stop_ids or token < 0 or len(known) == request.max_len:
                ended.append(request)
        for request in ended:
            self._end(request)
        if ended:
            self._tidy()
        return ended

    def abort(self, rid: str) -> Request | None:
        """Finish a request in any state; None if there is no such request."""
        request = self.requests.get(rid)
        if request is not None:
            self._finish(request, "abort")
            self._tidy()
        return request

    def fail(self, request: Request, code: ErrorCode, message: str) -> None:
        """Finish a request with an error; nothing it computed is reused."""
        request.error = ErrorInfo(code, message)
        self._finish(request, "error")
        self._tidy()

    def check(self) -> None:
        """Audit the books, those of the cache included. Raises AssertionError naming the first discrepancy."""
        running = self.running()
        self.cache.check(running)
        waiting = [request for _, request in self.waiting if request.status is Status.WAITING]
        assert len(waiting) == self.num_waiting, f"{len(waiting)} waiting, counted {self.num_waiting}"
        assert sorted(self.requests) == sorted(request.rid for request in running + waiting), (
            "a request is lost or queued twice"
        )
        assert all(request.status is Status.RUNNING for request in running), "a request that is not running holds a place"
        assert all(not request.pages and request.row < 0 for request in waiting), "a waiting request holds something"
        rows = self.free_rows + [request.row for request in running]
        assert sorted(rows) == list(range(self.max_running)), "a row is lost or has two owners"
        promised = sum(max(0, request.num_reserved - len(request.pages)) for request in running)
        assert promised == self.num_promised, f"{promised} pages promised, counted {self.num_promised}"
        for request in running:
            num_pages = -(-request.num_computed // self.cache.page_size)
            assert num_pages <= len(request.pages), f"{request.rid}: more tokens than its pages hold"

    def _enqueue(self, request: Request) -> None:
        heapq.heappush(self.waiting, (request.rank, request))
        self.num_waiting += 1
        self.is_blocked = False

    def _grow_decodes(self) -> None:
        page_size = self.cache.page_size
        full = [request for request in self.decoding if request.num_computed == len(request.pages) * page_size]
        for request in full:
            if request.status is Status.RUNNING:
                self._grow(request, request.num_computed + 1)

    def _continue_prompts(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in list(self.prefilling):
            if budget > 0 and request.status is Status.RUNNING:
                count = min(budget, len(request.tokens) - request.num_computed)
                if self._grow(request, request.num_computed + count):
                    chunks.append(self._chunk(request, count))
                    budget -= count
        return [chunk for chunk in chunks if chunk.request.status is Status.RUNNING]

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Append the first chunks of waiting requests while budget, rows and pages last."""
        being_computed = {self._next_page(chunk.request) for chunk in chunks}
        while budget > 0 and self.free_rows:
            request = self._first_waiting()
            if request is None:
                return
            path = self.cache.match(request)
            if self._is_being_computed(request, path, being_computed):
                return  # next step it finds that page cached
            if not self._fits(request, path):
                self.is_blocked = True
                return
            self._start(request, path)
            count = min(budget, len(request.tokens) - request.num_computed)
            grown = self._grow(request, request.num_computed + count)
            assert grown, "admission promised pages that are not there"
            chunks.append(self._chunk(request, count))
            being_computed.add(self._next_page(request))
            budget -= count

    def _first_waiting(self) -> Request | None:
        while self.waiting:
            request = self.waiting[0][1]
            if request.status is Status.WAITING:
                return request
            heapq.heappop(self.waiting)
        return None

    def _next_page(self, request: Request) -> tuple[Node | None, Key] | None:
        """Where in the prefix index the page that a running request computes now will go; None if it is not a full page."""
        if (request.num_shared + 1) * self.cache.page_size > len(request.tokens):
            return None
        return request.node, self.cache.key(request, request.num_shared)

    def _is_being_computed(
        self, request: Request, path: list[Node], being_computed: set[tuple[Node | None, Key] | None]
    ) -> bool:
        """Whether a chunk of this step computes the page that a waiting request misses first."""
        usable = (len(request.tokens) - 1) // self.cache.page_size
        if len(path) == usable or not self.cache.enable_prefix_cache or request.needs_prompt_logprobs:
            return False
        node = path[-1] if path else self.cache.root
        return (node, self.cache.key(request, len(path))) in being_computed

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.page_size)

    def _reservation(self, request: Request) -> int:
        output = min(request.max_len - len(request.tokens), MAX_RESERVED_OUTPUT)
        return self._pages_for(len(request.tokens) + int(self.conservativeness * output))

    def _fits(self, request: Request, path: list[Node]) -> bool:
        num_new = self._reservation(request) - len(path)
        num_locked = sum(node.refs == 0 for node in path)
        return num_new + num_locked <= self.cache.num_available - self.num_promised

    def _start(self, request: Request, path: list[Node]) -> None:
        heapq.heappop(self.waiting)
        self.num_waiting -= 1
        self.cache.lock(request, path)
        request.status = Status.RUNNING
        request.row = self.free_rows.pop()
        request.num_reserved = self._reservation(request)
        self.num_promised += request.num_reserved - len(path)
        self.prefilling.append(request)
        if request.num_cached < 0:
            request.num_cached = min(request.num_computed, request.num_prompt)
            self.counters["prompt_tokens"] += request.num_prompt
            self.counters["cached_tokens"] += request.num_cached

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Get the pages for `num_tokens`, preempting later requests if need be; False if this one had to go itself."""
        num_pages = self._pages_for(num_tokens)
        num_held = len(request.pages)
        while not self.cache.extend(request, num_pages):
            last = max(self.running(), key=lambda other: other.rank)
            self._preempt(last)
            if last is request:
                return False
        self.num_promised -= max(0, min(num_pages, request.num_reserved) - num_held)
        return True

    def _preempt(self, request: Request) -> None:
        self.counters["preemptions"] += 1
        self._vacate(request)
        request.status = Status.WAITING
        self._tidy()
        self._enqueue(request)

    def _chunk(self, request: Request, count: int) -> Chunk:
        start = request.num_computed
        return Chunk(request, start, count, start + count == len(request.tokens) < request.max_len)

    def _commit_chunks(self, chunks: list[Chunk]) -> list[Request]:
        """Cache what the chunks computed, pass finished prompts on to decode; returns those that want no output at all."""
        ended = []
        for request, _, count, samples in chunks:
            request.num_computed += count
            self.cache.insert(request)
            self.is_blocked = False
            if samples:
                self.prefilling.remove(request)
                self.decoding.append(request)
            elif request.num_computed == request.max_len:
                ended.append(request)
        return ended

    def _end(self, request: Request) -> None:
        """Finish a request at its last token."""
        token = request.tokens[-1]
        if token < 0:
            request.tokens.pop()
            request.error = ErrorInfo(
                "nan_logits",
                f"request {request.rid}: the model's logits are NaN or infinite{_or_stuck(request)}, no token can be chosen; "
                "the request was ended",
            )
            self._finish(request, "error")
        elif request.num_output and token in request.stop_ids:
            request.matched_stop = token
            self._finish(request, "stop")
        else:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.WAITING:
            self.num_waiting -= 1
            self.is_blocked = False  # it may have been the head
        elif reason == "error":
            self._vacate(request, trusted=False)
        else:
            self._vacate(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self.requests[request.rid]
        self.counters[f"finished_{reason}"] += 1
        if len(self.waiting) > 2 * self.num_waiting + 16:
            self.waiting = [entry for entry in self.waiting if entry[1].status is Status.WAITING]
            heapq.heapify(self.waiting)

    def _vacate(self, request: Request, trusted: bool = True) -> None:
        """Take back pages and row of a running request; its K/V stay cached if they can be trusted."""
        self.num_promised -= max(0, request.num_reserved - len(request.pages))
        if trusted:
            self.cache.insert(request)
            self.cache.release(request)
        else:
            self.cache.forget(request)
        self.free_rows.append(request.row)
        request.row = -1
        self.is_blocked = False

    def _tidy(self) -> None:
        """Drop from the running lists what no longer runs."""
        self.prefilling = [request for request in self.prefilling if request.status is Status.RUNNING]
        self.decoding = [request for request in self.decoding if request.status is Status.RUNNING]


def _or_stuck(request: Request) -> str:
    return "" if request.params.grammar is None else ", or its grammar allows no token of this vocabulary here"
