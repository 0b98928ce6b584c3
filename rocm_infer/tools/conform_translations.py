# SPDX-License-Identifier: Apache-2.0
"""Checks of /v1/messages (Anthropic's form) and /v1/responses."""

from __future__ import annotations

from typing import Any

from rocm_infer.tools.conform_target import QUESTION, USER, Area, Events, Target, ensure, equal

messages, responses = Area("messages"), Area("responses")
MESSAGES: dict[str, Any] = {"messages": USER, "max_tokens": 24, "temperature": 0}
RESPONSES: dict[str, Any] = {"input": QUESTION, "max_output_tokens": 24, "temperature": 0}


async def _message(t: Target) -> Any:
    return await t.once("message", lambda: t.ask("/v1/messages", MESSAGES))


async def _message_events(t: Target) -> Events:
    found: Events = await t.once("message events", lambda: t.events("/v1/messages", {**MESSAGES, "stream": True}))
    return found


@messages.check("shape", "type message, role assistant, id msg_, content blocks, stop_reason, usage")
async def _(t: Target) -> None:
    body = await _message(t)
    equal((body["type"], body["role"], body["model"]), ("message", "assistant", t.model), "type, role, model")
    ensure(body["id"].startswith("msg_"), "id", "msg_...", body["id"])
    equal([block["type"] for block in body["content"]], ["text"], "blocks")
    ensure(body["stop_reason"] in ("end_turn", "max_tokens"), "stop_reason", "end_turn or max_tokens", body)
    ensure({"input_tokens", "output_tokens"} <= set(body["usage"]), "usage", "input and output tokens", body["usage"])


@messages.check("same-text", "the answer is that of the chat route")
async def _(t: Target) -> None:
    equal((await _message(t))["content"][0]["text"], (await t.plain())["choices"][0]["message"]["content"], "text")


@messages.check("events", "message_start, block start, deltas, block stop, message_delta, message_stop")
async def _(t: Target) -> None:
    events = await _message_events(t)
    order = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    names = [name for name in events.names if name != "ping"]
    equal(list(dict.fromkeys(names)), order, "events")
    equal(events.done, False, "[DONE]")


@messages.check("events-text", "the deltas are the whole text")
async def _(t: Target) -> None:
    deltas = [chunk["delta"]["text"] for chunk in (await _message_events(t)).chunks if chunk["type"] == "content_block_delta"]
    equal("".join(deltas), (await _message(t))["content"][0]["text"], "text")


@messages.check("stop-sequence", "stop_sequences end the text, and stop_sequence names the one")
async def _(t: Target) -> None:
    text = await t.said(max_tokens=24)
    body = await t.ask("/v1/messages", {**MESSAGES, "stop_sequences": [text[1:2]]})
    equal((body["stop_reason"], body["stop_sequence"]), ("stop_sequence", text[1:2]), "stop_reason and stop_sequence")


@messages.check("system", "system is the system message")
async def _(t: Target) -> None:
    body = await t.ask("/v1/messages", {**MESSAGES, "system": [{"type": "text", "text": "Be brief."}]})
    said = await t.said(messages=[{"role": "system", "content": "Be brief."}, *USER], max_tokens=24)
    equal("".join(block["text"] for block in body["content"]), said, "text")


@messages.check("count", "count_tokens counts as usage does")
async def _(t: Target) -> None:
    counted = (await t.ask("/v1/messages/count_tokens", {"messages": USER}))["input_tokens"]
    equal(counted, (await t.plain())["usage"]["prompt_tokens"], "input_tokens")


@messages.check("error", "errors have Anthropic's form")
async def _(t: Target) -> None:
    reply = await t.send("POST", "/v1/messages", {"model": t.model, "messages": USER})
    equal((reply.status, reply.body["type"]), (400, "error"), "status and type")
    equal(reply.body["error"]["type"], "invalid_request_error", "error.type")
    reply = await t.send("POST", "/v1/messages", {**MESSAGES, "model": "no-such-model"})
    equal((reply.status, reply.body["error"]["type"]), (404, "not_found_error"), "status and error.type")


async def _response(t: Target) -> Any:
    return await t.once("response", lambda: t.ask("/v1/responses", RESPONSES))


async def _response_events(t: Target) -> Events:
    found: Events = await t.once("response events", lambda: t.events("/v1/responses", {**RESPONSES, "stream": True}))
    return found


def _text(body: Any) -> str:
    """The text of a response's message items."""
    items = [item for item in body["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in items for part in item["content"])


@responses.check("shape", "object response, id resp_, status, output, usage")
async def _(t: Target) -> None:
    body = await _response(t)
    equal((body["object"], body["model"], body["error"]), ("response", t.model, None), "object, model, error")
    ensure(body["id"].startswith("resp_"), "id", "resp_...", body["id"])
    ensure(body["status"] in ("completed", "incomplete"), "status", "completed or incomplete", body["status"])
    usage = body["usage"]
    equal(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"], "total_tokens")


@responses.check("same-text", "the answer is that of the chat route")
async def _(t: Target) -> None:
    equal(_text(await _response(t)), (await t.plain())["choices"][0]["message"]["content"], "text")


@responses.check("items", "a list of items is a conversation")
async def _(t: Target) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    equal(_text(await t.ask("/v1/responses", {**RESPONSES, "input": items})), _text(await _response(t)), "text")


@responses.check("instructions", "instructions are the system message")
async def _(t: Target) -> None:
    body = await t.ask("/v1/responses", {**RESPONSES, "instructions": "Be brief."})
    said = await t.said(messages=[{"role": "system", "content": "Be brief."}, *USER], max_tokens=24)
    equal(_text(body), said, "text")


@responses.check("incomplete", "max_output_tokens makes it incomplete")
async def _(t: Target) -> None:
    body = await t.ask("/v1/responses", {**RESPONSES, "max_output_tokens": 1})
    equal((body["status"], body["incomplete_details"]), ("incomplete", {"reason": "max_output_tokens"}), "status and details")


@responses.check("events", "created, in_progress, item and part added, deltas, done, completed, numbered")
async def _(t: Target) -> None:
    events = await _response_events(t)
    kinds = [chunk["type"].removeprefix("response.") for chunk in events.chunks]
    equal(kinds[:4], ["created", "in_progress", "output_item.added", "content_part.added"], "first events")
    equal(kinds[-4:-1], ["output_text.done", "content_part.done", "output_item.done"], "events before the last")
    ensure(kinds[-1] in ("completed", "incomplete"), "last event", "completed or incomplete", kinds[-1])
    equal([chunk["sequence_number"] for chunk in events.chunks], list(range(len(kinds))), "sequence_number")
    equal(events.names, [chunk["type"] for chunk in events.chunks], "event names")


@responses.check("events-text", "the deltas are the whole text")
async def _(t: Target) -> None:
    events = await _response_events(t)
    deltas = [chunk["delta"] for chunk in events.chunks if chunk["type"] == "response.output_text.delta"]
    equal("".join(deltas), _text(await _response(t)), "text")
    equal(_text(events.chunks[-1]["response"]), _text(await _response(t)), "text of the last event")


@responses.check("schema", "text.format json_schema shapes the answer")
async def _(t: Target) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    text = _text(await t.ask("/v1/responses", {**RESPONSES, "text": {"format": form}, "max_output_tokens": 500}))
    ensure("".join(text.split()) in ('{"a":1}', '{"a":2}'), "text", '{"a": 1} or {"a": 2}', text)


@responses.check("previous", "previous_response_id is refused by name")
async def _(t: Target) -> None:
    await t.refused("/v1/responses", {**RESPONSES, "previous_response_id": "resp_1"}, param="previous_response_id")
