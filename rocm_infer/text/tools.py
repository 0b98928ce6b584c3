# SPDX-License-Identifier: Apache-2.0
"""Tool calls in the text of models: which way of writing them a model has, reading them as they come, and grammars that force them.

A call counts from the moment its name and the beginning of its arguments have been read. Arguments are passed on as the model
writes them. What begins like a call and turns out to be none is content: no text is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rocm_infer.text import grammar
from rocm_infer.text.grammar import Format
from rocm_infer.text.reasoning import held_len

MAX_HEADER = 256  # characters between a marker and arguments; beyond that it is no call
State = Literal["text", "header", "arguments", "rest", "close"]
OBJECT_HEADER = (
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?(?:"id"\s*:\s*"[^"\\]*"\s*,\s*)?'
    r'"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True)
class Function:
    """A tool that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Any
    strict: bool = False


class Piece(NamedTuple):
    """Content (`call` is -1), or something new about call number `call`: its name, or more text of its arguments."""

    text: str
    call: int = -1
    name: str | None = None


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    Reading: after `begin` one of `headers` runs up to the arguments; `closers` may follow them and say what is read next;
    `noise` means nothing by itself. `at_start`: an answer that begins like a call is one, calls elsewhere are not looked for.
    Writing: `before` and `after` stand around all calls, `opening` (with NAME) and `closing` around each one's arguments.
    """

    name: str
    begin: str
    opening: str
    closing: str
    headers: tuple[str, ...] = (OBJECT_HEADER,)
    closers: tuple[tuple[str, State], ...] = ()
    noise: tuple[str, ...] = ()
    at_start: bool = False
    is_object: bool = False  # name and arguments are members of one JSON object
    is_xml: bool = False  # arguments are <parameter=NAME> elements
    before: str = ""
    after: str = ""
    separator: str = ""
    id_len: int = 24

    @property
    def markers(self) -> tuple[str, ...]:
        """What must be seen as text for calls to be read."""
        return (self.begin, *self.noise, *(closer for closer, _ in self.closers))


_SEP, _BEGIN, _END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK_HEADERS = (
    rf"\s*function{_SEP}(?P<name>[^\n]+)\n```json\n\s*(?=\{{)",
    rf"\s*(?P<name>[^\s{{<]+){_SEP}\s*(?=\{{)",
)
_DEEPSEEK_NOISE = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_MISTRAL_HEADERS = (r"\s*\[?" + OBJECT_HEADER, r"\s*(?P<name>[^\s\[{\"]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{)")

FORMATS = {
    form.name: form
    for form in (
        ToolFormat(
            "hermes",
            begin="<tool_call>",
            opening='<tool_call>\n{"name": "NAME", "arguments": ',
            closing="}\n</tool_call>",
            separator="\n",
            closers=(("</tool_call>", "text"),),
            is_object=True,
        ),
        ToolFormat(
            "qwen3_coder",
            begin="<tool_call>",
            opening="<tool_call>\n<function=NAME>\n",
            closing="\n</function>\n</tool_call>",
            separator="\n",
            headers=(r"\s*<function=(?P<name>[^>\s]+)>",),
            closers=(("</tool_call>", "text"),),
            is_xml=True,
        ),
        ToolFormat(
            "llama3_json",
            begin="{",
            opening='{"name": "NAME", "parameters": ',
            closing="}",
            separator="; ",
            closers=((";", "header"),),
            noise=("<|python_tag|>",),
            at_start=True,
            is_object=True,
        ),
        ToolFormat(
            "mistral",
            begin="[TOOL_CALLS]",
            before="[TOOL_CALLS][",
            opening='{"name": "NAME", "arguments": ',
            closing="}",
            separator=", ",
            after="]",
            headers=_MISTRAL_HEADERS,
            closers=((",", "header"), ("]", "text")),
            is_object=True,
            id_len=9,
        ),
        ToolFormat(
            "mistral_args",
            begin="[TOOL_CALLS]",
            opening="[TOOL_CALLS]NAME[ARGS]",
            closing="",
            headers=_MISTRAL_HEADERS,
            closers=((",", "header"), ("]", "text")),
            is_object=True,
            id_len=9,
        ),
        ToolFormat(
            "deepseek_v3",
            begin=_BEGIN,
            before="<｜tool▁calls▁begin｜>",
            opening=f"{_BEGIN}function{_SEP}NAME\n```json\n",
            closing=f"\n```{_END}",
            separator="\n",
            after="<｜tool▁calls▁end｜>",
            headers=_DEEPSEEK_HEADERS,
            closers=(("```", "close"), (_END, "text")),
            noise=_DEEPSEEK_NOISE,
        ),
        ToolFormat(
            "deepseek_v31",
            begin=_BEGIN,
            before="<｜tool▁calls▁begin｜>",
            opening=f"{_BEGIN}NAME{_SEP}",
            closing=_END,
            after="<｜tool▁calls▁end｜>",
            headers=_DEEPSEEK_HEADERS,
            closers=(("```", "close"), (_END, "text")),
            noise=_DEEPSEEK_NOISE,
        ),
    )
}


def format_of(template: str) -> ToolFormat:
    """How the model of a chat template writes calls; hermes where the template does not tell."""
    if "tool▁call▁begin" in template:
        return FORMATS["deepseek_v3" if "```json" in template else "deepseek_v31"]
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral_args" if "[ARGS]" in template else "mistral"]
    if "<function=" in template and "<parameter=" in template:
        return FORMATS["qwen3_coder"]
    if "<tool_call>" not in template and ("<|python_tag|>" in template or '"parameters": dictionary' in template):
        return FORMATS["llama3_json"]
    return FORMATS["hermes"]


def forced_calls(form: ToolFormat, functions: Sequence[Function], special: Mapping[str, int], *, parallel: bool) -> Format:
    """An output that is one call or, in parallel, several, and nothing else. Raises GrammarTextError."""
    call = grammar.any_of([_call(form, function, special, "") for function in functions])
    calls = [call]
    if parallel:
        more = grammar.sequence([*grammar.literal(form.separator, special), call])
        calls.append({"type": "star", "content": more})
    return grammar.sequence([*grammar.literal(form.before, special), *calls, *grammar.literal(form.after, special)])


def free_calls(form: ToolFormat, functions: Sequence[Function], special: Mapping[str, int], *, parallel: bool) -> Format | None:
    """Any output in which calls, where there are some, are well-formed; None where that cannot be told from the text before."""
    if form.at_start:
        return None
    loose = [function if function.strict else Function(function.name, {"type": "object"}) for function in functions]
    if form.before.startswith(form.begin):
        whole = forced_calls(form, loose, special, parallel=parallel)
        rest = {**whole, "elements": _without_beginning(whole["elements"], form.begin)}
    else:
        rest = grammar.any_of([_call(form, function, special, form.begin) for function in loose])
    if form.begin in special:
        return {"type": "token_dispatch", "rules": [[special[form.begin], rest]], "loop": parallel}
    return {"type": "dispatch", "rules": [[form.begin, rest]], "loop": parallel}


def _call(form: ToolFormat, function: Function, special: Mapping[str, int], cut: str) -> Format:
    """One call, without the text `cut` at its beginning."""
    opening = form.opening.replace("NAME", function.name).removeprefix(cut)
    try:
        arguments = grammar.json_schema(function.parameters)
    except grammar.GrammarTextError as error:
        raise grammar.GrammarTextError(f"function {function.name!r}: {error}") from error
    if form.is_xml:
        arguments["style"] = "qwen_xml"
    return grammar.sequence([*grammar.literal(opening, special), arguments, *grammar.literal(form.closing, special)])


def _without_beginning(elements: Sequence[Format], text: str) -> list[Format]:
    first = elements[0]
    if first["type"] == "token":
        return list(elements[1:])
    return [{**first, "value": first["value"].removeprefix(text)}, *elements[1:]]


class ToolSplit:
    """Takes an answer's text as it comes and tells content from calls. The result does not depend on how the text was cut."""

    def __init__(self, form: ToolFormat, functions: Sequence[Function]) -> None:
        self.num_calls = 0
        self._form = form
        self._functions = {function.name: function for function in functions}
        self._headers = [re.compile(header) for header in form.headers]
        self._state: State = "text"
        self._pending = ""
        self._begun = ""  # the text that announced the call whose header is being read
        self._is_start = True  # nothing but blank space so far
        self._json = _JsonScan()
        self._object = _JsonScan()
        self._looked_at = 0  # characters of what is pending that `_object` has seen
        self._is_member = False  # the arguments are a member of an object that goes on after them
        self._xml = _XmlArguments()

    def push(self, text: str) -> list[Piece]:
        """What `text` makes certain."""
        self._pending += text
        pieces: list[Piece] = []
        read: dict[State, Callable[[list[Piece]], bool]] = {
            "text": self._read_text,
            "header": self._read_header,
            "arguments": self._read_arguments,
            "rest": self._read_rest,
            "close": self._read_close,
        }
        while self._pending and read[self._state](pieces):
            pass
        return _merged(pieces)

    def finish(self) -> list[Piece]:
        """What was held back, once no more text comes."""
        pieces: list[Piece] = []
        if self._state == "header":
            self._give_up(len(self._pending), pieces)
        elif self._state == "arguments" and self._form.is_xml:
            self._argument(self._xml.finish(self._pending), pieces)
        elif self._state == "text":
            self._content(self._pending, pieces)
        self._pending = ""
        return _merged(pieces)

    def _content(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Piece(text))
            self._is_start = self._is_start and not text.strip()

    def _argument(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Piece(text, self.num_calls - 1))

    def _take(self, length: int) -> str:
        taken, self._pending = self._pending[:length], self._pending[length:]
        return taken

    def _read_text(self, pieces: list[Piece]) -> bool:
        """Content up to the next marker; each `_read_` returns whether it got further."""
        form = self._form
        if form.at_start:
            markers: tuple[str, ...] = form.noise
            if self._is_start and self._pending.lstrip().startswith(form.begin):
                self._pending, self._begun, self._state = self._pending.lstrip(), "", "header"
                self._object, self._looked_at = _JsonScan(), 0
                return True
        else:
            markers = (form.begin, *form.noise)
        found = min(((self._pending.find(marker), marker) for marker in markers if marker in self._pending), default=None)
        if found is None:
            held = max((held_len(self._pending, marker) for marker in markers), default=0)
            visible = self._pending[: len(self._pending) - held]
            self._content(self._take(len(visible.rstrip())), pieces)  # blank space may turn out to stand before a marker
            return False
        position, marker = found
        self._content(self._take(position).rstrip(), pieces)
        self._take(len(marker))
        if marker == form.begin:
            self._begun, self._state, self._object, self._looked_at = marker, "header", _JsonScan(), 0
        return True

    def _read_header(self, pieces: list[Piece]) -> bool:
        for header in self._headers:
            match = header.match(self._pending)
            if match is not None and self._may_call(match["name"]):
                self._open_call(match["name"].strip(), pieces)
                self._take(match.end())
                self._json, self._xml = _JsonScan(), _XmlArguments(self._functions.get(match["name"]))
                self._state, self._is_member = "arguments", '"name"' in match[0]
                return True
        if self._form.is_object and self._pending.lstrip(" \n\t\r[").startswith("{"):
            self._looked_at = self._object.end(self._pending, max(self._looked_at, self._pending.index("{")))
            if self._object.is_done:
                return self._whole_object(self._looked_at, pieces)
            return self._object.is_broken and self._give_up(self._looked_at, pieces)
        ends = [self._pending.find(text) for text in (self._form.begin, *self._closing_markers()) if text in self._pending]
        if ends:
            return self._give_up(min(ends), pieces)
        if self._form.is_object and self._form.headers == (OBJECT_HEADER,) and self._pending.strip():
            return self._give_up(len(self._pending) - len(self._pending.lstrip()), pieces)
        return len(self._pending) > MAX_HEADER and self._give_up(len(self._pending), pieces)

    def _closing_markers(self) -> list[str]:
        """Text that no header holds, so that a header cannot be read beyond it."""
        return [text for text in (*self._form.noise, *(closer for closer, _ in self._form.closers)) if len(text) > 3]

    def _may_call(self, name: str) -> bool:
        """Without a marker only the name of a known function tells a call from JSON."""
        return not self._form.at_start or name in self._functions

    def _open_call(self, name: str, pieces: list[Piece]) -> None:
        pieces.append(Piece("", self.num_calls, name))
        self.num_calls += 1

    def _give_up(self, length: int, pieces: list[Piece]) -> bool:
        """No call after all: what announced it and the next characters are content."""
        self._content(self._begun + self._take(length), pieces)
        self._begun, self._state, self._is_start = "", "text", False
        return True

    def _whole_object(self, end: int, pieces: list[Piece]) -> bool:
        """A complete object that no header matched: members in another order, arguments as text, or no call."""
        call = _parse_call(self._pending[self._pending.index("{") : end])
        if call is None or not self._may_call(call[0]):
            return self._give_up(end, pieces)
        self._take(end)
        self._open_call(call[0], pieces)
        self._argument(call[1], pieces)
        self._state = "close"
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        if self._form.is_xml:
            text, used = self._xml.read(self._pending)
            self._argument(text, pieces)
            self._take(used)
            if self._xml.is_done:
                self._state = "close"
            return bool(used) or self._xml.is_done
        self._argument(self._take(self._json.end(self._pending)), pieces)
        if self._json.is_done or self._json.is_broken:
            self._state, self._object = ("rest" if self._is_member else "close"), _JsonScan(depth=1)
            return True
        return False

    def _read_rest(self, pieces: list[Piece]) -> bool:
        """The end of the object that holds name and arguments."""
        self._take(self._object.end(self._pending))
        if self._object.is_done or self._object.is_broken:
            self._state = "close"
            return True
        return False

    def _read_close(self, pieces: list[Piece]) -> bool:
        self._pending = self._pending.lstrip()
        for closer, following in self._form.closers:
            if self._pending.startswith(closer):
                self._take(len(closer))
                self._state, self._begun = following, closer if following == "header" else ""
                self._object, self._looked_at = _JsonScan(), 0
                return True
        if any(closer.startswith(self._pending) for closer, _ in self._form.closers):
            return False
        self._state = "text"
        return True


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring pieces of the same content or arguments as one."""
    made: list[Piece] = []
    for piece in pieces:
        if made and piece.name is None and made[-1].name is None and made[-1].call == piece.call:
            made[-1] = Piece(made[-1].text + piece.text, piece.call)
        else:
            made.append(piece)
    return made


def _parse_call(text: str) -> tuple[str, str] | None:
    """Name and arguments (as JSON text) of a call object, None if it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            given, arguments = arguments, json.loads(arguments)
        except (ValueError, RecursionError):
            return None
        return (name, given) if isinstance(name, str) and isinstance(arguments, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        return None
    return name, json.dumps(arguments or {}, ensure_ascii=False)


class _JsonScan:
    """Finds the end of one JSON value in text that comes in pieces; only what can stand in JSON is looked at."""

    PLAIN = frozenset(',:.+-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" \t\r\n{}[]')

    def __init__(self, depth: int = 0) -> None:
        self.is_done = False
        self.is_broken = False
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def end(self, text: str, start: int = 0) -> int:
        """The position after the last character, from `start` on, that belongs to the value so far."""
        for position in range(start, len(text)):
            self._step(text[position])
            if self.is_done or self.is_broken:
                return position + self.is_done
        return len(text)

    def _step(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char not in self.PLAIN:
            self.is_broken = True
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_done = self._depth <= 0


class _XmlArguments:
    """<parameter=NAME> elements to the text of a JSON object, the values of string parameters as they come."""

    CLOSING, END = "</parameter>", "</function>"
    OPENING = re.compile(r"<parameter=([^>\n]+)>")

    def __init__(self, function: Function | None = None) -> None:
        schema = function.parameters if function is not None and isinstance(function.parameters, dict) else {}
        properties = schema.get("properties")
        self._properties: dict[str, Any] = properties if isinstance(properties, dict) else {}
        self._num_members = 0
        self._key: str | None = None
        self._is_fresh = False  # a line break here belongs to the markup
        self.is_done = False

    def read(self, text: str) -> tuple[str, int]:
        """JSON text, and how many characters it used up."""
        made, used = "", 0
        while not self.is_done:
            part, length = self._read_key(text[used:]) if self._key is None else self._read_value(text[used:])
            made, used = made + part, used + length
            if not length:
                break
        return made, used

    def finish(self, text: str) -> str:
        """What an output that breaks off in a value adds."""
        if self._key is None:
            return ""
        text = text.removeprefix("\n") if self._is_fresh else text
        return _escaped(text) if self._is_text() else text

    def _read_key(self, text: str) -> tuple[str, int]:
        start = text.lstrip()
        blank = len(text) - len(start)
        match = self.OPENING.match(start)
        if match is not None:
            self._key, self._is_fresh = match[1].strip(), True
            self._num_members += 1
            opening = "{" if self._num_members == 1 else ", "
            return (
                f"{opening}{json.dumps(self._key, ensure_ascii=False)}: {chr(34) if self._is_text() else ''}",
                blank + match.end(),
            )
        if not start.startswith(self.END) and (self.END.startswith(start) or self._may_open(start)):
            return "", 0
        self.is_done = True
        return "}" if self._num_members else "{}", blank + (len(self.END) if start.startswith(self.END) else 0)

    def _may_open(self, start: str) -> bool:
        beginning = "<parameter="
        return beginning.startswith(start) or (start.startswith(beginning) and len(start) < MAX_HEADER and "\n" not in start)

    def _read_value(self, text: str) -> tuple[str, int]:
        end = text.find(self.CLOSING)
        if end >= 0:
            value = self._without_break(text[:end]).removesuffix("\n")
            made = f'{_escaped(value)}"' if self._is_text() else _converted(value, self._choices())
            self._key = None
            return made, end + len(self.CLOSING)
        if not self._is_text():
            return "", 0
        held = max(held_len(text, self.CLOSING), held_len(text, "\n" + self.CLOSING))
        visible = text[: len(text) - held]
        return (_escaped(self._without_break(visible)), len(visible)) if visible else ("", 0)

    def _without_break(self, text: str) -> str:
        """A value's text without the line break after its opening tag."""
        fresh, self._is_fresh = self._is_fresh, False
        return text.removeprefix("\n") if fresh else text

    def _is_text(self) -> bool:
        kind = self._schema().get("type")
        return (kind == "string" or kind == ["string"]) and not self._choices()

    def _schema(self) -> dict[str, Any]:
        schema = self._properties.get(self._key or "")
        return schema if isinstance(schema, dict) else {}

    def _choices(self) -> list[Any]:
        """The values that an enum or a const leaves."""
        choices = self._schema().get("enum", [self._schema().get("const")])
        return [choice for choice in choices if choice is not None] if isinstance(choices, list) else []


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _converted(text: str, choices: Sequence[Any]) -> str:
    """A value that is no free text: one of the choices, or the JSON it spells, else a string."""
    if text.strip() in choices:
        return json.dumps(text.strip(), ensure_ascii=False)
    spelled = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        return json.dumps(json.loads(spelled), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
