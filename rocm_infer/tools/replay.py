# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer replay CAPSULE`: run the last steps of a dead engine again, in this process, in the same composition.

What a request had computed before the first recorded step is computed first, by itself. A request's tokens do not depend on
its company, so each step must give the tokens it gave; the first that does not is reported, as is a step that fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rocm_infer.config import EngineConfig
from rocm_infer.engine.capsule import Capsule, CapsuleError, CapsuleRequest, read_capsule
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest
from rocm_infer.engine.recorder import RequestPart, StepRecord
from rocm_infer.engine.request import Request
from rocm_infer.engine.scheduler import Chunk, Step
from rocm_infer.hub import resolve_model
from rocm_infer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Difference:
    """In step `number` request `rid` got `token` where `recorded` was recorded."""

    number: int
    rid: str
    recorded: int
    token: int


@dataclass(frozen=True)
class StepResult:
    """What a step gave now. `is_comparable`: its tokens were recorded."""

    number: int
    tokens: dict[str, int]
    differences: list[Difference]
    is_comparable: bool


class Replay:
    """An engine and the requests of a capsule, ready to be run step by step."""

    def __init__(self, capsule: Capsule, make_engine: Callable[[EngineConfig], Engine] = Engine) -> None:
        """Raises CapsuleError if the capsule cannot be replayed, ConfigError or OSError if its model cannot be loaded."""
        _check(capsule)
        self.capsule = capsule
        self.engine = make_engine(_config(capsule))
        if any(request.params.grammar is not None for request in capsule.requests):
            folder = resolve_model(capsule.config.tokenizer or capsule.config.model)
            self.engine.set_vocabulary(Tokenizer.load(folder).vocabulary(self.engine.info["vocab_size"]))
        arrivals = {part.rid: part.arrival for part in _parts(capsule)}
        known = {request.rid: request for request in capsule.requests}
        self.requests = {rid: self._request(known[rid], arrival, row) for row, (rid, arrival) in enumerate(arrivals.items())}

    def run(self, record: StepRecord) -> StepResult:
        """Run one recorded step. Raises whatever the step raises."""
        self._prepare(record)
        decodes = [self.requests[part.rid] for part in record.parts[: record.num_decodes]]
        chunks = [
            Chunk(self.requests[part.rid], part.start, part.num_tokens, part.samples)
            for part in record.parts[record.num_decodes :]
        ]
        found = self.engine.run(Step(decodes, chunks)).ids
        for part in record.parts:
            self.requests[part.rid].num_computed += part.num_tokens
        sampled = [part for part in record.parts if part.samples]
        recorded = record.sampled or []
        differences = [
            Difference(record.number, part.rid, old, new) for part, old, new in zip(sampled, recorded, found) if old != new
        ]
        for index, part in enumerate(sampled):
            self._append(part, recorded[index] if recorded else found[index])
        tokens = {part.rid: token for part, token in zip(sampled, found)}
        return StepResult(record.number, tokens, differences, record.sampled is not None)

    def _request(self, known: CapsuleRequest, arrival: int, row: int) -> Request:
        assert known.prompt_ids is not None
        request = self.engine.make_request(AddRequest(known.rid, known.prompt_ids, known.params, known.priority), arrival)
        request.tokens += known.output_ids or []
        request.row = row
        return request

    def _prepare(self, record: StepRecord) -> None:
        """Pages for the step, and everything before it computed."""
        for part in record.parts:
            request = self.requests[part.rid]
            if not self.engine.cache.extend(request, -(-(part.start + part.num_tokens) // self.engine.config.page_size)):
                raise CapsuleError(f"the KV cache of {self.engine.cache.num_pages} pages does not hold the recorded requests")
            known = request.tokens
            request.tokens = known[: part.start + part.num_tokens]  # what was known when the step ran
            if len(request.tokens) < part.start + part.num_tokens:
                raise CapsuleError(f"the capsule lacks tokens of request {part.rid} before step {record.number}")
            if request.num_computed != part.start:
                self._compute(request, part.start)
            if not part.samples:
                request.tokens = known

    def _compute(self, request: Request, num_tokens: int) -> None:
        """Bring a request to `num_tokens` computed tokens, chunk by chunk, alone."""
        request.num_computed = 0
        while request.num_computed < num_tokens:
            count = min(self.engine.config.chunked_prefill_size, num_tokens - request.num_computed)
            self.engine.run(Step([], [Chunk(request, request.num_computed, count, False)]))
            request.num_computed += count

    def _append(self, part: RequestPart, token: int) -> None:
        request = self.requests[part.rid]
        request.tokens = [*request.tokens[: part.start + part.num_tokens], token]


def replay(path: Path, say: Callable[[str], None], make_engine: Callable[[EngineConfig], Engine] = Engine) -> int:
    """Replay a capsule file and report; the exit code is 1 if a step failed or gave other tokens. Raises CapsuleError."""
    capsule = read_capsule(path)
    say(f"{path}: {capsule.reason}; {len(capsule.steps)} steps, {len(capsule.requests)} requests, {capsule.time}")
    again = Replay(capsule, make_engine)
    num_compared = num_different = 0
    for record in capsule.steps:
        try:
            result = again.run(record)
        except CapsuleError:
            raise
        except Exception as error:
            say(f"step {record.number} fails: {type(error).__name__}: {error}")
            say(f"its requests: {_describe(record)}")
            return 1
        num_compared += len(record.sampled or [])
        if result.differences and not num_different:
            first = result.differences[0]
            say(f"first divergence: step {first.number}, request {first.rid}: recorded {first.recorded}, now {first.token}")
            say(f"its requests: {_describe(record)}")
        num_different += len(result.differences)
        if not result.is_comparable:
            say(f"step {record.number} had not ended; now it gives {result.tokens}")
    say(f"{num_compared} recorded tokens, {num_different} differ")
    return 1 if num_different else 0


def _check(capsule: Capsule) -> None:
    if not capsule.has_token_ids:
        raise CapsuleError("the capsule holds no token ids: start the server with --capsule-token-ids to record them")
    if not capsule.steps:
        raise CapsuleError("the capsule holds no steps: the engine died before the first")
    missing = {part.rid for part in _parts(capsule)} - {request.rid for request in capsule.requests}
    if missing:
        raise CapsuleError(f"the capsule lacks {len(missing)} requests of its steps: they had ended long before the engine did")
    if any(step.num_omitted for step in capsule.steps):
        raise CapsuleError("the capsule's steps had more requests than are recorded")


def _config(capsule: Capsule) -> EngineConfig:
    """The recorded settings, with room for all recorded requests at once: a replay frees nothing."""
    config = capsule.config
    ends: dict[str, int] = {}
    for part in _parts(capsule):
        ends[part.rid] = max(ends.get(part.rid, 0), part.start + part.num_tokens)
    needed = sum(-(-end // config.page_size) * config.page_size for end in ends.values())
    recorded = int(capsule.info.get("max_total_tokens", 0))
    return dataclasses.replace(
        config,
        max_total_tokens=max(needed, recorded),
        max_running_requests=max(len(ends), config.max_running_requests),
    )


def _parts(capsule: Capsule) -> Iterable[RequestPart]:
    return (part for step in capsule.steps for part in step.parts)


def _describe(record: StepRecord) -> str:
    return ", ".join(f"{part.rid} [{part.start}, {part.start + part.num_tokens})" for part in record.parts)
