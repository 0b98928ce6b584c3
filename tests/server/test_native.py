# SPDX-License-Identifier: Apache-2.0
"""/generate, /flush_cache and /abort_request as SGLang's clients use them."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from tests.server.fakes import TOKENIZER, FakeClient, Harness, Script, eventually, run

TEXT = Script().text


def test_one_prompt() -> None:
    async def scenario(server: Harness) -> None:
        status, answer = await server.post("/generate", {"text": "abc", "rid": "mine"})
        assert status == 200
        assert answer["text"] == TEXT
        assert TOKENIZER.decode(answer["output_ids"]) == TEXT
        meta = answer["meta_info"]
        assert meta["id"] == "mine"
        assert meta["finish_reason"] == {"type": "stop", "matched": TOKENIZER.eos_id}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, len(answer["output_ids"]))
        assert meta["e2e_latency"] > 0
        params = server.engine.requests[0].params
        assert (params.max_tokens, params.temperature) == (128, 1.0)

    run(scenario)


def test_a_list_gives_a_list() -> None:
    async def scenario(server: Harness) -> None:
        settings = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "sampling_seed": 4}]
        _, answer = await server.post("/generate", {"input_ids": [[1, 2], [3]], "sampling_params": settings})
        assert [part["text"] for part in answer] == ["H", "He"]
        assert answer[1]["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
        _, single = await server.post("/generate", {"text": ["a"], "sampling_params": {"max_new_tokens": 1}})
        assert [part["text"] for part in single] == ["H"]
        _, several = await server.post("/generate", {"text": "a", "sampling_params": {"n": 2}})
        assert len(several) == 2

    run(scenario)


def test_streams_are_cumulative() -> None:
    async def scenario(server: Harness) -> None:
        events = await server.events("/generate", {"text": "a", "stream": True, "sampling_params": {"stop": "there"}})
        assert events[-1] == "[DONE]"
        parts = [json.loads(event) for event in events[:-1]]
        texts = [part["text"] for part in parts]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert texts[-1] == "Hello "
        assert [part["meta_info"]["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "there"}
        counts = [part["meta_info"]["completion_tokens"] for part in parts]
        assert counts == sorted(counts)

    run(scenario)


def test_a_streamed_list_tells_its_parts_apart() -> None:
    async def scenario(server: Harness) -> None:
        events = await server.events("/generate", {"text": ["a", "b"], "stream": True})
        last: dict[int, str] = {}
        ends: list[int] = []
        for event in events[:-1]:
            part = json.loads(event)
            last[part["index"]] = part["text"]
            ends += [part["index"]] * (part["meta_info"]["finish_reason"] is not None)
        assert last == {0: TEXT, 1: TEXT}
        assert sorted(ends) == [0, 1]

    run(scenario)


def test_logprobs() -> None:
    async def scenario(server: Harness) -> None:
        fields: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        asked = {"text": "abc", "sampling_params": {"max_new_tokens": 2}, **fields, "return_text_in_logprobs": True}
        _, answer = await server.post("/generate", asked)
        meta = answer["meta_info"]
        assert meta["input_token_logprobs"][0][0] is None
        assert [entry[2] for entry in meta["input_token_logprobs"]] == ["a", "b", "c"]
        assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[39, "H"], [68, "e"]]
        assert [len(entry) for entry in meta["output_top_logprobs"]] == [2, 2]
        _, plain = await server.post("/generate", {"text": "abc", "return_logprob": True})
        assert plain["meta_info"]["input_token_logprobs"] == []
        assert plain["meta_info"]["output_token_logprobs"][0][2] is None

    run(scenario)


def test_abort_by_id() -> None:
    async def scenario(server: Harness) -> None:
        asked = asyncio.ensure_future(server.post("/generate", {"text": "a", "rid": "slow"}))
        other = asyncio.ensure_future(server.post("/v1/completions", {"prompt": "a", "request_id": "slow2"}))
        await eventually(lambda: server.engine.num_requests == 2)
        assert (await server.post("/abort_request", {"rid": "unknown"}))[1] == {"aborted": 0}
        assert (await server.post("/abort_request", {"rid": "slow"}))[1] == {"aborted": 1}
        status, answer = await asked
        assert status == 200
        assert answer["meta_info"]["finish_reason"] == {"type": "abort"}
        assert server.engine.num_requests == 1
        assert (await server.post("/abort_request", {"abort_all": True}))[1] == {"aborted": 1}
        assert (await other)[1]["choices"][0]["finish_reason"] == "abort"

    run(scenario, FakeClient(Script(hang_after=2)))


def test_flush_cache() -> None:
    async def scenario(server: Harness) -> None:
        assert await server.get("/flush_cache") == (200, "Cache flushed.\n")
        running = asyncio.ensure_future(server.post("/generate", {"text": "a"}))
        await eventually(lambda: server.engine.num_requests == 1)
        status, answer = await server.get("/flush_cache")
        assert status == 400
        assert "1 requests are running" in answer["error"]["message"]
        running.cancel()
        assert server.engine.flushes == 1

    run(scenario, FakeClient(Script(hang_after=0)))
