# SPDX-License-Identifier: Apache-2.0
"""Checks of refusals: the status, and {"error": {message, type, param, code}} for every route."""

from __future__ import annotations

from typing import Any

from rocm_infer.tools.conform_target import QUESTION, USER, Area, Target, ensure, equal, error_of

errors = Area("errors")
CHAT = "/v1/chat/completions"

# name, what must hold, the field at fault, fields of a chat request
FIELDS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("temperature", "temperature above 2", "temperature", {"temperature": 2.5}),
    ("temperature-low", "temperature below 0", "temperature", {"temperature": -0.1}),
    ("temperature-type", "temperature that is no number", "temperature", {"temperature": "hot"}),
    ("top-p", "top_p above 1", "top_p", {"top_p": 1.5}),
    ("top-p-0", "top_p 0", "top_p", {"top_p": 0}),
    ("n-0", "n 0", "n", {"n": 0}),
    ("n-129", "n 129", "n", {"n": 129}),
    ("max-tokens-0", "max_tokens 0", "max_tokens", {"max_tokens": 0}),
    ("max-completion-tokens", "max_completion_tokens -1", "max_completion_tokens", {"max_completion_tokens": -1}),
    ("presence", "presence_penalty 3", "presence_penalty", {"presence_penalty": 3}),
    ("frequency", "frequency_penalty -3", "frequency_penalty", {"frequency_penalty": -3}),
    ("bias-value", "logit_bias 200", "logit_bias", {"logit_bias": {"1": 200}}),
    ("bias-key", "logit_bias for no token", "logit_bias", {"logit_bias": {"x": 1}}),
    ("bias-vocabulary", "logit_bias outside the vocabulary", "logit_bias", {"logit_bias": {"999999999": 1}}),
    ("top-logprobs-21", "top_logprobs 21", "top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top-logprobs-alone", "top_logprobs without logprobs", "top_logprobs", {"top_logprobs": 2}),
    ("stop-17", "17 stop strings", "stop", {"stop": [f"s{i}" for i in range(17)]}),
    ("stop-empty", "an empty stop string", "stop", {"stop": ""}),
    ("seed", "a seed beyond 64 bits", "seed", {"seed": 2**70}),
    ("stream-type", "stream that is no boolean", "stream", {"stream": "yes"}),
    ("messages-empty", "no messages", "messages", {"messages": []}),
    ("messages-type", "messages that are no list", "messages", {"messages": "hi"}),
    ("role", "an unknown role", "messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
    (
        "content-null",
        "a user message without content",
        "messages[0].content",
        {"messages": [{"role": "user", "content": None}]},
    ),
    ("response-format", "an unknown response_format", "response_format", {"response_format": {"type": "poem"}}),
    ("tool-choice", "an unknown tool_choice", "tool_choice", {"tool_choice": "perhaps"}),
)


def _add(name: str, what: str, param: str, fields: dict[str, Any]) -> None:
    @errors.check(name, f"{what} is refused, and the error names {param}")
    async def _(t: Target) -> None:
        error = await t.refused(CHAT, {"messages": USER, "max_tokens": 2, **fields})
        equal(error["type"], "invalid_request_error", "error.type")
        ensure(str(error["param"]).startswith(param), "error.param", param, error["param"])
        ensure(param.partition("[")[0] in error["message"], "error.message", f"names {param}", error["message"])


for row in FIELDS:
    _add(*row)


@errors.check("malformed", "malformed JSON is 400")
async def _(t: Target) -> None:
    for data in (b'{"messages": [', b"", b"\xff\xfe", b'{"temperature": NaN}', b'{"a":' * 2000):
        await t.refused(CHAT, None, data=data)


@errors.check("not-an-object", "a body that is no object is 400")
async def _(t: Target) -> None:
    for data in (b"[]", b'"x"', b"3", b"null"):
        await t.refused(CHAT, None, data=data)


@errors.check("missing", "a missing field is named")
async def _(t: Target) -> None:
    await t.refused(CHAT, {"max_tokens": 2}, param="messages")
    await t.refused("/v1/completions", {"max_tokens": 2}, param="prompt")


@errors.check("image", "an image part is refused as unsupported")
async def _(t: Target) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    error = await t.refused(CHAT, {"messages": [{"role": "user", "content": [part]}]})
    ensure(error["code"] in ("unsupported_value", "unsupported_parameter"), "error.code", "unsupported_...", error)


@errors.check("context-output", "prompt and max_tokens beyond the context are context_length_exceeded")
async def _(t: Target) -> None:
    limit = (await t.get("/v1/models")).body["data"][0]["max_model_len"]
    await t.refused(CHAT, {"messages": USER, "max_tokens": limit}, code="context_length_exceeded")


@errors.check("context-prompt", "a prompt beyond the context is context_length_exceeded")
async def _(t: Target) -> None:
    limit = (await t.get("/v1/models")).body["data"][0]["max_model_len"]
    ids = (await t.tokens(QUESTION))[:1] * (limit + 1)
    await t.refused("/v1/completions", {"prompt": ids}, code="context_length_exceeded")


@errors.check("model", "an unknown model is 404 model_not_found")
async def _(t: Target) -> None:
    for path, fields in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "a"})):
        await t.refused(path, {**fields, "model": "no-such-model"}, status=404, code="model_not_found")


@errors.check("path", "an unknown path is 404 in the same form")
async def _(t: Target) -> None:
    error_of(await t.get("/v1/no-such-route"), 404)


@errors.check("method", "a wrong method is 405 in the same form")
async def _(t: Target) -> None:
    error_of(await t.get(CHAT), 405)


@errors.check("too-large", "a body of 17 MiB is 413 request_too_large")
async def _(t: Target) -> None:
    data = b'{"messages": "' + b"x" * (17 << 20) + b'"}'
    await t.refused(CHAT, None, data=data, status=413, code="request_too_large")


@errors.check(
    "key", "a wrong or missing key is 401 invalid_api_key where there is a key, and does not matter where there is none"
)
async def _(t: Target) -> None:
    for given in ("Bearer wrong", None):
        reply = await t.get("/v1/models", {"Authorization": given})
        if t.api_key is None:
            equal(reply.status, 200, "status")
            continue
        error = error_of(reply, 401)
        equal((error["type"], error["code"]), ("authentication_error", "invalid_api_key"), "type and code")


@errors.check("id", "an error has the request's x-request-id")
async def _(t: Target) -> None:
    reply = await t.get("/v1/no-such-route", {"X-Request-Id": "conform-2"})
    equal(reply.headers.get("x-request-id"), "conform-2", "x-request-id")
