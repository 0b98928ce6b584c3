# SPDX-License-Identifier: Apache-2.0
"""Every refusal has its status and the nested body, on every route, and costs nobody else anything."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocm_infer.engine.messages import ErrorInfo
from rocm_infer.server.errors import ApiError
from rocm_infer.server.schema import ChatRequest, decode_json, parse
from tests.server.fakes import CONTEXT, MODEL, TOKENIZER, FakeClient, Harness, Script, run

HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"


def check_error(body: Any, code: str | None, param: str | None = None, type: str = "invalid_request_error") -> None:
    assert list(body) == ["error"]
    error = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["code"], error["type"]) == (code, type), error
    assert error["message"]
    if param is not None:
        assert error["param"] == param, error


BAD = {"type": "array", "uniqueItems": True}  # a schema that no grammar enforces
NAMED = {"type": "function", "function": {"name": "g"}}
BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.5}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"min_p": 1.5}, "invalid_value", "min_p"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 129}, "invalid_value", "n"),
    ({"n": 1.5}, "invalid_value", "n"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
    ({"max_tokens": 2**80}, "invalid_value", "max_tokens"),
    ({"max_tokens": CONTEXT}, "context_length_exceeded", "max_tokens"),
    ({"max_completion_tokens": CONTEXT}, "context_length_exceeded", "max_completion_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
    ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": -2.5}, "invalid_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"seed": 2**70}, "invalid_value", "seed"),
    ({"stop": ["x"] * 17}, "invalid_value", "stop"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop": "x" * 5000}, "invalid_value", "stop"),
    ({"stop": 3}, "invalid_value", "stop"),
    ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"stream": "yes"}, "invalid_value", "stream"),
    ({"stream_options": {"include_usage": 1}}, "invalid_value", "stream_options.include_usage"),
    ({"stream": True, "prompt_logprobs": 1}, "invalid_value", "prompt_logprobs"),
    ({"reasoning_effort": "extreme"}, "invalid_value", "reasoning_effort"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": "hi"}, "invalid_value", "messages"),
    ({"messages": None}, "invalid_value", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_value", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "context_length_exceeded", "messages"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_value", "continue_final_message"),
    ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0]"),
    ({"tools": [{"type": "retrieval"}]}, "invalid_value", "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
    ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "invalid_value", "tools[0].function.parameters"),
    ({"tools": [{"function": {"name": "f"}}] * 2}, "invalid_value", "tools"),
    ({"tools": {}}, "invalid_value", "tools"),
    ({"tools": [{"function": {"name": "f"}}], "tool_choice": "always"}, "invalid_value", "tool_choice"),
    ({"tools": [{"function": {"name": "f"}}], "tool_choice": NAMED}, "invalid_value", "tool_choice"),
    ({"tools": [{"function": {"name": "f", "parameters": BAD}}], "tool_choice": "required"}, "invalid_value", "tools"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}}, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "invalid_value", "response_format"),
    ({"guided_json": BAD}, "invalid_value", "guided_json"),
    ({"guided_choice": []}, "invalid_value", "guided_choice"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "invalid_value", "structured_outputs"),
    ({"regex": "(?=a)b"}, "invalid_value", "regex"),
    ({"ebnf": ""}, "invalid_value", "ebnf"),
    ({"json_schema": "{"}, "invalid_value", "json_schema"),
    ({"audio": {}}, "unsupported_parameter", "audio"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "invalid_value", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": ["a", 1]}, "invalid_value", "prompt"),
    ({"prompt": [10**6]}, "invalid_value", "prompt[0]"),
    ({"prompt": [-1]}, "invalid_value", "prompt[0]"),
    ({"prompt": {"a": 1}}, "invalid_value", "prompt"),
    ({"prompt": "x" * CONTEXT}, "context_length_exceeded", "max_tokens"),
    ({"prompt": ["x"] * 100}, "invalid_value", "prompt"),
    ({"best_of": 1, "n": 2}, "invalid_value", "best_of"),
    ({"best_of": 129}, "invalid_value", "best_of"),
    ({"best_of": 2, "stream": True}, "invalid_value", "best_of"),
    ({"logprobs": 21}, "invalid_value", "logprobs"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    ({"max_tokens": -1}, "invalid_value", "max_tokens"),
]
BAD_NATIVE: list[tuple[dict[str, Any], str, str]] = [
    ({"text": None}, "invalid_value", "text"),
    ({"input_ids": [1]}, "invalid_value", "text"),
    ({"text": []}, "invalid_value", "text"),
    ({"text": None, "input_ids": []}, "invalid_value", "input_ids"),
    ({"text": None, "input_ids": [1, [2]]}, "invalid_value", "input_ids"),
    ({"text": None, "input_ids": [10**6]}, "invalid_value", "input_ids"),
    ({"sampling_params": {"temperature": -1}}, "invalid_value", "sampling_params.temperature"),
    ({"sampling_params": {"max_new_tokens": CONTEXT}}, "context_length_exceeded", "sampling_params.max_new_tokens"),
    ({"sampling_params": {"min_new_tokens": 129}}, "invalid_value", "sampling_params.min_new_tokens"),
    ({"sampling_params": {"n": "x"}}, "invalid_value", "sampling_params.n"),
    ({"sampling_params": [{}, {}]}, "invalid_value", "sampling_params"),
    ({"sampling_params": {"json_schema": '{"not": {}}'}}, "invalid_value", "sampling_params.json_schema"),
    ({"sampling_params": {"regex": "a", "ebnf": "b"}}, "invalid_value", "sampling_params.regex"),
    ({"rid": ["a", "b"]}, "invalid_value", "rid"),
    ({"return_logprob": True, "top_logprobs_num": 21}, "invalid_value", "top_logprobs_num"),
    ({"lora_path": "x"}, "unsupported_parameter", "lora_path"),
    ({"image_data": "x"}, "unsupported_parameter", "image_data"),
]
TABLE = [
    *((CHAT, {"messages": HI} | fields, code, param) for fields, code, param in BAD_CHATS),
    *((COMPLETIONS, {"prompt": "ab"} | fields, code, param) for fields, code, param in BAD_COMPLETIONS),
    *((NATIVE, {"text": "ab"} | fields, code, param) for fields, code, param in BAD_NATIVE),
    ("/tokenize", {}, "invalid_value", "prompt"),
    ("/tokenize", {"prompt": 3}, "invalid_value", "prompt"),
    ("/detokenize", {}, "invalid_value", "tokens"),
    ("/detokenize", {"tokens": [10**6]}, "invalid_value", "tokens"),
    ("/abort_request", {}, "invalid_value", "rid"),
]


def test_bad_values_are_400_and_name_the_field() -> None:
    async def scenario(server: Harness) -> None:
        for path, fields, code, param in TABLE:
            status, body = await server.post(path, fields)
            assert status == 400, (path, fields, body)
            check_error(body, code, param)
        assert server.engine.requests == []

    run(scenario)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"\xff", b'{"a": NaN}', b'{"messages": ' + b"[" * 100_000])
def test_malformed_json(raw: bytes) -> None:
    async def scenario(server: Harness) -> None:
        for path in (CHAT, COMPLETIONS, NATIVE, "/tokenize", "/abort_request"):
            headers = {"Content-Type": "application/json"}
            async with server.http.post(server.url + path, data=raw, headers=headers) as response:
                assert response.status == 400
                check_error(await response.json(), None)

    run(scenario)


def test_other_failures_of_http_have_the_same_form() -> None:
    async def scenario(server: Harness) -> None:
        for path in ("/nope", "/v1/models/nope", "/v1"):
            status, body = await server.get(path)
            assert status == 404
            check_error(body, "model_not_found" if "models" in path else "not_found")
        status, body = await server.get(CHAT)
        assert status == 405
        check_error(body, "method_not_allowed")
        async with server.http.post(server.url + CHAT, data="{}", headers={"Content-Type": "text/plain"}) as response:
            assert response.status == 400
            check_error(await response.json(), None, "Content-Type")
        status, body = await server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]})
        assert status == 413
        check_error(body, "request_too_large")

    run(scenario, max_body_size=4096)


def test_unknown_models_are_404() -> None:
    async def scenario(server: Harness) -> None:
        for path, fields in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            status, body = await server.post(path, {**fields, "model": "other"})
            assert status == 404
            check_error(body, "model_not_found", "model")
            assert "`toy`" in body["error"]["message"]
        with pytest.raises(openai.NotFoundError) as caught:
            await server.sdk.chat.completions.create(model="other", messages=HI)
        assert caught.value.code == "model_not_found"

    run(scenario)


def test_keys() -> None:
    async def scenario(server: Harness) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
            status, body = await server.get("/v1/models", **headers)
            assert status == 401
            check_error(body, "invalid_api_key", type="authentication_error")
        for key in ("one", "two"):
            assert (await server.get("/v1/models", Authorization=f"Bearer {key}"))[0] == 200
        for path in ("/health", "/ready", "/live", "/ping", "/metrics"):
            assert (await server.get(path))[0] == 200
        _, info = await server.get("/server_info", Authorization="Bearer one")
        assert '"one"' not in json.dumps(info)

    run(scenario, api_key=("one", "two"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "shown", "type"),
    [
        ("context_length_exceeded", 400, "context_length_exceeded", "invalid_request_error"),
        ("invalid_value", 400, "invalid_value", "invalid_request_error"),
        ("queue_full", 429, "queue_full", "rate_limit_error"),
        ("nan_logits", 500, "internal_error", "server_error"),
        ("internal_error", 500, "internal_error", "server_error"),
        ("engine_dead", 500, "internal_error", "server_error"),
    ],
)
def test_what_the_engine_refuses(stream: bool, code: Any, status: int, shown: str, type: str) -> None:
    """Also for streams: an error before the first byte is an HTTP status."""

    async def scenario(server: Harness) -> None:
        for path, fields in ((CHAT, {"messages": HI, "n": 2}), (COMPLETIONS, {"prompt": ["a", "b"]}), (NATIVE, {"text": "a"})):
            url = server.url + path
            async with server.http.post(url, json={**fields, "stream": stream}, headers={"X-Request-Id": "abc"}) as response:
                assert response.status == status
                body = await response.json()
                check_error(body, shown, type=type)
                assert ("Retry-After" in response.headers) == (status == 429)
                assert response.headers["x-request-id"] == "abc"
                assert status != 500 or "abc" in body["error"]["message"]
        assert server.engine.num_requests == 0

    run(scenario, FakeClient(Script(error=ErrorInfo(code, "because", None))))


def test_an_error_inside_a_stream_is_one_event_without_done() -> None:
    async def scenario(server: Harness) -> None:
        for path, fields in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"}), (NATIVE, {"text": "a"})):
            async with server.http.post(server.url + path, json={**fields, "stream": True}) as response:
                assert response.status == 200
                events = [part for part in (await response.text()).split("\n\n") if part]
                request_id = response.headers["x-request-id"]
            check_error(json.loads(events[-1].removeprefix("data: ")), "internal_error", type="server_error")
            assert request_id in events[-1]
            assert "error" not in events[-2]
        with pytest.raises(openai.APIError, match="it broke"):
            async for _ in await server.sdk.chat.completions.create(model=MODEL, messages=HI, stream=True):
                pass

    run(scenario, FakeClient(Script(fail_after=3, error=ErrorInfo("internal_error", "it broke"))))


def test_a_failing_choice_aborts_its_siblings() -> None:
    scripts = iter([Script(hang_after=1), Script(fail_after=2, error=ErrorInfo("internal_error", "no"))])

    async def scenario(server: Harness) -> None:
        status, _ = await server.post(CHAT, {"messages": HI, "n": 2})
        assert status == 500
        assert len(server.engine.aborted) == 1

    run(scenario, FakeClient(lambda request: next(scripts)))


def test_unknown_fields_are_logged_once_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    fields = {"messages": HI, "colour": "red", "user": "me", "tools": [], "response_format": {"type": "text"}}

    async def lenient(server: Harness) -> None:
        for _ in range(2):
            assert (await server.post(CHAT, fields))[0] == 200

    async def strict(server: Harness) -> None:
        status, body = await server.post(CHAT, fields)
        assert status == 400
        check_error(body, "invalid_value", "colour")

    with caplog.at_level(logging.WARNING, "rocm_infer.server"):
        run(lenient)
    assert [record.message for record in caplog.records] == ["ignoring unknown request field 'colour'"]
    run(strict, strict_params=True)


def test_request_content_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Harness) -> None:
        await server.post(CHAT, {"messages": [{"role": "user", "content": "tell nobody"}]})
        await server.post(CHAT, {"messages": [{"role": "user", "content": ["tell nobody"]}]})

    with caplog.at_level(logging.DEBUG, "rocm_infer"):
        run(scenario)
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "tell nobody" not in caplog.text


def test_no_chat_template() -> None:
    async def scenario(server: Harness) -> None:
        object.__setattr__(server.service.files, "template", None)
        status, body = await server.post(CHAT, {"messages": HI})
        assert status == 400
        check_error(body, "unsupported_value", "messages")
        assert "--chat-template" in body["error"]["message"]

    run(scenario)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from([*ChatRequest.__struct_fields__, "tools", "x"]), VALUES, max_size=4), st.data())
def test_any_body_is_parsed_or_refused_by_name(fields: dict[str, Any], data: st.DataObject) -> None:
    raw = json.dumps({"messages": HI} | fields).encode()
    position = data.draw(st.integers(0, len(raw)))
    for candidate in (raw, raw[:position], raw[:position] + b"\x00" + raw[position:]):
        with contextlib.suppress(ApiError):
            parse(ChatRequest, decode_json(candidate))


def test_garbage_does_not_hurt_others() -> None:
    """Hypothesis-made bodies through HTTP: no 500, no hang, and the next request is served."""
    bodies: list[Any] = []

    @settings(max_examples=60)
    @given(st.sampled_from([CHAT, COMPLETIONS, NATIVE, "/tokenize", "/detokenize"]), VALUES, VALUES, VALUES)
    def collect(path: str, one: Any, two: Any, three: Any) -> None:
        bodies.append((path, {"messages": one, "prompt": one, "text": one, "tokens": one, "stop": two, "logit_bias": three}))
        bodies.append((path, {"messages": HI, "prompt": "x", "text": "x", "sampling_params": two, "n": three, "stream": one}))

    collect()

    async def scenario(server: Harness) -> None:
        for path, fields in bodies:
            async with server.http.post(server.url + path, json=fields) as response:
                assert response.status in (200, 400), (path, fields, await response.text())
        assert (await server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}))[0] == 200
        assert server.engine.num_requests == 0

    run(scenario, FakeClient(Script(text="x")))


def test_token_ids_of_another_vocabulary_are_refused() -> None:
    async def scenario(server: Harness) -> None:
        status, body = await server.post(COMPLETIONS, {"prompt": [TOKENIZER.vocab_size]})
        assert status == 400
        assert f"below {TOKENIZER.vocab_size}" in body["error"]["message"]

    run(scenario)
