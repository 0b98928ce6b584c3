# SPDX-License-Identifier: Apache-2.0
"""Grammars of structured output: compiled beside the engine, matched token by token, one bit mask per next token.

A grammar is text in XGrammar's structural tag format (`rocm_infer.text.grammar` writes it). xgrammar is imported by the first
request that brings one. Masks are filled in a thread while the model's forward pass runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from rocm_infer.engine.request import Request
from rocm_infer.platform import usable_cores

if TYPE_CHECKING:
    import xgrammar

WORD = 32  # tokens per word of a mask
NO_TEXT = b"\xff"  # never part of UTF-8, so no grammar of characters allows it
COMPILE_THREADS = 2
CACHE_BYTES = 256 << 20  # of compiled grammars


class GrammarError(ValueError):
    """A grammar that cannot be compiled or satisfied; the message is the compiler's."""


class Masks:
    """The masks of one step in the making: row 0 allows everything, row i + 1 what the grammar of `requests[i]` allows."""

    def __init__(self, requests: Sequence[Request], filled: Future[torch.Tensor]) -> None:
        self._rows = {request: row for row, request in enumerate(requests, 1)}
        self._filled = filled

    def of(self, requests: Sequence[Request], device: torch.device) -> torch.Tensor:
        """[len(requests), ceil(V / 32)] i32 as the op `sample` takes it; waits until it is filled."""
        rows = torch.tensor([self._rows.get(request, 0) for request in requests], dtype=torch.int64)
        return self._filled.result()[rows].to(device, non_blocking=True)


class Grammars:
    """The grammars of one engine's requests. `vocabulary` must be set before the first `compile`."""

    def __init__(self, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.vocabulary: Sequence[bytes] | None = None  # bytes of each token; empty for those that stand for no text
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._compilers = ThreadPoolExecutor(1, "grammar-library")
        self._workers = ThreadPoolExecutor(COMPILE_THREADS, "grammar")
        self._filler = ThreadPoolExecutor(1, "grammar-mask")
        self._compiler: Future[xgrammar.GrammarCompiler] | None = None
        self._batch: xgrammar.BatchGrammarMatcher | None = None
        self._matchers: dict[Request, _Matcher] = {}

    def compile(self, text: str) -> Future[xgrammar.CompiledGrammar]:
        """Compiles in a thread; the future raises GrammarError."""
        return self._workers.submit(self._compile, text, self._library())

    def admit(self, request: Request, compiled: xgrammar.CompiledGrammar) -> None:
        """From now on the request's output follows a compiled grammar."""
        self._matchers[request] = _Matcher(compiled)

    def release(self, request: Request) -> None:
        """Forget a finished request."""
        self._matchers.pop(request, None)

    def begin(self, requests: Sequence[Request]) -> Masks | None:
        """Starts filling the masks for the next token of those requests that have a grammar; None if none has."""
        constrained = [request for request in requests if request.params.grammar is not None]
        if not constrained:
            return None
        return Masks(constrained, self._filler.submit(self._fill, constrained))

    def _library(self) -> Future[xgrammar.GrammarCompiler]:
        if self._compiler is None:
            assert self.vocabulary is not None, "a grammar came before the vocabulary"
            self._compiler = self._compilers.submit(self._make_compiler, self.vocabulary)
        return self._compiler

    def _make_compiler(self, vocabulary: Sequence[bytes]) -> xgrammar.GrammarCompiler:
        import xgrammar

        padded = [*vocabulary, *[b""] * (self._vocab_size - len(vocabulary))][: self._vocab_size]
        tokens = [token or NO_TEXT for token in padded]
        info = xgrammar.TokenizerInfo(
            tokens, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=list(self._eos_ids)
        )
        num_threads = max(1, min(8, usable_cores() // 2))
        return xgrammar.GrammarCompiler(info, max_threads=num_threads, cache_limit_bytes=CACHE_BYTES)

    def _compile(self, text: str, library: Future[xgrammar.GrammarCompiler]) -> xgrammar.CompiledGrammar:
        compiler = library.result()
        import xgrammar

        try:
            grammar = xgrammar.Grammar.from_structural_tag({"type": "structural_tag", "format": json.loads(text)})
            compiled = compiler.compile_grammar(_with_json_characters(grammar) if "Length" in text else grammar)
            first = self._empty_masks(1)
            _Matcher(compiled).matcher.fill_next_token_bitmask(first, 0)
        except (RuntimeError, ValueError) as error:
            raise GrammarError(_reason(error)) from error
        if not _without(first[0], self._vocab_size, frozenset()).any():
            raise GrammarError("no output can satisfy it")
        return compiled

    def _empty_masks(self, num_rows: int) -> torch.Tensor:
        shape = (num_rows, -(-self._vocab_size // WORD))
        return torch.full(shape, -1, dtype=torch.int32, pin_memory=torch.cuda.is_available())

    def _fill(self, requests: Sequence[Request]) -> torch.Tensor:
        masks = self._empty_masks(len(requests) + 1)
        matchers = [self._matcher(request) for request in requests]
        for matcher, request in zip(matchers, requests):
            matcher.follow(request)
        self._batch_matcher().batch_fill_next_token_bitmask(
            [matcher.matcher for matcher in matchers], masks, list(range(1, len(requests) + 1))
        )
        for row, request in enumerate(requests, 1):
            if request.num_output < request.params.min_tokens:
                kept = _without(masks[row], self._vocab_size, request.stop_ids)
                if kept.any():  # else the grammar allows nothing but the end
                    masks[row] = kept
        return masks

    def _matcher(self, request: Request) -> _Matcher:
        """The request's matcher. One that was never admitted (steps that are repeated) gets it here."""
        if request not in self._matchers:
            assert request.params.grammar is not None
            self.admit(request, self._compile(request.params.grammar.text, self._library()))
        return self._matchers[request]

    def _batch_matcher(self) -> xgrammar.BatchGrammarMatcher:
        if self._batch is None:
            import xgrammar

            self._batch = xgrammar.BatchGrammarMatcher(max(1, min(8, usable_cores() // 2)))
        return self._batch


class _Matcher:
    """Where the output of one request stands in its grammar. Preemption and repeated steps leave it as it is."""

    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        import xgrammar

        self.matcher: Any = xgrammar.GrammarMatcher(compiled)
        self.num_accepted = 0

    def follow(self, request: Request) -> None:
        """Takes the output tokens it has not seen. Raises RuntimeError if the grammar forbids one."""
        for token in request.tokens[request.num_prompt + self.num_accepted :]:
            if not self.matcher.accept_token(token):
                raise RuntimeError(f"token {token} of output position {self.num_accepted} is not in the request's grammar")
            self.num_accepted += 1


def _with_json_characters(grammar: xgrammar.Grammar) -> xgrammar.Grammar | str:
    """Strings with minLength or maxLength without control characters, which XGrammar's own rule for these allows. Escapes stay
    forbidden there: with them a mask takes 90 ms in place of 0.1 ms."""
    return _BOUNDED.sub(lambda rule: rule[1] + r" ::= (([^\0-\x1f\"\\]))", str(grammar))


_BOUNDED = re.compile(r'^(\w+_characters(?:_\d+)?) ::= \(\(\[\^\\"\\\\\\r\\n\]\)\)$', re.MULTILINE)


def _without(mask: torch.Tensor, vocab_size: int, tokens: frozenset[int]) -> torch.Tensor:
    """A copy of a mask row [ceil(V / 32)] that forbids some tokens. XGrammar may set bits beyond the vocabulary: not here."""
    kept = mask.clone()
    for token in (*tokens, *range(vocab_size, len(mask) * WORD)):
        kept[token // WORD] &= _ALL_BUT[token % WORD]
    return kept


_ALL_BUT = [~(1 << bit) if bit < WORD - 1 else (1 << bit) - 1 for bit in range(WORD)]  # as signed 32-bit words


def _reason(error: Exception) -> str:
    """The compiler's message without its own file names."""
    text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return text.partition(": ")[2] if text.startswith("[") else text
