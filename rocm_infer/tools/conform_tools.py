# SPDX-License-Identifier: Apache-2.0
"""Checks of tool calls. Arguments have a small schema, so that any model fills it when it must call."""

from __future__ import annotations

import json
from typing import Any

from rocm_infer.tools.conform_target import USER, Area, Events, Target, among, ensure, equal

tools = Area("tools")
CITIES = ("Oslo", "Rome")
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": list(CITIES)}, "metric": {"type": "boolean"}},
    "required": ["city", "metric"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time", "description": "The time", "parameters": PARAMETERS}}
ONE = {
    "type": "object",
    "properties": {"city": {"enum": list(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}
NAMED = {"type": "function", "function": {"name": "get_time"}}


async def both(t: Target) -> dict[str, Any]:
    """The fields of a request that must call one of two tools."""
    fields = {"tools": [WEATHER, TIME], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
    return {**fields, "logit_bias": await t.no_blanks()}


async def forced(t: Target) -> Any:
    """The choice of an answer that must call."""

    async def ask() -> Any:
        return await t.chat(**await both(t))

    return (await t.once("forced", ask))["choices"][0]


def checked(calls: Any) -> list[dict[str, Any]]:
    """The calls, whose form and arguments are right."""
    ensure(isinstance(calls, list) and calls, "tool_calls", "a list that is not empty", calls)
    for call in calls:
        equal(call["type"], "function", "type of a call")
        ensure(isinstance(call["id"], str) and call["id"], "id of a call", "a text", call)
        among(call["function"]["name"], ("get_weather", "get_time"), "name")
        arguments = json.loads(call["function"]["arguments"])
        equal(sorted(arguments), ["city", "metric"], "arguments")
        among(arguments["city"], CITIES, "city")
    return list(calls)


@tools.check("required", "required calls a tool whose arguments are of its schema")
async def _(t: Target) -> None:
    checked((await forced(t))["message"]["tool_calls"])


@tools.check("finish-reason", "finish_reason is tool_calls")
async def _(t: Target) -> None:
    equal((await forced(t))["finish_reason"], "tool_calls", "finish_reason")


@tools.check("content-null", "content is null, not empty, when only calls were made")
async def _(t: Target) -> None:
    message = (await forced(t))["message"]
    ensure("content" in message and message["content"] is None, "content", "null", message)


@tools.check("id", "the id of a call begins with call_")
async def _(t: Target) -> None:
    name = (await forced(t))["message"]["tool_calls"][0]["id"]
    ensure(name.startswith("call_"), "id", "call_...", name)


@tools.check("one-call", "parallel_tool_calls false gives one call")
async def _(t: Target) -> None:
    equal(len((await forced(t))["message"]["tool_calls"]), 1, "calls")


@tools.check("named", "a named tool is the one that is called")
async def _(t: Target) -> None:
    message = (await t.chat(**{**await both(t), "tool_choice": NAMED}))["choices"][0]["message"]
    equal({call["function"]["name"] for call in checked(message["tool_calls"])}, {"get_time"}, "names")


@tools.check("sampled", "required holds at temperature 2, for every choice")
async def _(t: Target) -> None:
    for choice in (await t.chat(**await both(t), temperature=2, n=3, seed=1))["choices"]:
        checked(choice["message"]["tool_calls"])


@tools.check("none", "none calls nothing")
async def _(t: Target) -> None:
    choice = (await t.chat(tools=[WEATHER], tool_choice="none", max_tokens=16))["choices"][0]
    ensure(not choice["message"].get("tool_calls"), "tool_calls", "none", choice)
    among(choice["finish_reason"], ("stop", "length"), "finish_reason")


@tools.check("auto", "auto may call or not; what it calls is well formed")
async def _(t: Target) -> None:
    for fields in ({"tool_choice": "auto"}, {}):
        choice = (await t.chat(tools=[WEATHER, TIME], max_tokens=24, **fields))["choices"][0]
        among(choice["finish_reason"], ("stop", "length", "tool_calls"), "finish_reason")
        if choice["finish_reason"] == "tool_calls":
            checked(choice["message"]["tool_calls"])


async def _stream(t: Target) -> Any:
    async def ask() -> Events:
        return await t.chat_events(**await both(t))

    return await t.once("forced stream", ask)


@tools.check("stream", "a stream gives the same call, its arguments in pieces")
async def _(t: Target) -> None:
    parts = [call for delta in (await _stream(t)).deltas() for call in delta.get("tool_calls") or ()]
    whole = (await forced(t))["message"]["tool_calls"][0]["function"]
    joined = "".join(part["function"].get("arguments") or "" for part in parts)
    equal(parts[0]["function"]["name"], whole["name"], "name")
    equal(json.loads(joined), json.loads(whole["arguments"]), "arguments")
    ensure(len(parts) > 2, "pieces", "several", parts)


@tools.check("stream-first", "the first delta of a call has index, id, type, name and empty arguments")
async def _(t: Target) -> None:
    first = next(call for delta in (await _stream(t)).deltas() for call in delta.get("tool_calls") or ())
    equal((first["index"], first["type"], first["function"]["arguments"]), (0, "function", ""), "index, type, arguments")
    ensure(first["id"] and first["function"]["name"], "first delta", "id and name", first)


@tools.check("stream-rest", "later deltas of a call have its index and a piece of arguments alone")
async def _(t: Target) -> None:
    _, *rest = [call for delta in (await _stream(t)).deltas() for call in delta.get("tool_calls") or ()]
    for part in rest:
        equal(part["index"], 0, "index")
        ensure(not part.get("id") and "name" not in part["function"], "later delta", "index and arguments", part)


@tools.check("stream-finish", "the last chunk has finish_reason tool_calls")
async def _(t: Target) -> None:
    equal((await _stream(t)).choices()[-1]["finish_reason"], "tool_calls", "finish_reason")


@tools.check("result", "a conversation with a call and its result goes on")
async def _(t: Target) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "metric": true}'},
    }
    turns = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    answer = await t.chat(messages=turns, tools=[WEATHER], max_tokens=4)
    ensure(answer["usage"]["prompt_tokens"] > 0, "usage", "counted", answer)


@tools.check("unknown-name", "a named tool that does not exist is 400")
async def _(t: Target) -> None:
    await t.chat_refused(None, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "nope"}})


@tools.check("required-without", "required without tools is 400")
async def _(t: Target) -> None:
    await t.chat_refused(None, tool_choice="required")


@tools.check("bad-tool", "a tool without a name is 400")
async def _(t: Target) -> None:
    await t.chat_refused(None, tools=[{"type": "function", "function": {"parameters": {}}}])


@tools.check("bad-parameters", "parameters that are no schema are 400")
async def _(t: Target) -> None:
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "no-such-type"}}}
    await t.chat_refused(None, tools=[broken], tool_choice="required")


ANTHROPIC: dict[str, Any] = {
    "messages": USER,
    "max_tokens": 1000,
    "temperature": 0,
    "tools": [{"name": "get_time", "description": "The time", "input_schema": ONE}],
    "tool_choice": {"type": "any"},
}
RESPONSES: dict[str, Any] = {
    "input": "What time is it?",
    "max_output_tokens": 1000,
    "temperature": 0,
    "tools": [{"type": "function", "name": "get_time", "description": "The time", "parameters": ONE}],
    "tool_choice": "required",
}


@tools.check("messages", "/v1/messages: tool_choice any gives a tool_use block")
async def _(t: Target) -> None:
    body = await t.once("tool use", lambda: t.ask("/v1/messages", ANTHROPIC))
    equal(body["stop_reason"], "tool_use", "stop_reason")
    used = [block for block in body["content"] if block["type"] == "tool_use"]
    ensure(
        used and used[0]["name"] == "get_time" and used[0]["input"]["city"] in CITIES, "content", "a tool_use", body["content"]
    )


@tools.check("messages-stream", "/v1/messages: a tool_use block streams its input in pieces of JSON")
async def _(t: Target) -> None:
    events = await t.events("/v1/messages", {**ANTHROPIC, "stream": True})
    begun = [chunk["content_block"] for chunk in events.chunks if chunk["type"] == "content_block_start"]
    used = next((block for block in begun if block["type"] == "tool_use"), None)
    ensure(used and used["name"] == "get_time" and used["input"] == {} and used["id"], "block", "a tool_use", begun)
    deltas = [chunk["delta"] for chunk in events.chunks if chunk["type"] == "content_block_delta"]
    joined = "".join(delta.get("partial_json", "") for delta in deltas)
    whole = await t.once("tool use", lambda: t.ask("/v1/messages", ANTHROPIC))
    equal(json.loads(joined), whole["content"][-1]["input"], "input")
    equal(events.chunks[-2]["delta"]["stop_reason"], "tool_use", "stop_reason")


@tools.check("responses", "/v1/responses: tool_choice required gives a function_call item")
async def _(t: Target) -> None:
    body = await t.once("function call", lambda: t.ask("/v1/responses", RESPONSES))
    calls = [item for item in body["output"] if item["type"] == "function_call"]
    ensure(calls and json.loads(calls[0]["arguments"])["city"] in CITIES, "output", "a function_call", body["output"])


@tools.check("responses-stream", "/v1/responses: arguments of a call stream as deltas, then done")
async def _(t: Target) -> None:
    events = await t.events("/v1/responses", {**RESPONSES, "stream": True})
    kind = "response.function_call_arguments"
    joined = "".join(chunk["delta"] for chunk in events.chunks if chunk["type"] == f"{kind}.delta")
    done = [chunk["arguments"] for chunk in events.chunks if chunk["type"] == f"{kind}.done"]
    whole = await t.once("function call", lambda: t.ask("/v1/responses", RESPONSES))
    item = next(item for item in whole["output"] if item["type"] == "function_call")
    equal(joined, done[0], "pieces")
    equal(json.loads(joined), json.loads(item["arguments"]), "arguments")
    equal(events.chunks[-1]["response"]["output"][-1]["name"], "get_time", "name in the last event")
