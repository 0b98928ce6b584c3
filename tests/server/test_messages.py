# SPDX-License-Identifier: Apache-2.0
"""/v1/messages: requests and answers as Anthropic's clients write and read them, over a scripted engine."""

from __future__ import annotations

import json
from typing import Any

from rocm_infer.engine.messages import ErrorInfo
from rocm_infer.text.chat import ChatTemplate
from tests.server.fakes import MODEL, TOKENIZER, FakeClient, Harness, Script, run

BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}]}


async def events(server: Harness, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(event name, data) of a stream."""
    async with server.http.post(server.url + "/v1/messages", json={**body, "stream": True}) as response:
        assert response.content_type == "text/event-stream"
        raw = (await response.read()).decode()
    found = []
    for part in raw.strip().split("\n\n"):
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


def test_a_message() -> None:
    async def scenario(server: Harness) -> None:
        status, body = await server.post("/v1/messages", BODY)
        assert status == 200
        assert body["id"].startswith("msg_")
        assert (body["type"], body["role"], body["model"]) == ("message", "assistant", MODEL)
        assert body["content"] == [{"type": "text", "text": Script().text}]
        assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
        prompt = len(server.engine.requests[0].prompt_ids)
        usage = body["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt
        assert usage["cache_read_input_tokens"] == 2
        assert usage["output_tokens"] == len(TOKENIZER.encode(Script().text)) + 1
        _, counted = await server.post("/v1/messages/count_tokens", {"model": MODEL, "messages": BODY["messages"]})
        assert counted == {"input_tokens": prompt}

    run(scenario, FakeClient(Script(num_cached=2)))


def test_the_prompt_is_that_of_the_chat_route() -> None:
    async def scenario(server: Harness) -> None:
        blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        turns = [
            {"role": "user", "content": blocks},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "c"}]},
            {"role": "user", "content": "d"},
        ]
        await server.post("/v1/messages", {**BODY, "system": [{"type": "text", "text": "s"}], "messages": turns})
        chat = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ]
        await server.post("/v1/chat/completions", {"messages": chat})
        first, second = server.engine.requests
        assert first.prompt_ids == second.prompt_ids

    run(scenario)


def test_why_it_ended() -> None:
    async def scenario(server: Harness) -> None:
        for fields, expected in (
            ({"max_tokens": 3}, ("max_tokens", None)),
            ({"stop_sequences": ["there"]}, ("stop_sequence", "there")),
            ({}, ("end_turn", None)),
        ):
            _, body = await server.post("/v1/messages", {**BODY, **fields})
            assert (body["stop_reason"], body["stop_sequence"]) == expected
            streamed = await events(server, {**BODY, **fields})
            delta = next(data for name, data in streamed if name == "message_delta")
            assert (delta["delta"]["stop_reason"], delta["delta"]["stop_sequence"]) == expected
            assert delta["usage"] == body["usage"]

    run(scenario)


def test_a_stream() -> None:
    async def scenario(server: Harness) -> None:
        streamed = await events(server, BODY)
        names = [name for name, _ in streamed]
        assert names[:2] == ["message_start", "content_block_start"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert set(names[2:-3]) == {"content_block_delta"}
        start = streamed[0][1]["message"]
        assert (start["content"], start["stop_reason"], start["role"]) == ([], None, "assistant")
        assert streamed[1][1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        texts = [data["delta"]["text"] for name, data in streamed if name == "content_block_delta"]
        assert "".join(texts) == Script().text
        assert len(texts) > 5

    run(scenario)


def test_failures_in_anthropics_form() -> None:
    async def scenario(server: Harness) -> None:
        for fields, status, kind, param in (
            ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
            ({"model": "nope"}, 404, "not_found_error", "model"),
            ({"max_tokens": 10_000}, 400, "invalid_request_error", "max_tokens"),
            ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                400,
                "invalid_request_error",
                "messages[0].content[0]",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                400,
                "invalid_request_error",
                "messages[0].content[0].text",
            ),
            ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name"),
        ):
            answer, body = await server.post("/v1/messages", {**BODY, **fields}, **{"X-Request-Id": "r-1"})
            assert (answer, body["type"], body["error"]["type"]) == (status, "error", kind), body
            assert body["error"]["param"] == param
            assert body["request_id"] == "r-1"
        answer, body = await server.post("/v1/messages", {"model": MODEL, "messages": BODY["messages"]})
        assert (answer, body["error"]["param"]) == (400, "max_tokens")

    run(scenario)


def test_a_failure_in_a_stream_is_its_last_event() -> None:
    async def scenario(server: Harness) -> None:
        streamed = await events(server, BODY)
        name, data = streamed[-1]
        assert (name, data["error"]["type"]) == ("error", "api_error")
        assert "message_stop" not in [name for name, _ in streamed]

    run(scenario, FakeClient(Script(error=ErrorInfo("internal_error", "broken"), fail_after=3)))


def test_keys_come_in_either_header() -> None:
    async def scenario(server: Harness) -> None:
        assert (await server.post("/v1/messages", BODY, **{"x-api-key": "k1"}))[0] == 200
        assert (await server.post("/v1/messages", BODY, Authorization="Bearer k1"))[0] == 200
        status, body = await server.post("/v1/messages", BODY, **{"x-api-key": "wrong"})
        assert (status, body["error"]["type"]) == (401, "authentication_error")
        assert (await server.post("/v1/messages/count_tokens", BODY))[0] == 401

    run(scenario, api_key=("k1",))


def test_thinking_is_a_block_of_its_own() -> None:
    async def scenario(server: Harness) -> None:
        object.__setattr__(server.service.files, "template", ChatTemplate("{{ messages[0].content }}{# </think> #}", {}))
        _, body = await server.post("/v1/messages", BODY)
        assert body["content"] == [
            {"type": "thinking", "thinking": "why", "signature": ""},
            {"type": "text", "text": "Yes."},
        ]
        streamed = await events(server, BODY)
        begun = [(data["index"], data["content_block"]["type"]) for name, data in streamed if name == "content_block_start"]
        assert begun == [(0, "thinking"), (1, "text")]
        assert [data["index"] for name, data in streamed if name == "content_block_stop"] == [0, 1]
        deltas = [data["delta"] for name, data in streamed if name == "content_block_delta"]
        assert "".join(delta.get("thinking", "") for delta in deltas) == "why"
        assert "".join(delta.get("text", "") for delta in deltas) == "Yes."

    run(scenario, FakeClient(Script(text="<think>\nwhy\n</think>\n\nYes.")))
