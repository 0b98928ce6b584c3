# SPDX-License-Identifier: Apache-2.0
"""/v1/chat/completions through the official client: bodies, chunk order, usage, stops, log-probabilities."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rocm_infer.text.chat import ChatTemplate
from tests.server.fakes import CONTEXT, MODEL, TOKENIZER, FakeClient, Harness, Script, logprob_of, run
from tests.text.toys import CONFIG

HI: list[Any] = [{"role": "user", "content": "hi"}]
TEXT = Script().text
PROMPT = f"{CONFIG['bos_token']}<|user|>hi<|end|><|assistant|>"
NUM_PROMPT = len(TOKENIZER.encode(PROMPT, add_special_tokens=False))
NUM_TOKENS = len(TOKENIZER.encode(TEXT)) + 1  # and the end token


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HI, **fields}


async def chunks_of(server: Harness, **fields: Any) -> list[dict[str, Any]]:
    events = await server.events("/v1/chat/completions", body(stream=True, **fields))
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_the_whole_answer() -> None:
    async def scenario(server: Harness) -> None:
        answer = await server.sdk.chat.completions.create(model=MODEL, messages=HI)
        assert answer.id.startswith("chatcmpl-")
        assert (answer.object, answer.model) == ("chat.completion", MODEL)
        assert (answer.system_fingerprint or "").startswith("ri-")
        (choice,) = answer.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
        assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", TEXT, None)
        usage = answer.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (NUM_PROMPT, NUM_TOKENS)
        assert usage.total_tokens == NUM_PROMPT + NUM_TOKENS
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 4
        assert TOKENIZER.decode(server.engine.requests[0].prompt_ids, skip_special_tokens=False) == PROMPT

    run(scenario, FakeClient(Script(num_cached=4)))


def test_chunk_order() -> None:
    async def scenario(server: Harness) -> None:
        async with server.http.post(server.url + "/v1/chat/completions", json=body(stream=True)) as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-cache"
            assert response.headers["X-Accel-Buffering"] == "no"
        chunks = await chunks_of(server)
        shared = [
            {name: chunk[name] for name in ("id", "created", "model", "object", "system_fingerprint")} for chunk in chunks
        ]
        assert all(head == shared[0] for head in shared)
        assert shared[0]["object"] == "chat.completion.chunk"
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all(list(delta) == ["content"] and delta["content"] for delta in deltas[1:-1])
        assert deltas[-1] == {}
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert text_of(chunks) == TEXT
        assert not any("usage" in chunk for chunk in chunks)

    run(scenario)


def test_the_client_reads_the_stream() -> None:
    async def scenario(server: Harness) -> None:
        stream = await server.sdk.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == TEXT
        assert usage is not None
        assert usage.completion_tokens == NUM_TOKENS

    run(scenario)


def test_usage_in_streams() -> None:
    async def scenario(server: Harness) -> None:
        chunks = await chunks_of(server, stream_options={"include_usage": True})
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["total_tokens"] == NUM_PROMPT + NUM_TOKENS
        options = {"include_usage": True, "continuous_usage_stats": True}
        counts = [chunk["usage"]["completion_tokens"] for chunk in await chunks_of(server, stream_options=options)]
        assert counts == sorted(counts)
        assert counts[-1] == NUM_TOKENS

    run(scenario)


@pytest.mark.parametrize(("limit", "reason"), [(1, "length"), (NUM_TOKENS - 1, "length"), (NUM_TOKENS, "stop")])
def test_finish_reasons(limit: int, reason: str) -> None:
    async def scenario(server: Harness) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            status, answer = await server.post("/v1/chat/completions", body(**{name: limit}))
            assert status == 200
            assert answer["choices"][0]["finish_reason"] == reason
            assert answer["usage"]["completion_tokens"] == limit
        status, answer = await server.post("/v1/chat/completions", body(max_tokens=50, max_completion_tokens=2))
        assert answer["usage"]["completion_tokens"] == 2

    run(scenario)


@pytest.mark.parametrize("stop", ["lo th", ["zzz", " there"], "ö", "H"])
@pytest.mark.parametrize("step", [1, 3])
def test_stop_strings_across_tokens(stop: Any, step: int) -> None:
    """The stop string is never shown, the rest of the request is aborted, stream and whole agree."""
    stops = [stop] if isinstance(stop, str) else stop
    expected = min((TEXT[: TEXT.index(s)] for s in stops if s in TEXT), key=len)

    async def scenario(server: Harness) -> None:
        _, answer = await server.post("/v1/chat/completions", body(stop=stop))
        chunks = await chunks_of(server, stop=stop)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == text_of(chunks) == expected
        for ended in (choice, chunks[-1]["choices"][0]):
            assert ended["finish_reason"] == "stop"
            assert ended["stop_reason"] == ended["matched_stop"]
            assert ended["matched_stop"] in stops
        assert len(server.engine.aborted) == 2
        assert server.engine.num_requests == 0
        assert answer["usage"]["completion_tokens"] < NUM_TOKENS
        _, kept = await server.post("/v1/chat/completions", body(stop=stop, include_stop_str_in_output=True))
        assert kept["choices"][0]["message"]["content"] == expected + choice["matched_stop"]

    run(scenario, FakeClient(Script(step=step)))


def test_a_held_back_stop_prefix_is_released_at_the_end() -> None:
    async def scenario(server: Harness) -> None:
        assert text_of(await chunks_of(server, stop="!!")) == TEXT

    run(scenario)


def test_characters_split_over_tokens_arrive_whole() -> None:
    async def scenario(server: Harness) -> None:
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in await chunks_of(server)]
        assert "😀" in pieces
        assert "ö" in pieces
        assert not any("\ufffd" in piece for piece in pieces)

    run(scenario)


@pytest.mark.parametrize("stop", [None, "ere"])
def test_logprobs_stream_as_they_are_whole(stop: str | None) -> None:
    async def scenario(server: Harness) -> None:
        asked = {"logprobs": True, "top_logprobs": 2, "stop": stop}
        _, answer = await server.post("/v1/chat/completions", body(**asked))
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == answer["usage"]["completion_tokens"]
        chunks = await chunks_of(server, **asked)
        found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [entry for logprobs in found if logprobs for entry in logprobs["content"]] == content
        first = content[0]
        token_id = TOKENIZER.encode("H")[0]
        assert (first["token"], first["bytes"], first["logprob"]) == ("H", [72], logprob_of(0, token_id))
        assert [entry["token"] for entry in first["top_logprobs"]] == ["H", "I"]

    run(scenario)


def test_bytes_of_partial_characters() -> None:
    async def scenario(server: Harness) -> None:
        _, answer = await server.post("/v1/chat/completions", body(logprobs=True))
        content = answer["choices"][0]["logprobs"]["content"]
        assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == TEXT
        assert all(entry["top_logprobs"] == [] for entry in content)

    run(scenario)


def test_several_choices() -> None:
    async def scenario(server: Harness) -> None:
        _, answer = await server.post("/v1/chat/completions", body(n=3, seed=7, stop="there"))
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello "] * 3
        assert answer["usage"]["prompt_tokens"] == NUM_PROMPT
        assert [request.params.seed for request in server.engine.requests] == [7, 8, 9]
        chunks = await chunks_of(server, n=3)
        assert [text_of(chunks, index) for index in range(3)] == [TEXT] * 3
        for index in range(3):
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert [choice["finish_reason"] for choice in own].count("stop") == 1
            assert own[-1]["delta"] == {}

    run(scenario)


def test_parameters_reach_the_engine() -> None:
    async def scenario(server: Harness) -> None:
        fields = {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.1,
            "logit_bias": {"3": -100},
            "seed": -5,
            "min_tokens": 2,
            "stop_token_ids": [4],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "max_tokens": 9,
            "priority": 3,
            "cache_salt": "a",
            "user": "someone",
        }
        status, _ = await server.post("/v1/chat/completions", body(**fields))
        assert status == 200
        request = server.engine.requests[0]
        params = request.params
        assert (request.priority, request.salt) == (3, "a")
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.1)
        assert (params.logit_bias, params.seed, params.min_tokens) == (((3, -100.0),), -5, 2)
        assert (params.stop_token_ids, params.ignore_eos, params.max_tokens) == ((4,), True, 9)

    run(scenario)


def test_skip_special_tokens() -> None:
    async def scenario(server: Harness) -> None:
        _, answer = await server.post("/v1/chat/completions", body(skip_special_tokens=False, no_stop_trim=True))
        assert answer["choices"][0]["message"]["content"] == TEXT + "<|end|>"

    run(scenario)


def test_return_token_ids() -> None:
    async def scenario(server: Harness) -> None:
        prompt_ids = TOKENIZER.encode(PROMPT, add_special_tokens=False)
        _, answer = await server.post("/v1/chat/completions", body(return_token_ids=True))
        assert answer["prompt_token_ids"] == prompt_ids
        assert TOKENIZER.decode(answer["choices"][0]["token_ids"]) == TEXT
        chunks = await chunks_of(server, return_token_ids=True)
        assert chunks[0]["prompt_token_ids"] == prompt_ids
        assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
        streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
        assert streamed == answer["choices"][0]["token_ids"]

    run(scenario)


def test_prompt_logprobs() -> None:
    async def scenario(server: Harness) -> None:
        _, answer = await server.post("/v1/chat/completions", body(prompt_logprobs=1))
        assert answer["prompt_logprobs"][0] is None
        assert len(answer["prompt_logprobs"]) == NUM_PROMPT
        assert next(iter(answer["prompt_logprobs"][1].values()))["decoded_token"] == "<|user|>"

    run(scenario)


def test_template_variables_and_continuation() -> None:
    async def scenario(server: Harness) -> None:
        messages = [*HI, {"role": "assistant", "content": "I think"}]
        await server.post("/v1/chat/completions", body(messages=messages, continue_final_message=True))
        await server.post("/v1/chat/completions", body(add_generation_prompt=False))
        await server.post("/v1/chat/completions", body(chat_template_kwargs={"bos_token": "X"}, reasoning_effort="none"))
        prompts = [TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False) for request in server.engine.requests]
        assert prompts[0].endswith("<|assistant|>I think")
        assert prompts[1].endswith("hi<|end|>")
        assert prompts[2].startswith("X<|user|>")

    run(scenario)


def test_the_rest_of_the_context_is_the_default_limit() -> None:
    async def scenario(server: Harness) -> None:
        await server.post("/v1/chat/completions", body())
        assert server.engine.requests[0].params.max_tokens is None
        status, answer = await server.post("/v1/chat/completions", body(max_tokens=CONTEXT - NUM_PROMPT))
        assert status == 200
        status, answer = await server.post("/v1/chat/completions", body(max_tokens=CONTEXT - NUM_PROMPT + 1))
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"

    run(scenario)


@pytest.mark.parametrize("begun", [False, True])
def test_thinking_is_returned_apart(begun: bool) -> None:
    said = "<think>\nwhy\n</think>\n\nYes."
    template = "{{ messages[0].content }}" + ("<think>\n" if begun else "{# </think> #}")
    said = said.removeprefix("<think>") if begun else said

    async def scenario(server: Harness) -> None:
        object.__setattr__(server.service.files, "template", ChatTemplate(template, {}))
        _, answer = await server.post("/v1/chat/completions", body())
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("why", "Yes.")
        num_thinking = len(TOKENIZER.encode(said[: said.index("</think>") + 8]))
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_thinking}
        chunks = await chunks_of(server, stream_options={"include_usage": True})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "why"
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
        assert all(deltas[:-1])
        assert chunks[-1]["usage"] == answer["usage"]
        _, plain = await server.post("/v1/chat/completions", body(separate_reasoning=False))
        assert plain["choices"][0]["message"] == {"role": "assistant", "content": said, "refusal": None}

    run(scenario, FakeClient(Script(text=said)))


def test_models_that_do_not_think_may_say_so() -> None:
    async def scenario(server: Harness) -> None:
        _, answer = await server.post("/v1/chat/completions", body())
        assert answer["choices"][0]["message"]["content"] == "<think>x</think>y"

    run(scenario, FakeClient(Script(text="<think>x</think>y")))
