# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, one step at a time. Synchronous, in process, owned by one thread."""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from rocm_infer import arch as archs
from rocm_infer.config import ConfigError, EngineConfig
from rocm_infer.engine.batch import BatchBuilder, ScoredRows
from rocm_infer.engine.compilations import compile_counter, install_bundle
from rocm_infer.engine.grammar import GrammarError, Grammars
from rocm_infer.engine.kv_cache import KVCache
from rocm_infer.engine.memory import MemoryPlan, available_bytes, plan_memory
from rocm_infer.engine.messages import STEP_TOKENS, AddRequest, ErrorInfo, FinishReason, RequestOutput, TokenLogprob
from rocm_infer.engine.recorder import Recorder
from rocm_infer.engine.request import Request, RequestRefused, Status
from rocm_infer.engine.runner import Model, Runner
from rocm_infer.engine.sampler import Sampled, Sampler, score
from rocm_infer.engine.scheduler import Scheduler, Step
from rocm_infer.platform import usable_cores

logger = logging.getLogger(__name__)

# Prompt positions whose logits are held at once while prompt log-probabilities are computed.
SCORED_ROWS = 64
# Seconds that a step without other work waits for a grammar, and that a grammar may take to be compiled.
GRAMMAR_WAIT, GRAMMAR_TIMEOUT = 0.01, 60.0


class Engine:
    """A loaded model with its KV cache and scheduler.

        engine = Engine(EngineConfig(model="..."))
        engine.add(AddRequest("a", prompt_ids, SamplingParams(max_tokens=8)))
        while engine.has_work:
            for output in engine.step(): ...

    `info` (plain JSON data): model, architecture, context_length, vocab_size, eos_ids, bos_id, dtype, kv_cache_dtype, device,
    weight_bytes, max_total_tokens, page_size, max_running_requests, max_queued_requests, chunked_prefill_size, prefix_cache,
    num_threads, memory (the plan). `recorder`, if set, is told of every step.
    """

    info: dict[str, Any]
    recorder: Recorder | None = None

    def __init__(self, config: EngineConfig, model: Model | None = None, sample: Callable[..., Any] | None = None) -> None:
        """Load `config.model` (or take the given model and `sample` op), plan memory, allocate the cache.

        Raises ConfigError or OSError with a message for the user when the model cannot be served as configured.
        """
        set_threads(config.num_threads)
        self.config = config
        self.model = load_model(config) if model is None else model
        device, cache_dtype = self.model.device, _cache_dtype(config, self.model)
        if config.kernel_bundle is not None:
            install_bundle(Path(config.kernel_bundle), device)
        self.compile_counter = compile_counter(device)
        self.num_compiled_before = self.compile_counter.count if self.compile_counter else 0
        self.plan = _plan(config, self.model, cache_dtype)
        self.context_length = _context_length(config, self.model, self.plan)
        logger.info("memory plan\n%s", self.plan.table())
        self.runner = Runner(self.model, self.plan.num_pages, config.page_size, cache_dtype)
        self.cache = KVCache(self.plan.num_pages, config.page_size, not config.disable_radix_cache)
        self.scheduler = Scheduler(
            self.cache,
            max_running=config.max_running_requests,
            max_waiting=config.max_queued_requests,
            max_step_tokens=config.chunked_prefill_size,
            conservativeness=config.schedule_conservativeness,
        )
        self.builder = BatchBuilder(config.max_running_requests, self.context_length, config.page_size, device)
        self.sampler = Sampler(sample or _sample_op(config), self.model.config.vocab_size, device)
        self.grammars = Grammars(self.model.config.vocab_size, self.model.config.eos_ids)
        self.compiling: dict[str, tuple[Request, Future[Any]]] = {}  # requests that wait for their grammar
        self.num_arrivals = 0
        self.steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)
        self.pending: list[RequestOutput] = []
        self.info = self._describe(cache_dtype)

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestRefused (`.info`: ErrorInfo) if it can never run or the queue is full."""
        self._check_tokens(request)
        made = self.make_request(request, self.num_arrivals)
        made.queued_at = time.perf_counter()
        if made.params.grammar is None and made.rid not in self.compiling:
            self.scheduler.add(made)
        else:
            self._compile_grammar(made)
        self.num_arrivals += 1

    def set_vocabulary(self, tokens: list[bytes]) -> None:
        """The bytes of each token, empty for those that stand for no text; needed before the first request with a grammar."""
        self.grammars.vocabulary = tokens

    def make_request(self, request: AddRequest, arrival: int) -> Request:
        """The engine's own record of a request. Raises RequestRefused if it does not fit the context."""
        params = request.params
        eos = () if params.ignore_eos and params.grammar is None else self.model.config.eos_ids
        return Request(
            rid=request.rid,
            tokens=list(request.prompt_ids),
            num_prompt=len(request.prompt_ids),
            params=params,
            max_len=self._max_len(request),
            stop_ids=frozenset(params.stop_token_ids).union(eos),
            seed=_mix(self.config.random_seed, arrival) if params.seed is None else params.seed,
            arrival=arrival,
            priority=request.priority,
            salt=request.salt,
        )

    def abort(self, rid: str) -> None:
        """End a request in any state; its last output (finish_reason "abort") comes from the next `step`."""
        if rid in self.compiling:
            request, _ = self.compiling.pop(rid)
            self.pending.append(self._drop(request, "abort"))
            return
        aborted = self.scheduler.abort(rid)
        if aborted is not None:
            self.pending.append(self._output(aborted, [], None))

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self.scheduler.requests or self.pending or self.compiling)

    def step(self) -> list[RequestOutput]:
        """One forward pass: what it produced, at most one output per request. May be empty (prompt chunks, nothing to do).

        When a pass fails, its requests run again one by one, and those that fail alone end with "internal_error". Raises if
        that leaves the device unusable or the books damaged (AssertionError): then the engine is lost.
        """
        outputs, self.pending = self.pending, []
        if self.compiling:
            outputs += self._admit_compiled(wait_for_one=not (outputs or self.scheduler.requests))
        step = self.scheduler.schedule()
        if step is not None:
            self._measure(step)
            if self.recorder is not None:
                self.recorder.begin(step)
            try:
                sampled = self.run(step)
            except Exception as error:
                logger.exception("a step of %d requests failed", len(step.requests()))
                outputs += self._salvage(step, error)
            else:
                if self.recorder is not None:
                    self.recorder.end(sampled.ids)
                outputs += self._commit(step, sampled)
        return outputs

    def _measure(self, step: Step) -> None:
        """How large the step is, and how long its new requests waited for it."""
        num_tokens, now = len(step.decodes), time.perf_counter()
        for chunk in step.chunks:
            num_tokens += chunk.num_tokens
            if chunk.request.queue_seconds is None:
                chunk.request.queue_seconds = now - chunk.request.queued_at
        self.steps_by_tokens[bisect_left(STEP_TOKENS, num_tokens)] += 1
        self.scheduler.counters["step_tokens"] += num_tokens

    @torch.inference_mode()
    def run(self, step: Step) -> Sampled:
        """The forward pass of a step and the tokens it gives, without any bookkeeping; for `step`, and to repeat a step."""
        batch = self.builder.build(step)
        masks = self.grammars.begin(batch.requests)
        hidden = self.runner.forward(batch)
        for scored in batch.scored:
            self._score(hidden, scored)
        if not batch.requests:
            return Sampled([], None)
        return self.sampler.sample(self.runner.next_logits(batch, hidden), batch.requests, masks)

    def flush(self) -> int:
        """Drop cached prefixes that no running request uses; returns the number of pages freed."""
        return self.cache.flush()

    def stats(self) -> dict[str, float]:
        """Counters and gauges, numbers only.

        Gauges: num_running, num_waiting, num_pages, num_pages_free, num_pages_cached (reusable, unused), num_pages_used,
        token_usage (share of pages in use). Counters since start: num_steps, prompt_tokens, cached_tokens, generated_tokens,
        preemptions, finished_stop, finished_length, finished_abort, finished_error, jit_compiles (kernels), step_tokens (computed in all steps), and
        step_tokens_N for each N of STEP_TOKENS and inf (steps of more than the N before and at most N tokens).
        """
        num_pages, num_free, num_cached = self.cache.num_pages, len(self.cache.free_pages), len(self.cache.unlocked)
        num_used = num_pages - num_free - num_cached
        counters = (
            "num_steps prompt_tokens cached_tokens generated_tokens preemptions "
            "finished_stop finished_length finished_abort finished_error step_tokens"
        )
        bounds = (*STEP_TOKENS, "inf")
        return {
            "num_running": self.scheduler.num_running,
            "num_waiting": self.scheduler.num_waiting + len(self.compiling),
            "num_pages": num_pages,
            "num_pages_free": num_free,
            "num_pages_cached": num_cached,
            "num_pages_used": num_used,
            "token_usage": num_used / num_pages,
            **{name: self.scheduler.counters[name] for name in counters.split()},
            "jit_compiles": self.compile_counter.count - self.num_compiled_before if self.compile_counter else 0,
            **{f"step_tokens_{bound}": count for bound, count in zip(bounds, self.steps_by_tokens)},
        }

    def _check_tokens(self, request: AddRequest) -> None:
        vocab_size = self.model.config.vocab_size
        if not request.prompt_ids:
            raise RequestRefused("invalid_value", "prompt: expected at least one token, got none", "prompt")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            wrong = next(token for token in request.prompt_ids if not 0 <= token < vocab_size)
            raise RequestRefused("invalid_value", f"prompt: token ids must be 0 to {vocab_size - 1}, got {wrong}", "prompt")
        for param, tokens in (
            ("logit_bias", [token for token, _ in request.params.logit_bias]),
            ("stop_token_ids", request.params.stop_token_ids),
        ):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestRefused(
                        "invalid_value", f"{param}: token ids must be 0 to {vocab_size - 1}, got {token}", param
                    )

    def _compile_grammar(self, request: Request) -> None:
        """Start compiling; the request is queued once that is done. Raises RequestRefused."""
        grammar = request.params.grammar
        if request.rid in self.compiling or request.rid in self.scheduler.requests or grammar is None:
            raise RequestRefused("duplicate_request_id", f"request id {request.rid!r} is in use; choose another", "rid")
        if self.scheduler.num_waiting + len(self.compiling) >= self.scheduler.max_waiting:
            message = f"{self.scheduler.max_waiting} requests are waiting, the most allowed; try again later"
            raise RequestRefused("queue_full", message)
        if self.grammars.vocabulary is None or not self.model.config.eos_ids:
            what = "an end-of-text token" if self.grammars.vocabulary is not None else "a vocabulary"
            message = f"{grammar.param}: structured output needs {what}, which this engine was not given"
            raise RequestRefused("invalid_value", message, grammar.param)
        self.compiling[request.rid] = request, self.grammars.compile(grammar.text)

    def _admit_compiled(self, wait_for_one: bool) -> list[RequestOutput]:
        """Queue the requests whose grammar is ready; returns the end of those that have none."""
        if wait_for_one:
            wait([future for _, future in self.compiling.values()], GRAMMAR_WAIT, "FIRST_COMPLETED")
        outputs = []
        for rid, (request, future) in list(self.compiling.items()):
            is_late = time.perf_counter() - request.queued_at > GRAMMAR_TIMEOUT
            if not future.done() and not is_late:
                continue
            del self.compiling[rid]
            try:
                if not future.done():
                    future.cancel()
                    raise GrammarError(f"it could not be compiled within {GRAMMAR_TIMEOUT:g} seconds; make it simpler")
                self.grammars.admit(request, future.result())
                self.scheduler.add(request)
            except RequestRefused as refusal:
                request.error = refusal.info
            except GrammarError as error:
                param = request.params.grammar.param if request.params.grammar is not None else None
                request.error = ErrorInfo("invalid_value", f"{param}: {error}", param)
            except Exception as error:
                logger.exception("request %s: its grammar could not be compiled", rid)
                request.error = ErrorInfo("internal_error", f"its grammar could not be compiled: {error}")
            if request.error is not None:
                outputs.append(self._drop(request, "error"))
        return outputs

    def _drop(self, request: Request, reason: FinishReason) -> RequestOutput:
        """End a request that was never queued."""
        request.status, request.finish_reason = Status.FINISHED, reason
        self.scheduler.counters[f"finished_{reason}"] += 1
        return self._output(request, [], None)

    def _max_len(self, request: AddRequest) -> int:
        """Prompt plus output tokens of a request, within the context. Raises RequestRefused if it does not fit."""
        num_prompt, params, limit = len(request.prompt_ids), request.params, self.context_length
        max_tokens = params.max_tokens if params.max_tokens is not None else max(1, limit - num_prompt)
        if num_prompt + max_tokens > limit:
            raise RequestRefused(
                "context_length_exceeded",
                f"the context holds {limit} tokens; the request has {num_prompt} in the prompt and asks for "
                f"{'at least 1' if params.max_tokens is None else max_tokens} more. Shorten the prompt or lower max_tokens",
                "prompt" if num_prompt >= limit else "max_tokens",
            )
        if params.min_tokens > max_tokens:
            message = f"min_tokens: expected at most max_tokens ({max_tokens}), got {params.min_tokens}"
            raise RequestRefused("invalid_value", message, "min_tokens")
        return num_prompt + max_tokens

    def _score(self, hidden: torch.Tensor, scored: ScoredRows) -> None:
        """Append the log-probabilities of a chunk's prompt tokens to their request."""
        request = scored.request
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        del request.prompt_logprobs[request.num_computed + 1 :]  # left by a step that failed, or from before a preemption
        for first in range(0, len(scored.targets), SCORED_ROWS):
            targets = scored.targets[first : first + SCORED_ROWS]
            start = scored.start + first
            logits = self.runner.logits(hidden[start : start + len(targets)])
            request.prompt_logprobs += score(logits, targets, request.params.prompt_logprobs or 0)

    def _salvage(self, step: Step, error: Exception) -> list[RequestOutput]:
        """After a failed pass: run its requests one by one. Computing a token twice writes the same values to the same slots."""
        outputs: list[RequestOutput] = []
        parts = step.split()
        for part in parts:
            try:
                if len(parts) == 1:
                    raise error
                sampled = self.run(part)
            except Exception as cause:
                outputs.append(self._fail(part.requests()[0], cause))
            else:
                outputs += self._commit(part, sampled)
        self.runner.check()
        self.scheduler.check()
        return outputs

    def _fail(self, request: Request, error: Exception) -> RequestOutput:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self.scheduler.fail(request, "internal_error", f"request {request.rid}: the engine failed in a step: {reason}")
        return self._output(request, [], None)

    def _commit(self, step: Step, sampled: Sampled) -> list[RequestOutput]:
        """Book the tokens of a step and report them; a request without any output is reported when it has ended."""
        requests = step.sampled()
        finished = self.scheduler.commit(step, sampled.ids)
        self.scheduler.counters["num_steps"] += 1
        self.scheduler.counters["generated_tokens"] += len(requests)
        outputs = [self._output(request, [], None) for request in finished if request.max_len == request.num_prompt]
        if sampled.logprobs is not None:
            return outputs + [self._output(*row) for row in zip(requests, ([token] for token in sampled.ids), sampled.logprobs)]
        for request, token in zip(requests, sampled.ids):
            if request.status is Status.FINISHED or request.prompt_logprobs is not None or request.num_output == 1:
                outputs.append(self._output(request, [token], None))
            else:
                outputs.append(RequestOutput(request.rid, [token], None, None, request.num_prompt, request.num_cached))
        return outputs

    def _output(self, request: Request, token_ids: list[int], logprob: TokenLogprob | None) -> RequestOutput:
        """The full form of an output; a request that ended is forgotten here."""
        if request.status is Status.FINISHED:
            self.sampler.release(request)
            self.grammars.release(request)
        failed = request.error is not None
        completes_prompt = request.num_output == len(token_ids) and request.finish_reason != "abort"
        return RequestOutput(
            rid=request.rid,
            token_ids=[] if failed else token_ids,
            finish_reason=request.finish_reason,
            matched_stop=request.matched_stop,
            num_prompt=request.num_prompt,
            num_cached=max(0, request.num_cached),
            logprobs=None if logprob is None or failed else [logprob],
            prompt_logprobs=request.prompt_logprobs if completes_prompt and not failed else None,
            error=request.error,
            queue_seconds=request.queue_seconds if completes_prompt else None,
        )

    def _describe(self, cache_dtype: torch.dtype) -> dict[str, Any]:
        config, model = self.config, self.model.config
        return {
            "model": config.model,
            "architecture": model.architecture,
            "context_length": self.context_length,
            "vocab_size": model.vocab_size,
            "eos_ids": list(model.eos_ids),
            "bos_id": model.bos_id,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(cache_dtype).removeprefix("torch."),
            "device": config.device if config.device.startswith("emulated:") else str(self.model.device),
            "weight_bytes": self.model.weight_bytes,
            "max_total_tokens": self.plan.max_total_tokens,
            "page_size": config.page_size,
            "max_running_requests": config.max_running_requests,
            "max_queued_requests": config.max_queued_requests,
            "chunked_prefill_size": config.chunked_prefill_size,
            "prefix_cache": not config.disable_radix_cache,
            "num_threads": torch.get_num_threads(),
            "memory": self.plan.to_dict(),
        }


def load_model(config: EngineConfig) -> Model:
    """The model a config names."""
    from rocm_infer import models  # pulls in every model family; an engine given a model does without

    model: Model = models.load_model(config)
    return model


def set_threads(num_threads: int | None) -> None:
    """CPU threads of torch: as asked for, else OMP_NUM_THREADS, else the cores this process may use."""
    if num_threads is None and "OMP_NUM_THREADS" not in os.environ:
        num_threads = usable_cores()
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _sample_op(config: EngineConfig) -> Callable[..., Any]:
    from rocm_infer.ops.sample import sample

    found: Callable[..., Any] = sample.using(config.kernel_backend)
    return found


def _cache_dtype(config: EngineConfig, model: Model) -> torch.dtype:
    return model.dtype if config.kv_cache_dtype == "auto" else archs.fp8_dtype(model.device)


def _plan(config: EngineConfig, model: Model, cache_dtype: torch.dtype) -> MemoryPlan:
    return plan_memory(
        config,
        model.config,
        model.device,
        weight_bytes=model.weight_bytes,
        bytes_per_token=model.cache_bytes_per_token(cache_dtype),
        itemsize=model.dtype.itemsize,
        available=available_bytes(model.device),
    )


def _context_length(config: EngineConfig, model: Model, plan: MemoryPlan) -> int:
    """The longest prompt plus output: what is asked for, at most the model's, and no more than the KV cache holds."""
    if config.context_length is not None and config.context_length > model.config.max_len:
        message = f"context_length: expected at most {model.config.max_len} (the model's), got {config.context_length}"
        raise ConfigError("context_length", message)
    return min(config.context_length or model.config.max_len, plan.max_total_tokens)


def _mix(seed: int, number: int) -> int:
    """A 63-bit seed for request `number` (splitmix64, Steele et al. 2014), so that neighbouring requests share nothing."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
