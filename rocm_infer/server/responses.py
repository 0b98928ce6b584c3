# SPDX-License-Identifier: Apache-2.0
"""/v1/responses: OpenAI's Responses API, without stored state, as a translation to a chat request and back."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from rocm_infer.server.blocks import Block, Blocks, Change, blocks_of
from rocm_infer.server.body import SERVICE, call_of, json_response, read_body
from rocm_infer.server.errors import ApiError, bad_value, renamed, unsupported
from rocm_infer.server.generation import Generation
from rocm_infer.server.openai import STREAMS, Answer, choices_of, start_chat
from rocm_infer.server.schema import ChatRequest, parse
from rocm_infer.server.sse import EventStream, named_event
from rocm_infer.server.views import View
from rocm_infer.text.chat import ROLES

encode = msgspec.json.Encoder().encode

CHAT_NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}
PARTS = ("input_text", "output_text", "text")


class Reasoning(Struct, kw_only=True, frozen=True):
    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    summary: str | None = None


class TextOptions(Struct, kw_only=True, frozen=True):
    format: dict[str, Any] = msgspec.field(default_factory=lambda: {"type": "text"})
    verbosity: str | None = None


class ResponsesRequest(Struct, kw_only=True):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    include: list[str] = []
    previous_response_id: str | None = None


async def responses(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    service.admit()
    body = await read_body(request, ResponsesRequest)
    if body.previous_response_id is not None:
        message = "previous_response_id: responses are not stored here; send the whole conversation as input"
        raise unsupported("previous_response_id", message)
    with renamed(CHAT_NAMES):
        chat, _ = parse(ChatRequest, _chat_fields(body))
        generation, answer, view, _ = await start_chat(request, chat)
    try:
        response = _Response(body, service.files.defaults, answer, generation, view)
        generation.name(response.id)
        if body.stream:
            stream = EventStream(request, request.app[STREAMS], done=b"", as_event=_error_event)
            return await stream.run(_events(response), call_of(request))
        await generation.finish()
        choice = view.whole(0, generation.outputs[0])
        return json_response(response.shown(blocks_of(choice["message"]), choice["finish_reason"]))
    finally:
        generation.close()


def _chat_fields(body: ResponsesRequest) -> dict[str, Any]:
    opening = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items: list[dict[str, Any]] = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    turns = _turns(items)
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": opening + turns,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "reasoning_effort": body.reasoning.effort,
    }
    if body.text.format.get("type") != "text":
        fields["response_format"] = _response_format(body.text.format)
    if body.tools:
        fields["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
        fields["tool_choice"] = _tool_choice(body.tool_choice)
        fields["parallel_tool_calls"] = body.parallel_tool_calls
    return fields


def _turns(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Input items as chat messages; calls that follow each other are one assistant message."""
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        where, kind = f"input[{index}]", item.get("type", "message")
        if kind == "message":
            if item.get("role") not in ROLES:
                raise bad_value(f"{where}.role", f"{where}.role: expected one of {', '.join(ROLES)}, got {item.get('role')!r}")
            turns.append({"role": item.get("role"), "content": _content(item.get("content"), f"{where}.content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": None})
            turns[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind != "reasoning":
            raise ApiError(f"{where}: items of type {kind!r} are not supported", param=where, code="unsupported_value")
    return turns


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_value(where, f"{where}: expected a string or a list of parts, got {type(content).__name__}")
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        place = f"{where}[{index}]"
        if kind not in PARTS:
            raise ApiError(f"{place}: only text parts are supported, got {kind!r}", param=place, code="unsupported_value")
        if not isinstance(part.get("text"), str):
            raise bad_value(f"{place}.text", f"{place}.text: expected a string")
    return "\n".join(part["text"] for part in content)


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    """The chat route nests what this one has flat."""
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        message = f"{where}: only tools of type function are supported, got {tool.get('type')!r}"
        raise ApiError(message, param=where, code="unsupported_value")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: str | dict[str, Any]) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _error_event(error: ApiError) -> bytes:
    return named_event("error", encode({"type": "error", **error.body()}))


class _Response:
    """The response object in its stages."""

    def __init__(
        self, body: ResponsesRequest, defaults: Mapping[str, Any], answer: Answer, generation: Generation, view: View
    ) -> None:
        self.id = f"resp_{answer.id.removeprefix('chatcmpl-')}"
        self.generation = generation
        self.view = view
        self._answer = answer
        self._fields = {
            "id": self.id,
            "object": "response",
            "created_at": answer.created,
            "model": answer.model,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": msgspec.to_builtins(body.reasoning),
            "store": False,
            "temperature": defaults.get("temperature", 1.0) if body.temperature is None else body.temperature,
            "text": {"format": body.text.format},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
            "truncation": body.truncation,
        }

    def begun(self) -> dict[str, Any]:
        return {**self._fields, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}

    def shown(self, blocks: list[Block], reason: str) -> dict[str, Any]:
        """At its end."""
        status, details = "completed", None
        if reason in ("length", "abort"):
            status, details = "incomplete", {"reason": "max_output_tokens" if reason == "length" else reason}
        usage = self._answer.usage(self.generation.outputs, self.view)
        return {
            **self._fields,
            "completed_at": int(time.time()),
            "status": status,
            "incomplete_details": details,
            "output": [self.item(block, status) for block in blocks],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }

    def item(self, block: Block, status: str) -> dict[str, Any]:
        """An output item."""
        number = f"{self.id.removeprefix('resp_')}_{block.index}"
        if block.kind == "call":
            shown = {"type": "function_call", "id": f"fc_{number}", "call_id": block.call_id, "name": block.name}
            return {**shown, "arguments": block.text, "status": status}
        content = [part_of(block)] if block.text else []
        if block.kind == "thinking":
            return {"type": "reasoning", "id": f"rs_{number}", "summary": [], "content": content, "status": status}
        return {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": content, "status": status}


def part_of(block: Block) -> dict[str, Any]:
    """The content part of a message or reasoning item."""
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


async def _events(response: _Response) -> AsyncIterator[bytes]:
    numbers, blocks, reason = itertools.count(), Blocks(), None

    def event(kind: str, **fields: Any) -> bytes:
        kind = f"response.{kind}"
        return named_event(kind, encode({"type": kind, "sequence_number": next(numbers), **fields}))

    def told(changes: Iterator[Change]) -> bytes:
        return b"".join(event(kind, **fields) for change in changes for kind, fields in _told(response, change))

    has_begun = False
    async for choices in choices_of(response.generation, response.view):
        data = b""
        if not has_begun:
            has_begun, begun = True, response.begun()
            data = event("created", response=begun) + event("in_progress", response=begun)
        for choice in choices:
            data += told(blocks.feed(choice["delta"]))
            reason = choice["finish_reason"] or reason
        if data:
            yield data
    yield told(blocks.end())
    shown = response.shown(blocks.all, reason or "stop")
    yield event(shown["status"], response=shown)


def _told(response: _Response, change: Change) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of one change: kind and fields."""
    block = change.block
    item = response.item(block, "in_progress" if change.what != "end" else "completed")
    place = {"item_id": item["id"], "output_index": block.index}
    if block.kind == "call":
        inside, part, field, delta = place, None, "arguments", "function_call_arguments"
    else:
        inside, part, field = {**place, "content_index": 0}, part_of(block), "text"
        delta = "output_text" if block.kind == "text" else "reasoning_text"
    extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
    if change.what == "grow":
        yield f"{delta}.delta", {**inside, "delta": change.text, **extra}
        return
    if change.what == "begin":
        yield "output_item.added", {"output_index": block.index, "item": item}
        if part is not None:
            yield "content_part.added", {**inside, "part": part}
        return
    yield f"{delta}.done", {**inside, field: block.text, **extra, **({"name": block.name} if block.kind == "call" else {})}
    if part is not None:
        yield "content_part.done", {**inside, "part": part}
    yield "output_item.done", {"output_index": block.index, "item": item}
