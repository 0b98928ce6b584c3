# SPDX-License-Identifier: Apache-2.0
"""A chat answer as blocks, one after the other: thinking, text, calls. The Messages and Responses routes speak in these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["thinking", "text", "call"]


@dataclass
class Block:
    """`text` is what it holds so far: thinking, text, or a call's arguments as JSON text."""

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    text: str = ""


@dataclass(frozen=True)
class Change:
    """A block begins, grows by `text`, or ends."""

    what: Literal["begin", "grow", "end"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks of one answer, from the deltas of its chunks or from its whole message."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def feed(self, delta: Mapping[str, Any]) -> Iterator[Change]:
        """What a delta (or a message, which has the same fields) changes."""
        for kind, text, call in _parts(delta):
            if self._open is None or self._open.kind != kind or call.get("id"):
                yield from self.end()
                name = call.get("function", {}).get("name", "")
                self._open = Block(kind, len(self.all), call.get("id", ""), name)
                self.all.append(self._open)
                yield Change("begin", self._open)
            if text:
                self._open.text += text
                yield Change("grow", self._open, text)

    def end(self) -> Iterator[Change]:
        """Ends the block that is open."""
        if self._open is not None:
            yield Change("end", self._open)
            self._open = None


def blocks_of(message: Mapping[str, Any]) -> list[Block]:
    """The blocks of a whole message."""
    blocks = Blocks()
    for _ in blocks.feed(message):
        pass
    return blocks.all


def _parts(delta: Mapping[str, Any]) -> Iterator[tuple[Kind, str, Mapping[str, Any]]]:
    """(kind, text, call) of a delta's fields; `call` is empty unless the kind is call."""
    if delta.get("reasoning_content"):
        yield "thinking", delta["reasoning_content"], {}
    if delta.get("content"):
        yield "text", delta["content"], {}
    for call in delta.get("tool_calls") or ():
        yield "call", call["function"].get("arguments") or "", call
