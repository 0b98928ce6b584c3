# SPDX-License-Identifier: Apache-2.0
"""What the server process and the engine worker say to each other: msgspec structs, msgpack on the wire.

Server -> worker: AddRequest, AbortRequest, FlushCache, GetStats, Shutdown.
Worker -> server: Ready, Outputs, CacheFlushed, Stats, Fatal.

A request always ends with exactly one `RequestOutput` whose `finish_reason` is set, whatever happens to it: refusals, failures
and the death of the worker arrive on the same path as tokens do.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from rocm_infer.config import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]

ErrorCode = Literal[
    "context_length_exceeded",  # prompt (plus output) longer than the context or than the whole KV cache
    "invalid_value",  # a field the engine cannot serve: empty prompt, token id outside the vocabulary, ...
    "duplicate_request_id",  # the rid is in use
    "queue_full",  # max_queued_requests are waiting
    "nan_logits",  # the model produced NaN for this request, no token could be chosen
    "internal_error",  # a step failed; the message says how
    "engine_dead",  # the worker process is gone
    "timeout",  # the request took longer than its deadline
]


class ErrorInfo(msgspec.Struct, frozen=True):
    """Why a request was refused or failed. `param` names the offending request field, if one is to blame."""

    code: ErrorCode
    message: str
    param: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of one token under the raw distribution, and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class RequestOutput(msgspec.Struct, array_like=True):
    """What one step produced for one request.

    `token_ids` are the new tokens only (the stop token that ended the request, if any, is the last one). `logprobs` runs
    parallel to them when asked for. `prompt_logprobs` comes once, with the first output: one entry per prompt token, the first
    is None. `num_cached` prompt tokens came from the prefix cache. `matched_stop` is the eos or stop token id that ended the
    request. `error` is set exactly when `finish_reason` is "error".
    """

    rid: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    num_prompt: int = 0
    num_cached: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: ErrorInfo | None = None


class AddRequest(msgspec.Struct, tag=True):
    """A new request. `rid` must be unique among living requests; of two waiting ones the higher `priority` goes first.
    Only requests of the same `salt` share cached prefixes.

    `params.n` and `params.stop` are not looked at: the caller adds n requests (same prompt, seed + i) and searches stop strings.
    """

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    salt: str = ""


class AbortRequest(msgspec.Struct, tag=True):
    """End a request; an unknown rid is ignored."""

    rid: str


class FlushCache(msgspec.Struct, tag=True):
    """Forget all cached prefixes no running request uses. Answered by `CacheFlushed` with the same id."""

    id: int


class GetStats(msgspec.Struct, tag=True):
    """Answered by `Stats` with the same id."""

    id: int


class Shutdown(msgspec.Struct, tag=True):
    """Leave: running requests are aborted, the process exits with status 0."""


class Ready(msgspec.Struct, tag=True):
    """The worker has loaded the model. `info` is `Engine.info`."""

    info: dict[str, Any]


class Outputs(msgspec.Struct, tag=True):
    """All outputs of one step."""

    outputs: list[RequestOutput]


class CacheFlushed(msgspec.Struct, tag=True):
    """`num_pages` were freed."""

    id: int
    num_pages: int


class Stats(msgspec.Struct, tag=True):
    """`values` is `Engine.stats()`."""

    id: int
    values: dict[str, float]


class Fatal(msgspec.Struct, tag=True):
    """The worker cannot go on and exits."""

    message: str


ToWorker = AddRequest | AbortRequest | FlushCache | GetStats | Shutdown
FromWorker = Ready | Outputs | CacheFlushed | Stats | Fatal

STACKS = "stacks"  # file in the folder of the socket: where the worker writes its stacks when it faults or at SIGUSR2

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
