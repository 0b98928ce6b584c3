# SPDX-License-Identifier: Apache-2.0
"""From engine outputs to what a user sees: text, token ids, log-probabilities, why it ended. Server and LLM share it."""

from __future__ import annotations

import dataclasses

from rocm_infer.config import SamplingParams
from rocm_infer.engine.messages import ErrorInfo, FinishReason, RequestOutput, TokenLogprob
from rocm_infer.text.detokenize import TextRules, TextStream
from rocm_infer.text.tokenizer import Tokenizer


def fan_out(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The parameters of `count` independent outputs of one prompt: consecutive seeds, one output each."""
    if count == 1 and params.n == 1:
        return [params]
    seeds = [None if params.seed is None else (params.seed + index + 2**63) % 2**64 - 2**63 for index in range(count)]
    return [dataclasses.replace(params, n=1, seed=seed) for seed in seeds]


class Output:
    """One output of one prompt while it grows. Feed it every `RequestOutput` of its request, in order.

    `finish_reason` is None until the end. A stop string ends the output before the engine knows: `done` is then true
    although the engine goes on, and the caller aborts the request. Tokens after the stop string are not counted.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        rules = TextRules(params.stop, params.include_stop, params.skip_special_tokens, params.min_tokens)
        self._stream = TextStream(tokenizer, rules)
        self._shown: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.finish_reason: FinishReason | None = None
        self.matched_stop: int | str | None = None
        self.num_prompt = 0
        self.num_cached = 0
        self.error: ErrorInfo | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """All text shown so far."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def feed(self, step: RequestOutput) -> str:
        """Takes one step's output; returns the text it adds, possibly empty."""
        if self.done:
            return ""
        if step.num_prompt:
            self.num_prompt, self.num_cached = step.num_prompt, step.num_cached
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = step.prompt_logprobs
        counted = self._stream.num_tokens
        shown = self._read(step)
        counted = self._stream.num_tokens - counted
        self.token_ids += step.token_ids[:counted]
        if step.logprobs:
            self.logprobs += step.logprobs[:counted]
        if shown:
            self._shown.append(shown)
        return shown

    def _read(self, step: RequestOutput) -> str:
        ids = step.token_ids
        if step.matched_stop is not None and ids:
            shown = self._stream.push(ids[:-1]) + self._stream.push_stop_token(ids[-1])
        else:
            shown = self._stream.push(ids)
        if step.finish_reason is not None:
            shown += self._stream.finish()
            self.finish_reason, self.matched_stop, self.error = step.finish_reason, step.matched_stop, step.error
        if self._stream.matched is not None:
            self.finish_reason, self.matched_stop = "stop", self._stream.matched
        return shown
