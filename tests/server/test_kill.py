# SPDX-License-Identifier: Apache-2.0
"""The worker is killed again and again under load: every request is answered in full or fails properly, none is lost.

3 kills; 100 under HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rocm_infer.engine.capsule import read_capsule
from tests.server.toy_server import (
    CRASH,
    IS_NIGHTLY,
    NUM_TEXTS,
    SLEEP,
    START_SECONDS,
    Oracle,
    ToyServer,
    completion,
    toy_server,
)

NUM_KILLS = 100 if IS_NIGHTLY else 3
NUM_CLIENTS = 12
FAILURES = {(500, "internal_error"), (503, "unhealthy"), (503, "starting")}


class Client:
    """Asks until told to stop, and judges every answer."""

    def __init__(self, url: str, seed: int, tally: Counter[str]) -> None:
        self._url = url
        self._rng = random.Random(seed)
        self._tally = tally
        self.answers: list[tuple[list[int], list[int], int]] = []  # prompt, tokens, tokens asked for

    async def run(self, stop: asyncio.Event) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=START_SECONDS)) as http:
            number = 0
            while not stop.is_set():
                number += 1
                await self._ask(http, f"c{self._rng.randrange(1 << 40)}-{number}")

    async def _ask(self, http: aiohttp.ClientSession, name: str) -> None:
        prompt = [self._rng.randrange(5)] * 8 + [self._rng.randrange(NUM_TEXTS) for _ in range(self._rng.randrange(1, 20))]
        count, stream = self._rng.randrange(1, 120), self._rng.random() < 0.5
        body = completion(prompt, count, stream=stream)
        async with http.post(self._url + "/v1/completions", json=body, headers={"X-Request-Id": name}) as response:
            if response.status != 200:
                self._fail(response.status, await response.json(), name)
                await asyncio.sleep(0.5)
            elif stream:
                await self._read(response, prompt, count, name)
            else:
                self._answer(prompt, (await response.json())["choices"][0]["token_ids"], count)

    async def _read(self, response: aiohttp.ClientResponse, prompt: list[int], count: int, name: str) -> None:
        """A stream ends with [DONE], or with one error event and no [DONE]."""
        tokens: list[int] = []
        last = ""
        async for data in events(response):
            assert not last.startswith('{"error"'), f"{data!r} follows an error"
            last = data
            if data.startswith("{") and not data.startswith('{"error"'):
                tokens += [token for choice in json.loads(data)["choices"] for token in choice.get("token_ids", [])]
        if last == "[DONE]":
            self._answer(prompt, tokens, count)
        else:
            self._fail(500, json.loads(last), name)
            self.answers.append((prompt, tokens, len(tokens)))
            self._tally["broken streams"] += 1

    def _answer(self, prompt: list[int], tokens: list[int], count: int) -> None:
        self._tally["answered"] += 1
        self.answers.append((prompt, tokens, count))

    def _fail(self, status: int, body: Any, name: str) -> None:
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (status, error["code"]) in FAILURES, error
        if status == 500:
            assert name in error["message"], "an error must carry the request's id"
        self._tally[error["code"]] += 1


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in response.content:
        text = line.decode().strip()
        if text.startswith("data: "):
            yield text.removeprefix("data: ")


@pytest.mark.timeout(4 * 3600 if IS_NIGHTLY else 900)
def test_kills_under_load(tmp_path: Path) -> None:
    tally: Counter[str] = Counter()
    with toy_server(tmp_path, "--max-crashes", "1000000", "--log-level", "error") as server:
        clients = [Client(server.url, seed, tally) for seed in range(NUM_CLIENTS)]
        asyncio.run(_kill_under_load(server, clients))
        server.assert_idle()
        status, info = server.request("/server_info")
        assert (status, info["num_crashes"]) == (200, NUM_KILLS)
        oracle = Oracle()
        answers = [answer for client in clients for answer in client.answers]
        for prompt, tokens, count in answers if len(answers) < 600 else random.Random(0).sample(answers, 600):
            assert tokens == oracle.tokens(prompt, count)
        capsules = sorted(server.capsules.iterdir())
        assert min(NUM_KILLS, 20) == len(capsules)
        assert all("signal 9" in read_capsule(path).reason for path in capsules)
        assert server.process.poll() is None
    sys.stderr.write(f"{NUM_KILLS} kills: {dict(tally)}\n")
    assert tally["answered"] > NUM_KILLS
    assert tally["internal_error"] >= NUM_KILLS, "the kills hit nobody"


async def _kill_under_load(server: ToyServer, clients: list[Client]) -> None:
    stop = asyncio.Event()
    tasks = [asyncio.ensure_future(client.run(stop)) for client in clients]
    rng = random.Random(0)
    for _ in range(NUM_KILLS):
        await asyncio.sleep(0.3 + rng.random())
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.to_thread(server.kill_worker)
    await asyncio.sleep(0.5)
    stop.set()
    await asyncio.gather(*tasks)


@pytest.mark.timeout(900)
def test_a_life_of_misfortunes(tmp_path: Path) -> None:
    """Deadlines, a step that hangs, a step that ends the process, and after the third crash the end of the server."""
    flags = ["--request-timeout", "8", "--step-timeout", "16", "--log-level", "error", "--capsule-dir", "none"]
    with toy_server(tmp_path, *flags) as server:
        status, body = server.complete([SLEEP], 2)
        assert (status, body["error"]["code"], body["error"]["type"]) == (500, "timeout", "server_error")
        assert "not finished within 8 seconds" in body["error"]["message"]
        server.wait_for(lambda: server.num_starts == 2)  # although nobody waits for the step any more
        assert "stacks of the engine process" in server.log
        assert "in forward" in server.log
        server.wait_for(lambda: server.complete([1], 2)[0] == 200)
        server.assert_idle()
        status, body = server.complete([CRASH], 2)
        assert status == 500
        assert "status 42" in body["error"]["message"]
        server.wait_for(lambda: server.num_starts == 3)
        server.wait_for(lambda: server.complete([1], 2)[0] == 200)
        with contextlib.suppress(OSError):
            server.complete([CRASH], 2)
        assert server.process.wait(START_SECONDS) == 1
        server.wait_for(lambda: "died 3 times within 3600 s, giving up" in server.log)
        assert "Traceback" not in server.log.split("giving up")[1]
        assert not server.capsules.exists()
