# SPDX-License-Identifier: Apache-2.0
"""One request: its tokens, where it stands, what it holds. Plain data; the scheduler and the KV cache change it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rocm_infer.config import SamplingParams
from rocm_infer.engine.messages import ErrorCode, ErrorInfo, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from rocm_infer.engine.kv_cache import Node


class RequestRefused(Exception):
    """A request was not accepted; `info` says why."""

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.info = ErrorInfo(code, message, param)


class Status(enum.Enum):
    """WAITING and FINISHED requests hold no pages and no row, RUNNING ones do."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """`tokens` is prompt and output in one list. The K/V of the first `num_computed` tokens lie in `pages`, in order.

    The first `num_shared` pages belong to the prefix index (`node` is the last of them), the rest to this request alone.
    """

    rid: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    max_len: int  # prompt plus the most output tokens it may get
    stop_ids: frozenset[int]  # eos and stop token ids that end it
    seed: int
    arrival: int
    priority: int = 0
    salt: str = ""

    status: Status = Status.WAITING
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    node: Node | None = None
    num_reserved: int = 0  # pages set aside at admission
    row: int = -1  # of the batch's page table
    num_tabled: int = 0  # pages the page table holds already
    num_cached: int = -1  # prompt tokens found in the prefix cache at the first admission; -1 before it

    prompt_logprobs: list[TokenLogprob | None] | None = None  # filled chunk by chunk when asked for
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    error: ErrorInfo | None = None

    queued_at: float = 0.0  # seconds of the performance counter
    queue_seconds: float | None = None  # until its first step

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: the smaller goes first."""
        return -self.priority, self.arrival

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be scored; such a request cannot skip computing a cached prefix."""
        wanted = self.params.prompt_logprobs is not None
        return wanted and (self.prompt_logprobs is None or len(self.prompt_logprobs) < self.num_prompt)
