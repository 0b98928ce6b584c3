# SPDX-License-Identifier: Apache-2.0
"""Splits what a model thinks from what it answers: `<think>...</think>` at the start of an output."""

from __future__ import annotations

from collections.abc import Iterable

OPENING, CLOSING = "<think>", "</think>"


def thinks(template_source: str) -> bool:
    """Whether a chat template belongs to a model of this kind."""
    return OPENING in template_source or CLOSING in template_source


def begins_inside(prompt: str) -> bool:
    """Whether the prompt has opened the thinking already, so that the output starts in the middle of it."""
    return prompt.rstrip().endswith(OPENING)


def count_thinking(pieces: Iterable[bytes], *, inside: bool) -> int:
    """How many tokens, given as their bytes, belong to the thinking, markers included."""
    seen, count = b"", 0
    for count, piece in enumerate(pieces, 1):
        seen = (seen + piece)[-64:] if inside else seen + piece
        if not inside:
            start = seen.lstrip()
            inside = start.startswith(OPENING.encode())
            if not inside and not OPENING.encode().startswith(start):
                return 0
        if inside and CLOSING.encode() in seen:
            return count
    return count if inside else 0


def held_len(text: str, marker: str) -> int:
    """Length of the longest end of `text` that could become `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[len(text) - length :]):
            return length
    return 0


class ReasoningSplit:
    """Takes text as it comes and tells thinking from answer; markers and the blank space around them are dropped.

    Only a marker at the very start opens; without it everything is answer. Text that could still become a marker is held
    back, so the result does not depend on how the text was cut.
    """

    def __init__(self, *, inside: bool) -> None:
        self.inside = inside
        self._undecided = not inside  # nothing but blank space or the beginning of a marker so far
        self._fresh = inside  # drop blank space before the next visible character
        self._pending = ""

    def push(self, text: str) -> tuple[str, str]:
        """(thinking, answer) that `text` makes final."""
        self._pending += text
        if self._undecided and not self._decide():
            return "", ""
        thought = self._think() if self.inside else ""
        return thought, "" if self.inside else self._take(len(self._pending))

    def finish(self) -> tuple[str, str]:
        """What was held back, once no more text comes."""
        rest = self._take(len(self._pending))
        return (rest, "") if self.inside else ("", rest)

    def _decide(self) -> bool:
        start = self._pending.lstrip()
        if start.startswith(OPENING):
            self.inside = self._fresh = True
            self._pending = start[len(OPENING) :]
        elif OPENING.startswith(start):
            return False
        self._undecided = False
        return True

    def _think(self) -> str:
        position = self._pending.find(CLOSING)
        if position < 0:
            visible = len(self._pending) - held_len(self._pending, CLOSING)
            kept = self._pending[:visible].rstrip()  # blank space may turn out to stand before the marker
            return self._take(len(kept))
        thought = self._take(position).rstrip()
        self._pending = self._pending[len(CLOSING) :]
        self.inside, self._fresh = False, True
        return thought

    def _take(self, length: int) -> str:
        """The first characters of what is pending, without blank space where none shall lead."""
        taken, self._pending = self._pending[:length], self._pending[length:]
        if self._fresh:
            taken = taken.lstrip()
            self._fresh = not taken
        return taken
