# SPDX-License-Identifier: Apache-2.0
"""Tool calls through the official client: whole and streamed alike, in every family's way of writing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rocm_infer.text.chat import ChatTemplate
from rocm_infer.text.tools import FORMATS
from tests.server.fakes import CONTEXT, MODEL, TOKENIZER, FakeClient, Harness, Script, run
from tests.text.test_tools import SAMPLES

HI: list[Any] = [{"role": "user", "content": "hi"}]


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}, **more}}


CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS: list[Any] = [tool("get_weather", CITY), tool("add")]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HI, "tools": TOOLS, **fields}


async def deltas_of(server: Harness, **fields: Any) -> list[dict[str, Any]]:
    events = await server.events("/v1/chat/completions", body(stream=True, **fields))
    assert events[-1] == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events[:-1]]


def format_of(request: Any) -> dict[str, Any]:
    """The structural tag that reached the engine."""
    assert request.params.grammar is not None
    form: dict[str, Any] = json.loads(request.params.grammar.text)
    return form


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"), [sample for sample in SAMPLES if len(TOKENIZER.encode(sample[1])) < CONTEXT - 20]
)
def test_whole_and_streamed_answers_agree(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    async def scenario(server: Harness) -> None:
        answer = await server.sdk.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
        (choice,) = answer.choices
        found = choice.message.tool_calls or []
        assert [(call.function.name, call.function.arguments) for call in found] == calls  # type: ignore[union-attr]
        assert choice.message.content == (content or None)
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        length = FORMATS[name].id_len
        assert all(call.id.removeprefix("call_").isalnum() and len(call.id.removeprefix("call_")) == length for call in found)
        assert len({call.id for call in found}) == len(found)
        async with server.sdk.chat.completions.stream(model=MODEL, messages=HI, tools=TOOLS) as stream:
            final = None
            async for event in stream:
                final = event
            assert final is not None
            completion = stream.current_completion_snapshot
        message = completion.choices[0].message
        assert (message.content or "") == content
        streamed = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        assert streamed == calls
        assert completion.choices[0].finish_reason == choice.finish_reason

    run(scenario, FakeClient(Script(text=text)), tool_call_parser=name)


def test_deltas() -> None:
    """A name first, then arguments piece by piece; nothing is empty; the ending says why."""
    text = 'So\n<tool_call>{"name": "add", "arguments": {"a": 12}}</tool_call><tool_call>{"name": "add", "arguments": {}}</tool_call>'

    async def scenario(server: Harness) -> None:
        choices = await deltas_of(server)
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[1:3] == [{"content": "S"}, {"content": "o"}]
        calls = [call for delta in deltas[3:-1] for call in delta["tool_calls"]]
        assert all(list(delta) == ["tool_calls"] and len(delta["tool_calls"]) == 1 for delta in deltas[3:-1])
        heads = [call for call in calls if "id" in call]
        assert [(call["index"], call["type"], call["function"]) for call in heads] == [
            (0, "function", {"name": "add", "arguments": ""}),
            (1, "function", {"name": "add", "arguments": ""}),
        ]
        first = [call["function"]["arguments"] for call in calls if call["index"] == 0 and "id" not in call]
        assert "".join(first) == '{"a": 12}'
        assert len(first) > 3
        assert all(first)
        assert all(list(call) == ["index", "function"] for call in calls if "id" not in call)
        assert deltas[-1] == {}
        assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "tool_calls"]

    run(scenario, FakeClient(Script(text=text)))


def test_several_choices_number_their_own_calls() -> None:
    async def scenario(server: Harness) -> None:
        _, answer = await server.post("/v1/chat/completions", body(n=2))
        assert [len(choice["message"]["tool_calls"]) for choice in answer["choices"]] == [1, 1]
        events = await server.events("/v1/chat/completions", body(stream=True, n=2, logprobs=True, return_token_ids=True))
        chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
        for index in (0, 1):
            own = [chunk for chunk in chunks if chunk["index"] == index]
            assert {call["index"] for chunk in own for call in chunk["delta"].get("tool_calls", ())} == {0}
            ids = [token for chunk in own for token in chunk.get("token_ids", ())]
            assert TOKENIZER.decode(ids) == text
            assert sum(len((chunk["logprobs"] or {"content": ()})["content"]) for chunk in own) == len(ids)

    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    run(scenario, FakeClient(Script(text=text)))


@pytest.mark.parametrize(("max_tokens", "reason"), [(30, "length"), (None, "tool_calls")])
def test_calls_behind_thinking(max_tokens: int | None, reason: str) -> None:
    text = '<think>\nI <tool_call> it\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

    async def scenario(server: Harness) -> None:
        object.__setattr__(server.service.files, "template", ChatTemplate("hi {# <think> #}", {}))
        _, answer = await server.post("/v1/chat/completions", body(max_tokens=max_tokens))
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == reason
        if reason == "tool_calls":
            message = choice["message"]
            assert (message["reasoning_content"], message["content"]) == ("I <tool_call> it", None)
            assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}

    run(scenario, FakeClient(Script(text=text)))


def test_none_and_absent_tools_leave_text_alone() -> None:
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'

    async def scenario(server: Harness) -> None:
        for fields in ({"tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "auto"}):
            _, answer = await server.post("/v1/chat/completions", body(**fields))
            message = answer["choices"][0]["message"]
            assert message == {"role": "assistant", "content": text, "refusal": None}
            assert answer["choices"][0]["finish_reason"] == "stop"
        assert all(request.params.grammar is None for request in server.engine.requests)

    run(scenario, FakeClient(Script(text=text)))


def test_the_template_sees_tools_calls_and_results() -> None:
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for message in messages %}{{ message.role }}:"
        "{% if message.tool_calls %}{{ message.tool_calls[0].function.arguments.a }}"
        "{% else %}{{ message.content + message.tool_call_id|default('') }}{% endif %};{% endfor %}"
    )
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 12}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "24"}]},
    ]

    async def scenario(server: Harness) -> None:
        object.__setattr__(server.service.files, "template", ChatTemplate(template, {}))
        await server.post("/v1/chat/completions", body(messages=messages))
        await server.post("/v1/chat/completions", body(messages=messages, tool_choice="none"))
        prompts = [TOKENIZER.decode(request.prompt_ids) for request in server.engine.requests]
        assert prompts == [
            "[get_weather][add]user:hi;assistant:12;tool:24call_1;",
            "user:hi;assistant:12;tool:24call_1;",
        ]
        status, shown = await server.post("/tokenize", {"messages": HI, "tools": TOOLS})
        assert (status, TOKENIZER.decode(shown["tokens"])) == (200, "[get_weather][add]user:hi;")

    run(scenario)


def test_templates_that_need_content_get_it_empty() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}

    async def scenario(server: Harness) -> None:
        object.__setattr__(
            server.service.files, "template", ChatTemplate("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}", {})
        )
        status, _ = await server.post("/v1/chat/completions", body(messages=[*HI, {"role": "assistant", "tool_calls": [call]}]))
        assert status == 200
        assert TOKENIZER.decode(server.engine.requests[0].prompt_ids) == "<hi><>"

    run(scenario)


def test_what_is_forced() -> None:
    """required and a named function are grammars; strict functions and single calls too; auto alone is free."""
    strict = [tool("get_weather", CITY, strict=True), tool("add")]
    named = {"type": "function", "function": {"name": "add"}}

    async def scenario(server: Harness) -> None:
        async def asked(**fields: Any) -> Any:
            status, answer = await server.post("/v1/chat/completions", body(**fields))
            assert status == 200, answer
            return server.engine.requests[-1]

        assert (await asked()).params.grammar is None
        assert not server.engine.has_vocabulary
        form = format_of(await asked(tool_choice="required"))
        assert [element["type"] for element in form["elements"]] == ["or", "star"]
        assert server.engine.vocabulary[TOKENIZER.encode("a")[0]] == b"a"
        assert format_of(await asked(tool_choice="required", parallel_tool_calls=False))["type"] == "or"
        one = format_of(await asked(tool_choice=named))
        assert one["elements"][0]["value"] == '<tool_call>\n{"name": "add", "arguments": '
        assert format_of(await asked(tools=strict))["type"] == "dispatch"
        assert format_of(await asked(parallel_tool_calls=False))["loop"] is False
        both = format_of(await asked(response_format={"type": "json_object"}))
        assert [element["type"] for element in both["elements"]] == ["json_schema", "sequence"]

    run(scenario)


def test_special_markers_are_read_and_hidden() -> None:
    """Markers that are special tokens reach the parser although special tokens are not shown."""
    marked = "<|tool|>"  # a special token of the toy

    async def scenario(server: Harness) -> None:
        form = server.service.files.tool_format
        object.__setattr__(server.service.files, "tool_format", type(form)("toy", marked, marked + "NAME", "", form.headers))
        _, answer = await server.post("/v1/chat/completions", body())
        message = answer["choices"][0]["message"]
        assert (message["content"], message["tool_calls"][0]["function"]["name"]) == (None, "add")
        _, plain = await server.post("/v1/chat/completions", body(tools=[]))
        assert marked not in plain["choices"][0]["message"]["content"]

    run(scenario, FakeClient(Script(text=marked + '{"name": "add", "arguments": {}}')))
