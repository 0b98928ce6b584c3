# SPDX-License-Identifier: Apache-2.0
"""Ids to text while they arrive: whole characters only, stop strings never leaked, time linear in the output."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from rocm_infer.text.tokenizer import Tokenizer


def _borders(pattern: str) -> list[int]:
    """Knuth-Morris-Pratt: for each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    matched = 0
    for position in range(1, len(pattern)):
        while matched and pattern[position] != pattern[matched]:
            matched = borders[matched - 1]
        matched += pattern[position] == pattern[matched]
        borders[position] = matched
    return borders


class StopMatcher:
    """Finds the first stop string to be completed, reading each character once; of several ending together, the longest.

    `push` returns text that can no longer become part of a stop string. After a match, `matched` is set and all that
    follows is dropped. The result depends on the text alone, not on how it was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched_len = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        if not self._stops or self.matched is not None:
            return text if self.matched is None else ""
        for position, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None:
                seen = self._held + text[: position + 1]
                self.matched, self._held = stop, ""
                return seen if self._include else seen[: len(seen) - len(stop)]
        seen = self._held + text
        keep = max(self._matched_len)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """One character further in every pattern; the stop string it completes."""
        found = None
        for index, stop in enumerate(self._stops):
            matched = self._matched_len[index]
            while matched and stop[matched] != char:
                matched = self._borders[index][matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                found = found or stop
                matched = self._borders[index][matched - 1]
            self._matched_len[index] = matched
        return found


@dataclass(frozen=True)
class TextRules:
    """What decides the text of one output beside its tokens."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0


class TextStream:
    """The text of one growing output.

    `push` takes the new ids and returns the text that is safe to show. When a stop string is completed, `matched` names
    it and `num_tokens` stops at the token that completed it, whatever came in the same call. The text continues the
    prompt: a leading space of the first token is kept.
    """

    def __init__(self, tokenizer: Tokenizer, rules: TextRules) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._hidden = tokenizer.special_ids if rules.skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(rules.stop, include=rules.include_stop)
        self._min_tokens = rules.min_tokens
        self._include_stop = rules.include_stop
        self.num_tokens = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    def push(self, ids: Sequence[int]) -> str:
        """Text made final by `ids`; stop strings count only in tokens beyond `min_tokens`."""
        if not ids or self.matched is not None:
            return ""
        shown = []
        for token_id in ids:
            self.num_tokens += 1
            if token_id in self._hidden:
                continue
            text = self._decoder.decode(self._token_bytes(token_id))
            shown.append(self._matcher.push(text) if self.num_tokens > self._min_tokens else text)
            if self.matched is not None:
                break
        return "".join(shown)

    def push_stop_token(self, token_id: int) -> str:
        """Counts the token that ended the output; its text appears only with `include_stop`."""
        if self._include_stop:
            return self.push([token_id])
        self.num_tokens += self.matched is None
        return ""

    def finish(self) -> str:
        """The held-back rest; bytes of an unfinished character become U+FFFD."""
        if self.matched is not None:
            return ""
        tail = self._decoder.decode(b"", final=True)
        return self._matcher.push(tail) + self._matcher.flush()
