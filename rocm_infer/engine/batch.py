# SPDX-License-Identifier: Apache-2.0
"""A step as tensors. This is the only place where they are built."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rocm_infer.engine.request import Request
from rocm_infer.engine.scheduler import Step


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows `start` to `start + len(targets)` of T predict the prompt tokens `targets` of a request that wants them scored."""

    request: Request
    start: int
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass over T tokens of B sequences: first `num_decodes` sequences of one token each, then prompt chunks.

    The K/V of the T tokens are written to `slots` (page * page_size + offset) before attention reads the `kv_len` tokens of each
    sequence; its queries are the last of them.
    """

    token_ids: torch.Tensor  # [T] i64
    positions: torch.Tensor  # [T] i64
    slots: torch.Tensor  # [T] i64
    num_decodes: int
    query_start: torch.Tensor  # [B+1] i32
    kv_len: torch.Tensor  # [B] i32, the new tokens included
    page_table: torch.Tensor  # [B, W] i32; entries beyond a sequence's pages are arbitrary
    logits_index: torch.Tensor  # [n] i64, the rows of T that get a next token
    requests: list[Request]  # whose rows those are
    scored: list[ScoredRows]


class BatchBuilder:
    """Makes batches. Keeps the page table of all running requests, one row each, and appends to it what is new."""

    def __init__(self, max_running: int, max_len: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.device = device
        self.page_table = np.zeros((max_running, -(-max_len // page_size)), dtype=np.int32)
        self.decodes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # query_start and logits_index of so many decodes alone

    def build(self, step: Step) -> Batch:
        """The tensors of a step; lists of ints become arrays once, everything else is arithmetic on those."""
        requests = step.requests()
        for request in requests:
            if request.num_tabled != len(request.pages):
                self._update_row(request)
        computed = [request.num_computed for request in requests]
        starts, rows = np.array([computed, [request.row for request in requests]], dtype=np.int64)
        if step.chunks:
            counts, query_start, logits_index = self._queries(step)
            positions = np.arange(query_start[-1], dtype=np.int64) + np.repeat(starts - query_start[:-1], counts)
            owners, kv_len = np.repeat(rows, counts), starts + counts
            longest = int(kv_len.max())
            queries = self._tensor(query_start), self._tensor(logits_index)
        else:
            positions, owners, kv_len, longest = starts, rows, starts + 1, max(computed) + 1
            queries = self.decodes.get(len(requests)) or self._decodes(len(requests))
        pages, offsets = np.divmod(positions, self.page_size)
        return Batch(
            token_ids=self._tensor(np.array(self._token_ids(step), dtype=np.int64)),
            positions=self._tensor(positions),
            slots=self._tensor(self.page_table[owners, pages] * np.int64(self.page_size) + offsets),
            num_decodes=len(step.decodes),
            query_start=queries[0],
            kv_len=self._tensor(kv_len.astype(np.int32)),
            page_table=self._tensor(self.page_table[rows, : -(-longest // self.page_size)]),
            logits_index=queries[1],
            requests=step.sampled(),
            scored=self._scored(step),
        )

    def _queries(self, step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens of each sequence [B], where they start [B+1], the rows that get a next token [n])."""
        counts = np.array([1] * len(step.decodes) + [chunk.num_tokens for chunk in step.chunks], dtype=np.int32)
        starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        sampled = [True] * len(step.decodes) + [chunk.samples for chunk in step.chunks]
        return counts, starts, (starts[1:] - 1).astype(np.int64)[sampled]

    def _decodes(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = self._tensor(np.arange(count + 1, dtype=np.int32)), self._tensor(np.arange(count, dtype=np.int64))
        self.decodes[count] = made
        return made

    def _update_row(self, request: Request) -> None:
        known = request.num_tabled
        self.page_table[request.row, known : len(request.pages)] = request.pages[known:]
        request.num_tabled = len(request.pages)

    def _token_ids(self, step: Step) -> list[int]:
        token_ids = [request.tokens[-1] for request in step.decodes]
        for request, start, num_tokens, _ in step.chunks:
            token_ids += request.tokens[start : start + num_tokens]
        return token_ids

    def _scored(self, step: Step) -> list[ScoredRows]:
        scored = []
        row = len(step.decodes)
        for request, start, num_tokens, _ in step.chunks:
            if request.needs_prompt_logprobs:
                targets = request.tokens[start + 1 : min(start + num_tokens + 1, request.num_prompt)]
                scored.append(ScoredRows(request, row, targets))
            row += num_tokens
        return scored

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made if self.device.type == "cpu" else made.to(self.device, non_blocking=True)
