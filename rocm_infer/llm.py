# SPDX-License-Identifier: Apache-2.0
"""The engine in this process: `LLM(model).generate(prompts, params)`, no server."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rocm_infer.config import EMBEDDED_MODEL, EngineConfig, SamplingParams
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest, ErrorInfo, TokenLogprob
from rocm_infer.engine.request import RequestRefused
from rocm_infer.hub import resolve_model
from rocm_infer.text.chat import ChatTemplate, Message, check_messages
from rocm_infer.text.files import sampling_defaults
from rocm_infer.text.outputs import Output, fan_out
from rocm_infer.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


class GenerationError(RuntimeError):
    """A request was refused or failed; `info` says why."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info


@dataclass(frozen=True)
class Completion:
    """One output. `finish_reason` is stop, length or abort; `matched_stop` the stop string or token id that ended it."""

    text: str
    token_ids: list[int]
    finish_reason: str
    matched_stop: int | str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Result:
    """What one prompt gave. `outputs` has `n` entries; text, token_ids, logprobs and finish_reason are the first one's."""

    prompt: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    num_cached: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason


@dataclass
class _Job:
    """One prompt under way."""

    prompt: str
    ids: list[int]
    params: SamplingParams
    outputs: list[Output]

    def result(self) -> Result:
        completions = [
            Completion(
                output.text,
                output.token_ids,
                output.finish_reason or "abort",
                output.matched_stop,
                None if self.params.logprobs is None else output.logprobs,
            )
            for output in self.outputs
        ]
        first = self.outputs[0]
        return Result(self.prompt, self.ids, completions, first.num_cached, first.prompt_logprobs)


class LLM:
    """A model ready to generate.

    `model` is a directory, a hub id, or None for the embedded tiny-deepseek. `device` and any further field of
    `EngineConfig` may be given by name. Without parameters, sampling follows the checkpoint's generation_config.json.
    """

    def __init__(self, model: str | None = None, device: str | None = None, **engine_settings: Any) -> None:
        """Raises ConfigError, ModelNotFound, TokenizerError or OSError with a message for the user."""
        config = EngineConfig(model=model or EMBEDDED_MODEL, device=device or "auto", **engine_settings)
        path = resolve_model(config.model)
        text_path = resolve_model(config.tokenizer) if config.tokenizer else path
        self.config = config
        self.tokenizer = Tokenizer.load(text_path)
        self.template = ChatTemplate.load(text_path, self.tokenizer)
        self.default_params = SamplingParams(**sampling_defaults(path))
        self.engine = Engine(dataclasses.replace(config, model=str(path)))
        self._ids = itertools.count()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, on_result: Callable[[int], None] | None = None
    ) -> Any:
        """A Result for one prompt (a string or token ids), a list of them for a list of prompts.

        `params` is one for all or one each. `on_result(index)` is called as each prompt ends. Raises GenerationError.
        """
        single = _is_single(prompts)
        every: list[Any] = [prompts] if single else list(prompts)
        jobs = self._jobs(every, params)
        running = [len(job.outputs) for job in jobs]
        for index, _, _ in self._run(jobs, lambda index, output: output.done):
            running[index] -= 1
            if not running[index] and on_result is not None:
                on_result(index)
        results = [job.result() for job in jobs]
        return results[0] if single else results

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any) -> Result:
        """The assistant's answer to a conversation; `variables` reach the chat template."""
        result: Result = self.generate(self.chat_prompt(messages, **variables), params)
        return result

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one output, piece by piece. Closing the iterator aborts the request."""
        jobs = self._jobs([prompt], None if params is None else dataclasses.replace(params, n=1))
        for _, _, text in self._run(jobs, lambda _, output: True):
            if text:
                yield text

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, as the checkpoint's template writes it. Raises ChatError."""
        if self.template is None:
            raise ValueError("this model has no chat template; use generate")
        text = self.template.render(check_messages(list(messages)), variables=variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _jobs(self, prompts: Sequence[Prompt], params: Params) -> list[_Job]:
        each = list(params) if isinstance(params, Sequence) else [params or self.default_params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params: expected one, or one for each of {len(prompts)} prompts, got {len(each)}")
        jobs = []
        for prompt, wanted in zip(prompts, each, strict=True):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids, skip_special_tokens=False)
            jobs.append(_Job(text, ids, wanted, [Output(self.tokenizer, p) for p in fan_out(wanted, wanted.n)]))
        return jobs

    def _run(self, jobs: list[_Job], wanted: Callable[[int, Output], bool]) -> Iterator[tuple[int, Output, str]]:
        """Steps the engine until all outputs end; yields (job, output, new text) where `wanted` says so.

        However it ends, no request of these jobs is left in the engine.
        """
        waiting = deque(self._requests(jobs))
        living: dict[str, tuple[int, Output]] = {}
        try:
            while waiting or living:
                while waiting and len(living) < self.config.max_queued_requests:
                    request, index, output = waiting.popleft()
                    self._add(request)
                    living[request.rid] = index, output
                for step in self.engine.step():
                    if step.rid not in living:
                        continue
                    index, output = living[step.rid]
                    text = output.feed(step)
                    if output.done:
                        del living[step.rid]
                        if step.finish_reason is None:
                            self.engine.abort(step.rid)
                    if output.error is not None:
                        raise GenerationError(output.error)
                    if wanted(index, output):
                        yield index, output, text
        finally:
            for rid in living:
                self.engine.abort(rid)

    def _requests(self, jobs: list[_Job]) -> Iterator[tuple[AddRequest, int, Output]]:
        for index, job in enumerate(jobs):
            for params, output in zip(fan_out(job.params, job.params.n), job.outputs, strict=True):
                yield AddRequest(str(next(self._ids)), job.ids, params), index, output

    def _add(self, request: AddRequest) -> None:
        if request.params.grammar is not None and self.engine.grammars.vocabulary is None:
            self.engine.set_vocabulary(self.tokenizer.vocabulary(self.engine.info["vocab_size"]))
        try:
            self.engine.add(request)
        except RequestRefused as refusal:
            raise GenerationError(refusal.info) from refusal


def _is_single(prompts: Any) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
