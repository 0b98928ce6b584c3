# SPDX-License-Identifier: Apache-2.0
"""Calls in every family's way of writing: read the same however the text is cut, nothing lost, what is forced can be read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.config import TOOL_CALL_PARSERS
from rocm_infer.text.tools import FORMATS, Function, ToolFormat, ToolSplit, forced_calls, format_of, free_calls

FUNCTIONS = (
    Function("get_weather", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
    Function("add", {"type": "object"}),
)
Call = tuple[str, str]
NAMES = st.sampled_from([function.name for function in FUNCTIONS])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(st.sampled_from('a"\\{}[]<>;, \n`é😀'), max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "days", "name", "arguments"]), VALUES, max_size=3)
XML_ARGUMENTS = st.fixed_dictionaries(
    {}, optional={"city": st.text(st.sampled_from('a"\\<é '), max_size=8), "days": st.integers(-5, 5)}
)


def read(form: ToolFormat, pieces: list[str]) -> tuple[str, list[Call]]:
    """Content and calls of an answer that arrives in pieces."""
    split = ToolSplit(form, FUNCTIONS)
    found = [piece for text in pieces for piece in split.push(text)] + split.finish()
    content, calls = "", []
    for piece in found:
        if piece.call < 0:
            assert piece.text, "an empty piece of content"
            content += piece.text
        elif piece.name is not None:
            assert piece.call == len(calls), "calls are numbered in order"
            calls.append((piece.name, ""))
        else:
            assert piece.call == len(calls) - 1, "arguments come before the next call"
            calls[-1] = calls[-1][0], calls[-1][1] + piece.text
    assert split.num_calls == len(calls)
    return content, calls


def write(form: ToolFormat, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model of the family writes them."""
    written = []
    for name, arguments in calls:
        if form.is_xml:
            text = "\n".join(
                f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>"
                for key, value in arguments.items()
            )
        else:
            text = json.dumps(arguments, ensure_ascii=False)
        written.append(form.opening.replace("NAME", name) + text + form.closing)
    return form.before + form.separator.join(written) + form.after


SAMPLES: list[tuple[str, str, str, list[Call]]] = [
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": "</tool_call>}"}}\n</tool_call>\n'
        '<tool_call>{"arguments":{"b":[1]},"name":"get_weather"}</tool_call> bye ',
        "Let me see. bye ",
        [("add", '{"a": "</tool_call>}"}'), ("get_weather", '{"b": [1]}')],
    ),
    ("hermes", "<tool_call>oops</tool_call> x <b", "<tool_call>oops</tool_call> x <b", []),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": ?}}</tool_call>', "?}}</tool_call>", [("add", '{"a": ')]),
    ("hermes", "a <tool_call", "a <tool_call", []),
    (
        "qwen3_coder",
        'Hi\n<tool_call>\n<function=get_weather>\n<parameter=city>\n\nNew "York"\n</parameter>\n<parameter=days>3</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>",
        "Hi",
        [("get_weather", '{"city": "\\nNew \\"York\\"", "days": 3}'), ("add", "{}")],
    ),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nNew", "", [("get_weather", '{"city": "New')]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {}}',
        "",
        [("add", '{"a": 1}'), ("get_weather", "{}")],
    ),
    ("llama3_json", '{"name": "Bob", "age": 3} is it', '{"name": "Bob", "age": 3} is it', []),
    ("llama3_json", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ("llama3_json", 'so {"name": "add", "parameters": {}}', 'so {"name": "add", "parameters": {}}', []),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}, {"name":"add","arguments":{"b":"]"}}] so',
        " so",
        [("add", '{"a": 1}'), ("add", '{"b":"]"}')],
    ),
    ("mistral", "[TOOL_CALLS] I do not know", "[TOOL_CALLS] I do not know", []),
    (
        "mistral_args",
        'ok[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{"city": "q"}',
        "ok",
        [("add", '{"a": 1}'), ("get_weather", '{"city": "q"}')],
    ),
    (
        "deepseek_v3",
        'ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "ok",
        [("add", '{"a": 1}'), ("get_weather", "{}")],
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        [("add", '{"a": 1}')],
    ),
    ("deepseek_v31", "<｜tool▁call▁begin｜>what<｜tool▁call▁end｜>", "<｜tool▁call▁begin｜>what<｜tool▁call▁end｜>", []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), SAMPLES)
def test_samples_cut_at_every_place(name: str, text: str, content: str, calls: list[Call]) -> None:
    form = FORMATS[name]
    for cut in range(len(text) + 1):
        assert read(form, [text[:cut], text[cut:]]) == (content, calls), f"cut at {cut}"
    assert read(form, list(text)) == (content, calls)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_what_is_written_is_read(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    calls = data.draw(st.lists(st.tuples(NAMES, XML_ARGUMENTS if form.is_xml else ARGUMENTS), min_size=1, max_size=3))
    if form.is_xml:  # there an undeclared value has no type
        calls = [("get_weather", arguments) for _, arguments in calls]
    text = write(form, calls)
    size = data.draw(st.integers(1, 12))
    content, found = read(form, [text[start : start + size] for start in range(0, len(text), size)])
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


FRAGMENTS = (
    '{"name": "add", "arguments": ',
    '{"a": 1}',
    "}",
    "{",
    "]",
    ",",
    ";",
    "add",
    "\n",
    " ",
    '"',
    "x",
    "<",
    "```",
    "[ARGS]",
)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_any_text_reads_the_same_in_pieces_and_keeps_its_words(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    parts = data.draw(st.lists(st.sampled_from([*FRAGMENTS, *form.markers, form.opening.replace("NAME", "add")]), max_size=8))
    text = "".join(parts)
    whole = read(form, [text])
    assert read(form, list(text)) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert read(form, [text[:cut], text[cut:]]) == whole
    content, calls = whole
    if not calls:
        for noise in form.noise:
            text = text.replace(noise, "")
        assert "".join(content.split()) == "".join(text.split())


def test_calls_stream() -> None:
    """The name comes with its header, arguments as they arrive, content at once."""
    split = ToolSplit(FORMATS["hermes"], FUNCTIONS)
    assert split.push("So: ")[0].text == "So:"
    assert split.push('<tool_call>{"name": "add", "arguments": {')[0][1:] == (0, "add")
    assert split.push('"a": "lo')[0].text == '"a": "lo'
    assert split.push('ng"}')[0].text == 'ng"}'
    split = ToolSplit(FORMATS["qwen3_coder"], FUNCTIONS)
    split.push("<tool_call><function=get_weather><parameter=city>")
    assert split.push("\nlong")[0].text == "long"


def test_the_format_follows_the_template() -> None:
    assert set(TOOL_CALL_PARSERS) == {"auto", *FORMATS}
    for template, name in (
        ("x", "hermes"),
        ("<tool_call>\n{{ call }}", "hermes"),
        ("<tool_call>\n<function={{ name }}>\n<parameter={{ key }}>", "qwen3_coder"),
        ('{"name": function name, "parameters": dictionary of argument name and its value} <|python_tag|>', "llama3_json"),
        ("[TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral_args"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ name }}\\n```json", "deepseek_v3"),
        ("<｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>", "deepseek_v31"),
    ):
        assert format_of(template).name == name


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_special_markers_are_single_tokens_in_grammars(form: ToolFormat) -> None:
    special = {form.begin: 7}
    text = json.dumps(forced_calls(form, FUNCTIONS, special, parallel=True), ensure_ascii=False)
    assert ('"token": 7' in text) == (form.begin in form.before + form.opening)
    free = free_calls(form, FUNCTIONS, special, parallel=True)
    assert (free is None) == form.at_start
    if free is not None:
        assert (free["type"], free["rules"][0][0]) == ("token_dispatch", 7)
        assert free_calls(form, FUNCTIONS, {}, parallel=False) | {"rules": []} == {
            "type": "dispatch",
            "rules": [],
            "loop": False,
        }
