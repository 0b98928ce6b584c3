# SPDX-License-Identifier: Apache-2.0
"""A state machine drives the real server and worker: arrivals, disconnects, aborts, kills, flushes.

No request is lost, no page leaks (the worker audits its books after every step), no token is wrong. More examples under
HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.server.test_kill import events
from tests.server.toy_server import IS_NIGHTLY, START_SECONDS, Oracle, ToyServer, completion, toy_server

PREFIXES = ([], [3] * 9, [3] * 9 + [4] * 8, list(range(40)))
REQUESTS = st.tuples(
    st.sampled_from(PREFIXES),
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 150),
    st.booleans(),  # stream
)
NUMBERS = st.integers(0, 999)  # of a request, modulo how many there are
MAX_LIVING = 12
MAX_KILLS = 1000 if IS_NIGHTLY else 3  # each costs the start of a worker


@dataclass
class Asked:
    """One request and what came of it; `outcome` is "answered", "failed", "aborted" or "left"."""

    name: str
    prompt: list[int]
    count: int
    tokens: list[int] = field(default_factory=list)
    outcome: str = ""
    error: Any = None
    started: threading.Event = field(default_factory=threading.Event)
    was_aborted: bool = False
    num_kills: int = 0  # kills before it was asked
    future: Any = None


class Clients:
    """Asynchronous clients in a thread of their own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def ask(self, asked: Asked, stream: bool) -> None:
        body = completion(asked.prompt, asked.count, stream=stream)
        async with (
            aiohttp.ClientSession() as http,
            http.post(self.url + "/v1/completions", json=body, headers={"X-Request-Id": asked.name}) as response,
        ):
            asked.started.set()
            if response.status != 200:
                asked.outcome, asked.error = "failed", (response.status, (await response.json())["error"])
                return
            choices = [choice async for choice in _choices(response, asked)] if stream else (await response.json())["choices"]
            asked.tokens = [token for choice in choices for token in choice.get("token_ids", [])]
            if not asked.outcome:
                asked.outcome = "aborted" if choices[-1]["finish_reason"] == "abort" else "answered"


async def _choices(response: aiohttp.ClientResponse, asked: Asked) -> Any:
    last = ""
    async for last in events(response):
        if last.startswith('{"error"'):
            asked.outcome, asked.error = "failed", (500, json.loads(last)["error"])
        elif last != "[DONE]":
            assert not asked.outcome, "data after an error"
            for choice in json.loads(last)["choices"]:
                yield choice
    assert (last == "[DONE]") == (not asked.outcome), "a stream ends with [DONE] or with an error, not with both"


class ServerLife(RuleBasedStateMachine):
    """Rules are what clients and fate do; `teardown` waits for the end of all and judges.

    Whether a rule has anything to do depends on time, so the rules look for themselves: hypothesis must see the same choices again.
    """

    server: ClassVar[ToyServer]
    clients: ClassVar[Clients]
    oracle: ClassVar[Oracle]
    num_asked: ClassVar[int] = 0
    num_kills: ClassVar[int] = 0
    num_preempted: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self.has_killed = False

    def living(self) -> list[Asked]:
        return [asked for asked in self.asked if not asked.outcome and not asked.future.done()]

    @initialize(requests=st.lists(REQUESTS, min_size=3, max_size=6))
    def open(self, requests: list[tuple[list[int], list[int], int, bool]]) -> None:
        for request in requests:
            self.arrive_one(*request)

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def arrive(self, requests: list[tuple[list[int], list[int], int, bool]]) -> None:
        for request in requests:
            if len(self.living()) < MAX_LIVING:
                self.arrive_one(*request)

    def arrive_one(self, prefix: list[int], tail: list[int], count: int, stream: bool) -> None:
        kind = type(self)
        kind.num_asked += 1
        asked = Asked(f"life-{kind.num_asked}", prefix + tail, count, num_kills=kind.num_kills)
        asked.future = self.clients.do(self.clients.ask(asked, stream))
        self.asked.append(asked)

    @rule(number=NUMBERS)
    def disconnect(self, number: int) -> None:
        asked = self.asked[number % len(self.asked)]
        if asked.future.cancel():
            asked.outcome = "left"

    @rule(number=NUMBERS)
    def abort(self, number: int) -> None:
        asked = self.asked[number % len(self.asked)]
        asked.was_aborted = True
        assert self.server.request("/abort_request", {"rid": asked.name})[0] == 200

    @rule()
    def flush(self) -> None:
        assert self.server.request("/flush_cache")[0] in (200, 400)

    @rule(seconds=st.sampled_from([0.01, 0.1]))
    def wait(self, seconds: float) -> None:
        threading.Event().wait(seconds)

    @rule()
    def kill(self) -> None:
        if self.living() and not self.has_killed and self.num_kills < MAX_KILLS:
            self.has_killed = True
            type(self).num_kills += 1
            self.server.kill_worker()

    def teardown(self) -> None:
        for asked in self.asked:
            if asked.outcome != "left":
                asked.future.result(START_SECONDS)
                self.judge(asked)
        self.server.assert_idle()
        info = self.server.request("/server_info")[1]
        type(self).num_preempted += info["internal_states"][0]["preemptions"]
        assert info["num_crashes"] == self.num_kills, "the worker died of its own: " + self.server.log

    def judge(self, asked: Asked) -> None:
        expected = self.oracle.tokens(asked.prompt, asked.count)
        assert asked.tokens == expected[: len(asked.tokens)], f"{asked.name}: wrong tokens"
        if asked.outcome == "failed":
            status, error = asked.error
            assert asked.num_kills < self.num_kills, f"{asked.name}: failed although nothing was killed: {error}"
            assert (status, error["code"]) in ((500, "internal_error"), (503, "unhealthy")), error
            assert status == 503 or asked.name in error["message"]
        elif asked.outcome == "aborted":
            assert asked.was_aborted
        else:
            assert asked.outcome == "answered"
            assert len(asked.tokens) == asked.count


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[ServerLife]]:
    flags = "--max-crashes 1000000 --log-level error --max-running-requests 4 --chunked-prefill-size 24 --max-total-tokens 400"
    flags += " --schedule-conservativeness 0"  # reserve nothing for outputs, so that requests are preempted
    with contextlib.ExitStack() as stack:
        ServerLife.server = stack.enter_context(toy_server(Path(tmp_path_factory.mktemp("life")), *flags.split()))
        ServerLife.clients = Clients(ServerLife.server.url)
        ServerLife.oracle = Oracle()
        yield ServerLife


@pytest.mark.timeout(4 * 3600 if IS_NIGHTLY else 900)
def test_life(life: type[ServerLife]) -> None:
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=200 if IS_NIGHTLY else 8,
            stateful_step_count=40 if IS_NIGHTLY else 20,
            deadline=None,
            derandomize=not IS_NIGHTLY,
            database=None,
            phases=[Phase.generate],  # a server with a history cannot be shrunk
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert life.num_asked > 30
    assert life.num_kills > 1
    assert life.num_preempted > 0
