# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities in the shapes clients expect: chat, completions, native, and vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from rocm_infer.engine.messages import TokenLogprob
from rocm_infer.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def readable(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one that is no whole UTF-8 is spelled `bytes:\\xe2\\x82`, as OpenAI does."""
    spelled = tokenizer.token_bytes(token_id)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token_id)
    return {"token": spelled.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelled)}


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[i].logprobs` of chat."""
    content = [
        {
            **_chat_token(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[i].logprobs` of completions, piece after piece: text offsets run on through the whole choice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def take(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """`token_ids` and `entries` run parallel; the first prompt token has no log-probability."""
        tokens, offsets = [], []
        for token_id in token_ids:
            tokens.append(readable(self._tokenizer, token_id))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        shown = {readable(self._tokenizer, token_id): _finite(logprob) for token_id, logprob in entry.top}
        shown.setdefault(readable(self._tokenizer, entry.token_id), _finite(entry.logprob))
        return shown


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's extension: per prompt token a map from token id to its log-probability and text."""
    shown: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            shown.append(None)
            continue
        pairs = [(entry.token_id, entry.logprob), *entry.top]
        shown.append(
            {
                str(token_id): {"logprob": _finite(logprob), "decoded_token": readable(tokenizer, token_id)}
                for token_id, logprob in pairs
            }
        )
    return shown


def native_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], token_ids: Sequence[int], with_text: bool
) -> list[list[Any]]:
    """/generate: [logprob, token id, text or null] per token."""
    return [
        _native(tokenizer, token_id, None if entry is None else entry.logprob, with_text)
        for entry, token_id in zip(entries, token_ids, strict=True)
    ]


def native_top_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], with_text: bool
) -> list[list[list[Any]] | None]:
    """/generate: the alternatives per token."""
    return [
        None if entry is None else [_native(tokenizer, token_id, logprob, with_text) for token_id, logprob in entry.top]
        for entry in entries
    ]


def _native(tokenizer: Tokenizer, token_id: int, logprob: float | None, with_text: bool) -> list[Any]:
    text = readable(tokenizer, token_id) if with_text else None
    return [None if logprob is None else _finite(logprob), token_id, text]
