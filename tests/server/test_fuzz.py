# SPDX-License-Identifier: Apache-2.0
"""Bodies with broken bytes, and what the OpenAPI document allows and forbids: no 500, no hang, no growing memory.

1,500 broken bodies; 10,000 and more schemathesis examples under HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import hypothesis
import psutil
import pytest

from tests.server.toy_server import IS_NIGHTLY, NUM_TEXTS, ToyServer, toy_server

NUM_BODIES = 10_000 if IS_NIGHTLY else 1_500
NUM_EXAMPLES = 200 if IS_NIGHTLY else 8
NUM_CLIENTS = 16
SECONDS_TO_ANSWER = 300  # hang if not by then
MAX_GROWTH = 24 << 20  # bytes of resident memory between the first third and the end
# A status that a body may cause: never a 500, and a 503 would mean that the worker died.
ALLOWED = {200, 400, 404, 413, 429}

HI = [{"role": "user", "content": "hi"}]
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"model": "toy", "messages": HI, "max_tokens": 3, "temperature": 0.7, "seed": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": "é😀"}, *HI], "stop": ["x", "yy"], "max_tokens": 4}),
    ("/v1/chat/completions", {"messages": HI, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 3, "max_completion_tokens": 2, "n": 2}),
    ("/v1/chat/completions", {"messages": HI, "logit_bias": {"5": -100, "7": 3.5}, "presence_penalty": -1.5, "max_tokens": 2}),
    ("/v1/completions", {"prompt": ["a", "bc"], "max_tokens": 2, "n": 2, "best_of": 3, "top_p": 0.9}),
    ("/v1/completions", {"prompt": [1, 2, 3], "echo": True, "logprobs": 2, "max_tokens": 0}),
    ("/v1/completions", {"prompt": [[4, 5], [6]], "max_tokens": 2, "min_tokens": 1, "stop_token_ids": [9], "priority": 3}),
    ("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 3, "ignore_eos": True, "cache_salt": "s"}),
    ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 2, "top_k": 5}, "return_logprob": True}),
    ("/generate", {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 2}, "stream": True}),
    ("/tokenize", {"prompt": "hello wörld", "add_special_tokens": False}),
    ("/tokenize", {"messages": HI}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    (
        "/v1/messages",
        {
            "model": "toy",
            "max_tokens": 2,
            "system": "s",
            "stop_sequences": ["x"],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "b"}]},
            ],
        },
    ),
    ("/v1/messages", {"model": "toy", "max_tokens": 2, "messages": HI, "stream": True, "thinking": {"type": "disabled"}}),
    ("/v1/messages/count_tokens", {"model": "toy", "messages": HI}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 2, "instructions": "i", "reasoning": {"effort": "low"}}),
    (
        "/v1/responses",
        {
            "stream": True,
            "max_output_tokens": 2,
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "b"},
            ],
        },
    ),
    ("/start_profile", {"output_dir": "a", "num_steps": 1, "activities": ["CPU"]}),
    ("/abort_request", {"rid": "none"}),
)
TOKENS = (
    *(b"null", b"true", b"-1", b"0", b"1e400", b"NaN", b"1e-400", b"99999999999999999999999", b"0.5", b"[]", b"{}", b'""'),
    *(b"-9223372036854775809", b'"\\ud800"', b'"\\u0000"', b"[[[[]]]]", b"[" * 300, b'{"a":' * 300, b"\xff\xfe", b"\xc3"),
    *(b"{{7*7}}", b"{% for %}", b"%s%n", b"../../etc/passwd", b'"a"' + b"," * 9, b"\xf0\x9f\x98\x80", b'"type":', b'"n":129,'),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A body with one to three wounds."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(len(made) + 1)
        end = min(len(made), start + rng.choice((0, 1, 1, 2, 4, 8, 30)))
        kind = rng.randrange(6)
        if kind == 0 and made:
            made[start % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[start:end]
        elif kind == 2:
            made[start:end] = rng.choice(TOKENS)
        elif kind == 3:
            made[start:start] = made[start:end] * rng.choice((1, 2, 50))
        elif kind == 4:
            made[start:end] = rng.randbytes(rng.randrange(1, 9))
        else:  # a value, so that the JSON stays whole
            text = bytes(made)
            colons = [index for index in range(len(text)) if text[index : index + 1] == b":"]
            at = rng.choice(colons) + 1 if colons else start
            stop = next((index for index in range(at, len(text)) if text[index : index + 1] in b",}"), len(text))
            made[at:stop] = rng.choice(TOKENS)
    return bytes(made)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyServer]:
    """A small context, so that no body asks for much."""
    flags = "--context-length 48 --log-level error --max-body-size 100000"
    with toy_server(Path(tmp_path_factory.mktemp("fuzz")), *flags.split()) as made:
        yield made


async def send_all(server: ToyServer, bodies: Iterator[tuple[str, bytes]], seen: Counter[int]) -> None:
    async def client(http: aiohttp.ClientSession) -> None:
        for path, data in bodies:
            async with http.post(server.url + path, data=data, headers={"Content-Type": "application/json"}) as response:
                answer = await response.read()
            seen[response.status] += 1
            assert response.status in ALLOWED, (path, data, response.status, answer)
            if response.status != 200:
                error = json.loads(answer)["error"]
                assert set(error) == {"message", "type", "param", "code"}, (path, data, answer)
                assert len(error["message"]) < 4000, (path, data)
                assert "Traceback" not in error["message"]
            elif data.find(b'"stream"') >= 0 and answer.startswith(b"data: "):
                assert b'"internal_error"' not in answer, (path, data, answer)

    timeout = aiohttp.ClientTimeout(total=SECONDS_TO_ANSWER)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        await asyncio.gather(*(client(http) for _ in range(NUM_CLIENTS)))


def broken_bodies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    for _ in range(count):
        path, body = rng.choice(BODIES)
        yield path, mutate(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(), rng)


def test_the_bodies_are_good(server: ToyServer) -> None:
    """Otherwise their mutations would test little."""
    seen: Counter[int] = Counter()
    asyncio.run(send_all(server, iter([(path, json.dumps(body).encode()) for path, body in BODIES]), seen))
    assert seen == {200: len(BODIES)}


@pytest.mark.timeout(4 * 3600 if IS_NIGHTLY else 900)
def test_broken_bodies(server: ToyServer) -> None:
    seen: Counter[int] = Counter()
    process = psutil.Process(server.process.pid)
    asyncio.run(send_all(server, broken_bodies(NUM_BODIES // 3, 1), seen))
    early = process.memory_info().rss
    asyncio.run(send_all(server, broken_bodies(NUM_BODIES - NUM_BODIES // 3, 2), seen))
    growth = process.memory_info().rss - early
    sys.stderr.write(f"{sum(seen.values())} bodies: {dict(seen)}, memory grew by {growth / 2**20:.1f} MiB\n")
    assert seen[200] > NUM_BODIES // 20, "hardly a mutation got through to the engine"
    assert seen[400] > NUM_BODIES // 4
    assert growth < MAX_GROWTH
    assert_unharmed(server)


def assert_unharmed(server: ToyServer) -> None:
    server.assert_idle()
    info = server.request("/server_info")[1]
    assert (info["num_crashes"], info["status"]) == (0, "ready"), server.log
    assert "Traceback" not in server.log, server.log
    status, body = server.request("/v1/completions", {"prompt": [NUM_TEXTS - 1], "max_tokens": 2, "ignore_eos": True})
    assert (status, body["usage"]["completion_tokens"]) == (200, 2)


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis needs Python 3.11")
@pytest.mark.timeout(4 * 3600 if IS_NIGHTLY else 900)
def test_the_document(server: ToyServer) -> None:
    """schemathesis: requests that fit and that break the OpenAPI document."""
    import schemathesis

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    num_requests = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=NUM_EXAMPLES,
            deadline=None,
            derandomize=not IS_NIGHTLY,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: Any) -> None:
            nonlocal num_requests
            num_requests += 1
            response = case.call(timeout=SECONDS_TO_ANSWER)
            assert response.status_code < 500, (case.as_curl_command(), response.status_code, response.text)

        check()
    sys.stderr.write(f"schemathesis: {num_requests} requests\n")
    assert_unharmed(server)
