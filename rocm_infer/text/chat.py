# SPDX-License-Identifier: Apache-2.0
"""Chat messages to prompt text, through the checkpoint's own Jinja template in a sandbox.

The environment offers what templates in the field rely on, as Hugging Face documents it: block trimming, loop controls,
`raise_exception`, `strftime_now`, `tojson` without HTML escaping, and a `{% generation %}` block that only passes its body on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rocm_infer.text.files import read_json
from rocm_infer.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


class ChatError(ValueError):
    """Messages or template cannot make a prompt. `param` names the request field, `code` an OpenAI error code."""

    def __init__(self, message: str, param: str | None = "messages", code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _find_source(directory: Path, config: dict[str, Any]) -> str | None:
    """Template text: chat_template.jinja, else `chat_template` in tokenizer_config.json (a string, or named ones: `default`)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


class ChatTemplate:
    """A compiled template with the special tokens it may mention."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Raises ChatError when the template is not valid Jinja."""
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatError(f"chat template is not valid: {error}", param="chat_template") from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, override: Path | None = None) -> ChatTemplate | None:
        """The checkpoint's template, or the file `override`; None when there is none."""
        if override is not None:
            if not override.is_file():
                raise ChatError(f"--chat-template {override}: no such file", param="chat_template")
            return cls(override.read_text(encoding="utf-8"), tokenizer.special_tokens)
        source = _find_source(directory, tokenizer.config or read_json(directory / "tokenizer_config.json"))
        return None if source is None else cls(source, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Prompt text. `continue_final_message` cuts the prompt right after the last message's text, to be continued.

        `variables` reach the template by name (enable_thinking, tools, ...). Raises ChatError.
        """
        if continue_final_message and add_generation_prompt:
            raise ChatError(
                "continue_final_message and add_generation_prompt exclude each other; set add_generation_prompt to false",
                param="continue_final_message",
            )
        given = {**(variables or {}), "messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            text = self._render(given)
        except jinja2.TemplateError as error:
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template computes with request data: any exception of its expressions lands here
            raise ChatError(f"the model's chat template fails on these messages: {type(error).__name__}: {error}") from error
        return _cut_after(text, messages[-1]) if continue_final_message else text

    def _render(self, given: dict[str, Any]) -> str:
        """Calls have no content; a template that cannot do without gets an empty one."""
        try:
            return self._template.render(**{**self._special_tokens, **given})
        except TypeError:
            filled = [{**message, "content": message.get("content") or ""} for message in given["messages"]]
            if filled == given["messages"]:
                raise
            return self._template.render(**{**self._special_tokens, **given, "messages": filled})


def _cut_after(text: str, message: Message) -> str:
    content = (message.get("content") or "").strip()
    position = text.rfind(content) if content else -1
    if position < 0:
        raise ChatError("continue_final_message: the template does not show the last message as it is")
    return text[: position + len(content)]


def check_messages(messages: Any) -> list[Message]:
    """Validated copies of a request's messages as templates expect them.

    `developer` becomes `system`, lists of text parts one string (joined by newlines), null content "" unless the
    assistant calls tools, tool arguments an object instead of its JSON text. Raises ChatError naming the place.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages: expected a non-empty list of messages")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ChatError(f"{where}: expected an object, got {type(message).__name__}", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r}", param=f"{where}.role")
    clean = {name: value for name, value in message.items() if value is not None}
    clean["role"] = "system" if role == "developer" else role
    calls = clean.get("tool_calls")
    if calls:
        clean["tool_calls"] = _check_calls(calls, f"{where}.tool_calls")
    else:
        clean.pop("tool_calls", None)
    content = _join_parts(message.get("content"), f"{where}.content")
    if content is None and not calls:
        if role != "assistant":
            raise ChatError(f"{where}.content: expected text, got null", param=f"{where}.content")
        content = ""
    clean["content"] = content
    return clean


def _join_parts(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatError(f"{where}: expected a string or a list of text parts, got {type(content).__name__}", param=where)
    texts = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ChatError(f"{place}: only text parts are supported, got {kind!r}", param=place, code="unsupported_value")
        if not isinstance(part.get("text"), str):
            raise ChatError(f"{place}.text: expected a string", param=f"{place}.text")
        texts.append(part["text"])
    return "\n".join(texts)


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ChatError(f"{where}: expected a list, got {type(calls).__name__}", param=where)
    checked = []
    for index, call in enumerate(calls):
        place = f"{where}[{index}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatError(f"{place}: expected an object with a name", param=place)
        checked.append({**call, "function": {**function, "arguments": _arguments(function, place)}})
    return checked


def _arguments(function: dict[str, Any], where: str) -> Any:
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except ValueError as error:
        raise ChatError(f"{where}.arguments: not valid JSON ({error})", param=f"{where}.arguments") from error
