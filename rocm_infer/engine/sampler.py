# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: gathers the requests' sampling parameters into tensors and calls the op `sample`.

Rows are sampled in at most two groups: plain ones, and those whose logits are changed first (penalties, bias, min_tokens, grammar),
since only these need tables as wide as the vocabulary. A group's tensors are built when the composition of the batch changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rocm_infer.config import SamplingParams
from rocm_infer.engine.grammar import Masks
from rocm_infer.engine.messages import TokenLogprob
from rocm_infer.engine.request import Request


class Sampled(NamedTuple):
    """Per row: the token id (-1 where the logits were not finite) and, if any row asked, its log-probabilities."""

    ids: list[int]
    logprobs: list[TokenLogprob | None] | None


@dataclass(slots=True)
class _Group:
    requests: list[Request]
    rows: list[int]
    index: torch.Tensor | None  # of `rows`; None: all of them
    arguments: tuple[torch.Tensor, ...]  # temperature, top_k, top_p, min_p, seeds
    counters: torch.Tensor | None  # constant when all is greedy, else None
    penalties: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # presence, frequency, repetition
    table_rows: torch.Tensor | None
    bias: torch.Tensor | None
    is_masked: bool
    num_logprobs: int


class Sampler:
    """Chooses the next tokens. A request's randomness is a function of its seed and the number of its output tokens alone."""

    def __init__(self, sample: Callable[..., Any], vocab_size: int, device: torch.device) -> None:
        self.sample_op = sample
        self.vocab_size = vocab_size
        self.device = device
        self.requests: list[Request] = []
        self.groups: list[_Group] = []
        self.num_steps_valid = 0
        self.tables = _PenaltyTables(vocab_size, device)

    def sample(self, logits: torch.Tensor, requests: list[Request], masks: Masks | None = None) -> Sampled:
        """One token per row of logits [n, V] f32, which belong to `requests`; `masks` for those that have a grammar."""
        if self.num_steps_valid == 0 or requests != self.requests:
            self._compose(requests)
        self.num_steps_valid -= 1
        ids = [-1] * len(requests)
        logprobs: list[TokenLogprob | None] = [None] * len(requests)
        for group in self.groups:
            found = self._sample_group(group, logits, masks)
            for row, token in zip(group.rows, found[0].tolist()):
                ids[row] = token
            if group.num_logprobs >= 0:
                self._read_logprobs(group, found, logprobs)
        return Sampled(ids, logprobs if any(group.num_logprobs >= 0 for group in self.groups) else None)

    def release(self, request: Request) -> None:
        """Forget a finished request."""
        self.tables.release(request)

    def _compose(self, requests: list[Request]) -> None:
        self.requests = list(requests)
        plain = [row for row, request in enumerate(requests) if not _is_shaped(request)]
        shaped = [row for row, request in enumerate(requests) if _is_shaped(request)]
        self.groups = [self._group(requests, rows) for rows in (plain, shaped) if rows]
        waits = [request.params.min_tokens - request.num_output for request in requests]
        self.num_steps_valid = min((wait for wait in waits if wait > 0), default=1 << 62)

    def _group(self, requests: list[Request], rows: list[int]) -> _Group:
        members = [requests[row] for row in rows]
        params = [request.params for request in members]
        is_greedy = all(p.temperature == 0 for p in params)
        is_penalised = any(_is_penalised(p) for p in params)
        return _Group(
            requests=members,
            rows=rows,
            index=None if len(rows) == len(requests) else self._tensor(rows, torch.int64),
            arguments=(
                self._tensor([p.temperature for p in params], torch.float32),
                self._tensor([min(p.top_k, self.vocab_size) for p in params], torch.int32),
                self._tensor([p.top_p for p in params], torch.float32),
                self._tensor([p.min_p for p in params], torch.float32),
                self._tensor([request.seed for request in members], torch.int64),
            ),
            counters=self._tensor([0] * len(members), torch.int64) if is_greedy else None,
            penalties=self._penalties(params) if is_penalised else None,
            table_rows=self._tensor([self.tables.row(request) for request in members], torch.int64) if is_penalised else None,
            bias=self._bias(members) if any(p.logit_bias or p.min_tokens for p in params) else None,
            is_masked=any(p.grammar is not None for p in params),
            num_logprobs=max(-1 if p.logprobs is None else min(p.logprobs, self.vocab_size) for p in params),
        )

    def _penalties(self, params: list[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            self._tensor([p.presence_penalty for p in params], torch.float32),
            self._tensor([p.frequency_penalty for p in params], torch.float32),
            self._tensor([p.repetition_penalty for p in params], torch.float32),
        )

    def _bias(self, requests: list[Request]) -> torch.Tensor:
        bias = torch.zeros(len(requests), self.vocab_size, device=self.device)
        for row, request in enumerate(requests):
            for token, value in request.params.logit_bias:
                bias[row, token] = value
            if _must_go_on(request):
                bias[row, list(request.stop_ids)] = -torch.inf
        return bias

    def _sample_group(self, group: _Group, logits: torch.Tensor, masks: Masks | None) -> Sequence[torch.Tensor]:
        counters = group.counters
        if counters is None:
            counters = self._tensor([request.num_output for request in group.requests], torch.int64)
        tables: tuple[torch.Tensor | None, ...] = (None, None)
        if group.table_rows is not None:
            tables = (self.tables.counts[group.table_rows], self.tables.seen[group.table_rows])
        found: Sequence[torch.Tensor] = self.sample_op(
            logits if group.index is None else logits[group.index],
            *group.arguments,
            counters,
            *tables,
            *(group.penalties or (None, None, None)),
            group.bias,
            masks.of(group.requests, self.device) if group.is_masked and masks is not None else None,
            num_logprobs=group.num_logprobs,
        )
        if group.table_rows is not None:
            self.tables.count(group.table_rows, found[0])
        return found

    def _read_logprobs(self, group: _Group, found: Sequence[torch.Tensor], logprobs: list[TokenLogprob | None]) -> None:
        ids, chosen = found[0].tolist(), found[1].tolist()
        top_ids, top_values = ([[]] * len(ids),) * 2 if group.num_logprobs == 0 else (found[2].tolist(), found[3].tolist())
        for i, (row, request) in enumerate(zip(group.rows, group.requests)):
            num_top = request.params.logprobs
            if num_top is not None:
                top = list(zip(top_ids[i][:num_top], top_values[i][:num_top]))
                logprobs[row] = TokenLogprob(ids[i], chosen[i], top)

    def _tensor(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@torch.inference_mode()
def score(logits: torch.Tensor, targets: list[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens under logits [n, V] f32, with the `num_top` most likely ones."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    return [
        TokenLogprob(target, value, list(zip(top_ids, top_values)))
        for target, value, top_ids, top_values in zip(targets, chosen, ids.tolist(), values.tolist())
    ]


def _is_penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def _is_shaped(request: Request) -> bool:
    params = request.params
    return _is_penalised(params) or bool(params.logit_bias) or params.grammar is not None or _must_go_on(request)


def _must_go_on(request: Request) -> bool:
    """Whether no token may end the output yet; with a grammar its mask sees to that."""
    return request.params.grammar is None and request.num_output < request.params.min_tokens


class _PenaltyTables:
    """How often each token was output and whether it was in the prompt, one row per penalised request; row 0 is for the others."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(1, vocab_size, dtype=torch.int32, device=device)
        self.seen = torch.zeros(1, vocab_size, dtype=torch.uint8, device=device)
        self.rows: dict[Request, int] = {}
        self.free_rows: list[int] = []

    def row(self, request: Request) -> int:
        """The request's row, made from its tokens when it first needs one."""
        if not _is_penalised(request.params):
            return 0
        if request not in self.rows:
            if not self.free_rows:
                self._grow()
            row = self.rows[request] = self.free_rows.pop()
            output = torch.tensor(request.output_ids, dtype=torch.int64, device=self.counts.device)
            self.counts[row] = torch.bincount(output, minlength=self.counts.shape[1]).int()
            self.seen[row] = 0
            self.seen[row, request.tokens[: request.num_prompt]] = 1
        return self.rows[request]

    def count(self, rows: torch.Tensor, ids: torch.Tensor) -> None:
        self.counts.index_put_((rows, ids.clamp(min=0)), torch.ones_like(ids, dtype=torch.int32), accumulate=True)

    def release(self, request: Request) -> None:
        row = self.rows.pop(request, None)
        if row is not None:
            self.free_rows.append(row)

    def _grow(self) -> None:
        size = len(self.counts)
        self.counts = torch.cat([self.counts, torch.zeros_like(self.counts)])
        self.seen = torch.cat([self.seen, torch.zeros_like(self.seen)])
        self.free_rows += range(2 * size - 1, size - 1, -1)
