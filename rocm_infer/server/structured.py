# SPDX-License-Identifier: Apache-2.0
"""What a request asks its output to look like: response_format, tools, and the fields of SGLang and vLLM, as one grammar."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rocm_infer.config import Grammar
from rocm_infer.server.errors import bad_value
from rocm_infer.server.schema import ChatRequest, Constraints
from rocm_infer.server.service import Service
from rocm_infer.server.views import Thinking
from rocm_infer.text import grammar
from rocm_infer.text.grammar import Format, GrammarTextError
from rocm_infer.text.reasoning import CLOSING, OPENING
from rocm_infer.text.tools import Function, ToolFormat, forced_calls, free_calls

MAX_TOOLS = 1024
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
Asked = tuple[str, Format]  # the request field and what it asks for


@dataclass(frozen=True)
class Tools:
    """The functions a chat may call. With choice "required" the output is calls to `callable` alone."""

    form: ToolFormat
    functions: tuple[Function, ...]
    callable: tuple[Function, ...]
    choice: Literal["auto", "required"]
    parallel: bool


def tools_of(body: ChatRequest, form: ToolFormat) -> Tools | None:
    """The tools of a request; None if it has none or may not call them."""
    functions = tuple(_function(tool, f"tools[{index}]") for index, tool in enumerate(body.tools))
    if len(functions) > MAX_TOOLS:
        raise bad_value("tools", f"tools: expected at most {MAX_TOOLS}, got {len(functions)}")
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise bad_value("tools", "tools: every function needs a name of its own")
    choice, parallel = body.tool_choice, body.parallel_tool_calls
    if choice == "none" or (not functions and choice in (None, "auto")):
        return None
    if not functions:
        raise bad_value("tool_choice", "tool_choice: expected tools as well")
    if choice in (None, "auto"):
        return Tools(form, functions, functions, "auto", parallel)
    if choice == "required":
        return Tools(form, functions, functions, "required", parallel)
    named = _chosen_name(choice)
    if named not in names:
        raise bad_value("tool_choice", f"tool_choice: there is no tool {named!r}; there are {', '.join(names)}")
    return Tools(form, functions, (functions[names.index(named)],), "required", False)


def _function(tool: Any, where: str) -> Function:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    if not isinstance(function, dict):
        raise bad_value(where, f'{where}: expected {{"type": "function", "function": {{...}}}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise bad_value(f"{where}.function.name", f"{where}.function.name: expected up to 64 of a-z, A-Z, 0-9, _, - and .")
    if parameters is not None and not isinstance(parameters, dict):
        raise bad_value(f"{where}.function.parameters", f"{where}.function.parameters: expected a JSON schema")
    return Function(name, parameters or {"type": "object", "properties": {}}, function.get("strict") is True)


def _chosen_name(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        message = 'tool_choice: expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        raise bad_value("tool_choice", message)
    return str(function["name"])


def chat_grammar(body: ChatRequest, tools: Tools | None, thinking: Thinking, special: Mapping[str, int]) -> Grammar | None:
    """What the output of a chat request must look like, thinking included; `special` are the special tokens by text."""
    asked = asked_of(body)
    if tools is not None:
        asked = _with_tools(asked, tools, special)
    if asked is None:
        return None
    field, form = asked
    if thinking is not Thinking.NEVER:
        form = grammar.after_thinking(form, OPENING, CLOSING, special, begun=thinking is Thinking.BEGUN)
    return _finished(field, form)


def _with_tools(asked: Asked | None, tools: Tools, special: Mapping[str, int]) -> Asked | None:
    try:
        if tools.choice == "required":
            return "tools", forced_calls(tools.form, tools.callable, special, parallel=tools.parallel)
        if asked is not None:
            calls = forced_calls(tools.form, tools.functions, special, parallel=tools.parallel)
            return asked[0], grammar.any_of([asked[1], calls])
        if tools.parallel and not any(function.strict for function in tools.functions):
            return None
        free = free_calls(tools.form, tools.functions, special, parallel=tools.parallel)
        return None if free is None else ("tools", free)
    except GrammarTextError as error:
        raise bad_value("tools", f"tools: {error}") from error


def plain_grammar(body: Constraints, *, prefix: str = "") -> Grammar | None:
    """What the output of a request without a conversation must look like. `prefix` stands before field names in errors."""
    asked = asked_of(body, prefix=prefix)
    return None if asked is None else _finished(*asked)


def _finished(field: str, form: Format) -> Grammar:
    try:
        return Grammar(grammar.as_text(form), field)
    except GrammarTextError as error:
        raise bad_value(field, f"{field}: {error}") from error


def asked_of(body: Constraints, *, prefix: str = "") -> Asked | None:
    """The one field that constrains the output, and how."""
    given = {name: value for name in _WRITERS if (value := getattr(body, name, None)) is not None}
    if given.get("response_format", {}).get("type") == "text":
        del given["response_format"]
    if not given:
        return None
    field = prefix + next(iter(given))
    if len(given) > 1:
        raise bad_value(field, f"{field}: expected one of {', '.join(prefix + name for name in given)}, got several")
    ((name, value),) = given.items()
    try:
        return field, _WRITERS[name](value)
    except GrammarTextError as error:
        raise bad_value(field, f"{field}: {error}") from error


def _response_format(value: dict[str, Any]) -> Format:
    kind = value.get("type")
    if kind == "json_object":
        return grammar.json_object()
    if kind != "json_schema":
        raise GrammarTextError(f"expected the type text, json_object or json_schema, got {kind!r}")
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise GrammarTextError("json_schema needs an object `schema`")
    return grammar.json_schema(schema)


def _schema(value: Any) -> Format:
    """A JSON schema, as an object or as its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise GrammarTextError(f"not valid JSON ({error})") from error
    return grammar.json_schema(value)


def _structured(value: dict[str, Any]) -> Format:
    """vLLM's structured_outputs."""
    kinds = {name: inner for name, inner in value.items() if inner not in (None, False)}
    known: dict[str, Callable[[Any], Format]] = {
        "json": _schema,
        "regex": _regex,
        "choice": _choice,
        "grammar": _ebnf,
        "json_object": lambda _: grammar.json_object(),
    }
    if len(kinds) != 1 or not known.keys() >= kinds.keys():
        raise GrammarTextError(f"expected exactly one of {', '.join(known)}")
    ((name, inner),) = kinds.items()
    return known[name](inner)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise GrammarTextError("expected a non-empty string")
    return value


def _regex(value: Any) -> Format:
    return grammar.regex(_text(value))


def _ebnf(value: Any) -> Format:
    return grammar.ebnf(_text(value))


def _choice(value: Any) -> Format:
    if not isinstance(value, list) or not value:
        raise GrammarTextError("expected a non-empty list of strings")
    return grammar.choice([_text(item) for item in value])


_WRITERS: dict[str, Callable[[Any], Format]] = {
    "response_format": _response_format,
    "json_schema": _schema,
    "regex": _regex,
    "ebnf": _ebnf,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _ebnf,
    "structured_outputs": _structured,
}


async def teach_vocabulary(service: Service, grammars: Sequence[Grammar | None]) -> None:
    """Gives the engine the bytes of its tokens before the first grammar."""
    if any(grammars) and not service.client.has_vocabulary:
        service.client.set_vocabulary(await asyncio.to_thread(service.tokenizer.vocabulary, service.vocab_size))
