# SPDX-License-Identifier: Apache-2.0
"""What the server process and the engine worker say to each other: msgspec structs, msgpack on the wire.

Server -> worker: AddRequest, AbortRequest, SetVocabulary, FlushCache, GetStats, StartProfile, StopProfile, Shutdown.
Worker -> server: Ready, Outputs, CacheFlushed, Stats, Profiled, Fatal.

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
    request. `error` is set exactly when `finish_reason` is "error". `queue_seconds` comes once, with the first tokens: how long
    the request waited for its first step.
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
    queue_seconds: float | None = None


def merged(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two outputs of one request as one; `first` is used up."""
    first.token_ids += second.token_ids
    if second.logprobs:
        first.logprobs = (first.logprobs or []) + second.logprobs
    if second.prompt_logprobs is not None:
        first.prompt_logprobs = second.prompt_logprobs
    if second.num_prompt:
        first.num_prompt, first.num_cached = second.num_prompt, second.num_cached
    first.finish_reason, first.matched_stop, first.error = second.finish_reason, second.matched_stop, second.error
    return first


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


class SetVocabulary(msgspec.Struct, tag=True):
    """The bytes of each token, empty for those that stand for no text; sent before the first request with a grammar."""

    tokens: list[bytes]


class FlushCache(msgspec.Struct, tag=True):
    """Forget all cached prefixes no running request uses. Answered by `CacheFlushed` with the same id."""

    id: int


class GetStats(msgspec.Struct, tag=True):
    """Answered by `Stats` with the same id."""

    id: int


class StartProfile(msgspec.Struct, tag=True):
    """Trace the next steps into the file `path`, which must not exist: `num_steps` of them (0: until StopProfile, within the
    profiler's own limit). `activities` may hold CPU and GPU. Answered by `Profiled` with the same id at once."""

    id: int
    path: str
    num_steps: int = 0
    activities: tuple[str, ...] = ("CPU", "GPU")
    with_stack: bool = False
    record_shapes: bool = False


class StopProfile(msgspec.Struct, tag=True):
    """Write the trace. Answered by `Profiled` with the same id once it is written."""

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


class Profiled(msgspec.Struct, tag=True):
    """`path` is the trace file; where `error` is set, why nothing was started or written."""

    id: int
    path: str = ""
    error: str | None = None


class Fatal(msgspec.Struct, tag=True):
    """The worker cannot go on and exits."""

    message: str


ToWorker = AddRequest | AbortRequest | SetVocabulary | FlushCache | GetStats | StartProfile | StopProfile | Shutdown
FromWorker = Ready | Outputs | CacheFlushed | Stats | Profiled | Fatal

# Bounds of the engine's histogram of tokens per step.
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STACKS = "stacks"  # file in the folder of the socket: where the worker writes its stacks when it faults or at SIGUSR2

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
