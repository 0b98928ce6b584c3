# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, one step at a time. Synchronous, in process, owned by one thread."""

from __future__ import annotations

from typing import Any

from rocm_infer.config import EngineConfig
from rocm_infer.engine.messages import AddRequest, RequestOutput


class Engine:
    """A loaded model with its KV cache and scheduler.

        engine = Engine(EngineConfig(model="..."))
        engine.add(AddRequest("a", prompt_ids, SamplingParams(max_tokens=8)))
        while engine.has_work:
            for output in engine.step(): ...

    `info` (plain JSON data): model, architecture, context_length, vocab_size, eos_ids, bos_id, dtype, kv_cache_dtype, device,
    num_parameters, weight_bytes, max_total_tokens, page_size, max_running_requests, chunked_prefill_size, memory (the plan).
    """

    info: dict[str, Any]

    def __init__(self, config: EngineConfig, model: Any = None) -> None:
        """Load `config.model` (or take the given model object), plan memory, allocate the cache.

        Raises ConfigError or OSError with a message for the user when the model cannot be served as configured.
        """
        raise NotImplementedError

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestRefused (`.info`: ErrorInfo) if it can never run or the queue is full."""
        raise NotImplementedError

    def abort(self, rid: str) -> None:
        """End a request in any state; its last output (finish_reason "abort") comes from the next `step`."""
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        raise NotImplementedError

    def step(self) -> list[RequestOutput]:
        """One forward pass: what it produced, at most one output per request. May be empty (prompt chunks, nothing to do)."""
        raise NotImplementedError

    def flush(self) -> int:
        """Drop cached prefixes that no running request uses; returns the number of pages freed."""
        raise NotImplementedError

    def stats(self) -> dict[str, float]:
        """Counters and gauges, numbers only.

        Gauges: num_running, num_waiting, num_pages, num_pages_free, num_pages_cached (reusable, unused), num_pages_used,
        token_usage (share of pages in use). Counters since start: num_steps, prompt_tokens, cached_tokens, generated_tokens,
        preemptions, finished_stop, finished_length, finished_abort, finished_error.
        """
        raise NotImplementedError
