# SPDX-License-Identifier: Apache-2.0
"""/v1/messages: Anthropic's Messages API as a translation to a chat request and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from rocm_infer.server.blocks import Block, Blocks, Change, blocks_of
from rocm_infer.server.body import SERVICE, call_of, json_response, read_body
from rocm_infer.server.errors import ApiError, bad_value, renamed
from rocm_infer.server.generation import Generation
from rocm_infer.server.openai import STREAMS, Answer, chat_prompt, choices_of, start_chat
from rocm_infer.server.schema import ChatRequest, parse
from rocm_infer.server.sse import EventStream, named_event
from rocm_infer.server.views import View
from rocm_infer.text.outputs import Output

encode = msgspec.json.Encoder().encode

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class Message(Struct, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class Thinking(Struct, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class Tool(Struct, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str = ""
    type: Literal["custom"] = "custom"


class ToolChoice(Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountTokensRequest(Struct, kw_only=True):
    """What of a request makes its prompt."""

    model: str
    messages: list[Message]
    system: str | list[dict[str, Any]] = ""
    thinking: Thinking | None = None
    tools: list[Tool] = []
    tool_choice: ToolChoice | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    stop_sequences: list[str] = []
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


async def messages(request: web.Request) -> web.StreamResponse:
    request.app[SERVICE].admit()
    body = await read_body(request, MessagesRequest)
    limits = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stream": body.stream,
    }
    with renamed({"stop": "stop_sequences"}):
        chat, _ = parse(ChatRequest, {**_prompt_fields(body), **limits})
        generation, answer, view, _ = await start_chat(request, chat)
    name = f"msg_{answer.id.removeprefix('chatcmpl-')}"
    try:
        generation.name(name)
        if body.stream:
            call = call_of(request)
            stream = EventStream(
                request, request.app[STREAMS], done=b"", as_event=lambda error: _event(**error_body(error, call.id))
            )
            return await stream.run(_events(generation, answer, view, name), call)
        await generation.finish()
        return json_response(_whole(generation, answer, view, name))
    finally:
        generation.close()


async def count_tokens(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    body = await read_body(request, CountTokensRequest)
    service.check_model(body.model)
    chat, _ = parse(ChatRequest, _prompt_fields(body))
    ids, *_ = await chat_prompt(service, chat)
    return json_response({"input_tokens": len(ids)})


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Anthropic's form. `param` and `code` are ours."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    shown = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return {"type": "error", "error": shown, "request_id": request_id}


def _prompt_fields(body: CountTokensRequest) -> dict[str, Any]:
    """The fields of a chat request that make its prompt."""
    system = _text(body.system, "system")
    opening = [{"role": "system", "content": system}] if system else []
    turns = [turn for index, message in enumerate(body.messages) for turn in _turns(message, f"messages[{index}]")]
    fields: dict[str, Any] = {"model": body.model, "messages": opening + turns}
    if body.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": body.thinking.type != "disabled"}
    if body.tools:
        fields["tools"] = [_function(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(body.tool_choice)
        fields["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    return fields


def _turns(message: Message, where: str) -> Iterator[dict[str, Any]]:
    """A message as chat messages: each tool result is one of its own, before the text it came with."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts, calls, thoughts = [], [], []
    for index, block in enumerate(message.content):
        place, kind = f"{where}.content[{index}]", block.get("type")
        if kind == "text":
            texts.append(_text([block], place))
        elif kind == "tool_result" and message.role == "user":
            content = _text(block.get("content") or "", f"{place}.content")
            yield {"role": "tool", "tool_call_id": _field(block, "tool_use_id", place), "content": content}
        elif kind == "tool_use" and message.role == "assistant":
            function = {"name": _field(block, "name", place), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": _field(block, "id", place), "type": "function", "function": function})
        elif kind == "thinking" and message.role == "assistant":
            thoughts.append(_field(block, "thinking", place))
        elif kind != "redacted_thinking":
            raise ApiError(
                f"{place}: blocks of type {kind!r} are not supported for {message.role}", param=place, code="unsupported_value"
            )
    if message.role == "assistant":
        turn = {"role": "assistant", "content": "\n".join(texts) if texts or not calls else None}
        yield {**turn, "tool_calls": calls or None, "reasoning_content": "\n".join(thoughts) or None}
    elif texts:
        yield {"role": "user", "content": "\n".join(texts)}


def _text(content: Any, where: str) -> str:
    """A string, or the texts of a list of text blocks."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    texts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            raise ApiError(f"{where}: expected text blocks, got {kind!r}", param=where, code="unsupported_value")
        texts.append(_field(block, "text", where))
    return "\n".join(texts)


def _field(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise bad_value(f"{where}.{name}", f"{where}.{name}: expected a string, got {type(value).__name__}")
    return value


def _function(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> Any:
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if choice.name is None:
        raise bad_value("tool_choice.name", "tool_choice.name: expected the name of a tool")
    return {"type": "function", "function": {"name": choice.name}}


def _content(block: Block) -> dict[str, Any]:
    """A content block as a message shows it."""
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _arguments(block.text)}


def _arguments(text: str) -> Any:
    """Arguments as data; what the length limit has cut in two is shown as text."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {"_incomplete": text}


def _head(answer: Answer, name: str) -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "assistant", "model": answer.model}


def _ending(choice: dict[str, Any]) -> dict[str, Any]:
    """Why it ended, from the last choice of a chat answer."""
    reason, matched = choice["finish_reason"], choice.get("stop_reason")
    shown = {"length": "max_tokens", "tool_calls": "tool_use"}.get(reason, "end_turn")
    if reason == "stop" and isinstance(matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {"stop_reason": shown, "stop_sequence": None}


def _usage(answer: Answer, output: Output, view: View) -> dict[str, int]:
    """Anthropic's `input_tokens` are those that were not cached."""
    usage = answer.usage([output], view)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _whole(generation: Generation, answer: Answer, view: View, name: str) -> dict[str, Any]:
    output = generation.outputs[0]
    choice = view.whole(0, output)
    content = [_content(block) for block in blocks_of(choice["message"])]
    return {**_head(answer, name), "content": content, **_ending(choice), "usage": _usage(answer, output, view)}


async def _events(generation: Generation, answer: Answer, view: View, name: str) -> AsyncIterator[bytes]:
    """message_start, per block start, deltas and stop, then message_delta and message_stop."""
    output, blocks, last = generation.outputs[0], Blocks(), {}
    has_begun = False
    async for choices in choices_of(generation, view):
        if not has_begun:
            has_begun = True
            opening = {**_head(answer, name), "content": [], "stop_reason": None, "stop_sequence": None}
            yield _event("message_start", message={**opening, "usage": _usage(answer, output, view)})
        for last in choices:
            for change in blocks.feed(last["delta"]):
                yield _block_event(change)
    for change in blocks.end():
        yield _block_event(change)
    yield _event("message_delta", delta=_ending(last), usage=_usage(answer, output, view))
    yield _event("message_stop")


def _event(type: str, **fields: Any) -> bytes:
    return named_event(type, encode({"type": type, **fields}))


def _block_event(change: Change) -> bytes:
    block = change.block
    if change.what == "end":
        return _event("content_block_stop", index=block.index)
    if change.what == "begin":
        empty = Block(block.kind, block.index, block.call_id, block.name)
        return _event("content_block_start", index=block.index, content_block=_content(empty))
    kind, field = {
        "text": ("text_delta", "text"),
        "thinking": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[block.kind]
    return _event("content_block_delta", index=block.index, delta={"type": kind, field: change.text})
