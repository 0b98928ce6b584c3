# SPDX-License-Identifier: Apache-2.0
"""How chat and completions show an output: as a choice of a whole answer, and as choices of chunks."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rocm_infer.server.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from rocm_infer.server.schema import ChatRequest, CompletionRequest
from rocm_infer.text.outputs import Output
from rocm_infer.text.reasoning import ReasoningSplit, count_thinking
from rocm_infer.text.tokenizer import Tokenizer
from rocm_infer.text.tools import Function, Piece, ToolFormat, ToolSplit


class Thinking(enum.Enum):
    """Whether an output may begin with thinking: not with this model, perhaps, or the prompt has opened it already."""

    NEVER = enum.auto()
    MAYBE = enum.auto()
    BEGUN = enum.auto()


class View(Protocol):
    """How one route shows an output. `start` counts the tokens already shown in earlier chunks."""

    kind: str
    chunk_kind: str

    def whole(self, index: int, output: Output) -> dict[str, Any]: ...
    def opening(self, index: int, output: Output) -> dict[str, Any] | None: ...
    def pieces(self, index: int, output: Output, text: str, start: int) -> list[dict[str, Any]]: ...
    def ending(self, index: int, output: Output, start: int) -> dict[str, Any]: ...
    def num_thinking(self, output: Output) -> int: ...


def _ending_fields(output: Output) -> dict[str, Any]:
    """Why it ended; `stop_reason` (vLLM) and `matched_stop` (SGLang) name the stop string or token id."""
    return {
        "finish_reason": output.finish_reason,
        "stop_reason": output.matched_stop,
        "matched_stop": output.matched_stop,
    }


class ChatView:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: ChatRequest,
        thinking: Thinking,
        tools: tuple[ToolFormat, Sequence[Function]] | None = None,
    ) -> None:
        """`tools`: how the model writes calls and what it may call, if it may."""
        self._tokenizer = tokenizer
        self._tools = tools
        self._tool_splits: dict[int, ToolSplit] = {}
        self._logprobs = body.logprobs
        self._token_ids = body.return_token_ids
        self._thinking = thinking if body.separate_reasoning else Thinking.NEVER
        self._splits: dict[int, ReasoningSplit] = {}

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        thought, pieces = self._read(index, output, output.text)
        content = "".join(piece.text for piece in pieces if piece.call < 0)
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.name is not None:
                calls.append({"id": self._call_id(), "type": "function", "function": {"name": piece.name, "arguments": ""}})
            elif piece.call >= 0:
                calls[piece.call]["function"]["arguments"] += piece.text
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if self._thinking is not Thinking.NEVER:
            message["reasoning_content"] = thought or None
        if calls:
            message["tool_calls"] = calls
        return {"index": index, "message": message, **self._tokens(output, 0), **self._ending(index, output)}

    def opening(self, index: int, output: Output) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def pieces(self, index: int, output: Output, text: str, start: int) -> list[dict[str, Any]]:
        """A chunk per thing that is new: thinking, content, a call's name, more of its arguments. Tokens go with the first."""
        thought, pieces = self._read(index, output, text)
        deltas = [{"reasoning_content": thought}] if thought else []
        deltas += map(self._delta, pieces)
        starts = [start, *[len(output.token_ids)] * (len(deltas) - 1)]
        return [
            {"index": index, "delta": delta, **self._tokens(output, first), "finish_reason": None}
            for delta, first in zip(deltas, starts)
        ]

    def ending(self, index: int, output: Output, start: int) -> dict[str, Any]:
        return {"index": index, "delta": {}, **self._tokens(output, start), **self._ending(index, output)}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.call < 0:
            return {"content": piece.text}
        call: dict[str, Any] = {"index": piece.call}
        if piece.name is not None:
            call |= {"id": self._call_id(), "type": "function", "function": {"name": piece.name, "arguments": ""}}
        else:
            call["function"] = {"arguments": piece.text}
        return {"tool_calls": [call]}

    def _call_id(self) -> str:
        """Mistral's templates take nothing but nine letters and digits."""
        assert self._tools is not None
        length = self._tools[0].id_len
        return ("" if length < 24 else "call_") + uuid.uuid4().hex[:length]

    def _ending(self, index: int, output: Output) -> dict[str, Any]:
        fields = _ending_fields(output)
        if index in self._tool_splits and self._tool_splits[index].num_calls and output.finish_reason == "stop":
            fields["finish_reason"] = "tool_calls"
        return fields

    def num_thinking(self, output: Output) -> int:
        if self._thinking is Thinking.NEVER:
            return 0
        pieces = map(self._tokenizer.token_bytes, output.token_ids)
        return count_thinking(pieces, inside=self._thinking is Thinking.BEGUN)

    def _read(self, index: int, output: Output, text: str) -> tuple[str, list[Piece]]:
        """Thinking, and pieces of the answer, in new text."""
        thought, answer = self._split(index, output, text)
        if self._tools is None:
            return thought, [Piece(answer)] if answer else []
        split = self._tool_splits.get(index)
        if split is None:
            split = self._tool_splits[index] = ToolSplit(*self._tools)
        return thought, split.push(answer) + (split.finish() if output.done else [])

    def _split(self, index: int, output: Output, text: str) -> tuple[str, str]:
        """(thinking, answer) in new text; at the end of the output also what was held back."""
        if self._thinking is Thinking.NEVER:
            return "", text
        split = self._splits.get(index)
        if split is None:
            split = self._splits[index] = ReasoningSplit(inside=self._thinking is Thinking.BEGUN)
        thought, answer = split.push(text)
        if output.done:
            rest = split.finish()
            thought, answer = thought + rest[0], answer + rest[1]
        return thought, answer

    def _tokens(self, output: Output, start: int) -> dict[str, Any]:
        entries = output.logprobs[start:] if self._logprobs else []
        shown: dict[str, Any] = {"logprobs": chat_logprobs(self._tokenizer, entries) if entries else None}
        if self._token_ids:
            shown["token_ids"] = output.token_ids[start:]
        return shown


class CompletionView:
    kind, chunk_kind = "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, body: CompletionRequest, prompts: Sequence[Echo], count: int) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompts = prompts
        self._count = count
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        prompt, shown = self._prompts[index // self._count], output.text
        logprobs = None
        if self._body.logprobs is not None:
            writer, ids, entries = CompletionLogprobs(self._tokenizer), output.token_ids, output.logprobs
            if self._body.echo:
                logprobs = writer.take([*prompt.ids, *ids], [*(output.prompt_logprobs or []), *entries])
            else:
                logprobs = writer.take(ids, entries)
        choice = {
            "index": index,
            "text": prompt.text + shown if self._body.echo else shown,
            "logprobs": logprobs,
            **_ending_fields(output),
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs or [])
        if self._body.return_token_ids:
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": prompt.ids}
        return choice

    def opening(self, index: int, output: Output) -> dict[str, Any] | None:
        if not self._body.echo:
            return None
        prompt = self._prompts[index // self._count]
        shown = self._take(index, prompt.ids, output.prompt_logprobs or [])
        return {"index": index, "text": prompt.text, "logprobs": shown, "finish_reason": None}

    def pieces(self, index: int, output: Output, text: str, start: int) -> list[dict[str, Any]]:
        if not text:
            return []
        return [{"index": index, "text": text, **self._tokens(index, output, start), "finish_reason": None}]

    def ending(self, index: int, output: Output, start: int) -> dict[str, Any]:
        return {"index": index, "text": "", **self._tokens(index, output, start), **_ending_fields(output)}

    def num_thinking(self, output: Output) -> int:
        return 0

    def _tokens(self, index: int, output: Output, start: int) -> dict[str, Any]:
        ids = output.token_ids[start:] if self._body.return_token_ids or self._body.logprobs is not None else []
        shown: dict[str, Any] = {"logprobs": self._take(index, ids, output.logprobs[start:])}
        if self._body.return_token_ids:
            shown["token_ids"] = ids
        return shown

    def _take(self, index: int, ids: Sequence[int], entries: Sequence[Any]) -> dict[str, Any] | None:
        if self._body.logprobs is None or not ids:
            return None
        writer = self._logprobs.get(index)
        if writer is None:
            writer = self._logprobs[index] = CompletionLogprobs(self._tokenizer)
        return writer.take(ids, entries)


@dataclass(frozen=True)
class Echo:
    """A prompt as a completion repeats it."""

    text: str
    ids: list[int]
