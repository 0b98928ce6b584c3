# SPDX-License-Identifier: Apache-2.0
"""What the engine costs beside the model: scheduler, KV bookkeeping, commit and outputs, with a stub in the model's place.

    python -m bench.engine [--json]

Plain decode: microseconds per step at several numbers of running requests; the tensors of the batch are timed apart.
Prompts: microseconds per prompt token of admission, prefix lookup and caching, for new and for cached prefixes.
All figures are medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from rocm_infer.config import EngineConfig, ModelConfig, RopeConfig, SamplingParams
from rocm_infer.engine.batch import Batch
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest
from rocm_infer.engine.sampler import Sampled

VOCAB = 32_000
RUNNING = (1, 32, 256, 1024)
PROMPT_LEN = 1024
NUM_PROMPTS = 64
LIMIT_AT_256 = 1000.0  # microseconds per step
LIMIT_BEYOND = 3.0  # microseconds per running request above 256


class StubModel:
    """Has sizes and nothing else."""

    device = torch.device("cpu")
    dtype = torch.float32
    weight_bytes = 0
    config = ModelConfig("Stub", VOCAB, 1, 1, 1, 1, 1, 1, 1 << 20, 0.0, RopeConfig(1.0, 0), eos_ids=(2,))

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 0

    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return []

    def forward(self, batch: Batch, cache: list[Any]) -> torch.Tensor:
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class StepTimer:
    """Runs the engine's steps without a model and keeps the seconds of each part."""

    def __init__(self, num_running: int, num_tokens: int, chunk: int = 1 << 16) -> None:
        config = EngineConfig(
            model="stub", max_running_requests=num_running, max_total_tokens=num_tokens, chunked_prefill_size=chunk
        )
        self.engine = Engine(config, model=StubModel(), sample=lambda *args: ())
        self.bookkeeping: list[float] = []
        self.tensors: list[float] = []

    def step(self) -> None:
        engine = self.engine
        start = time.perf_counter()
        step = engine.scheduler.schedule()
        scheduled = time.perf_counter()
        assert step is not None
        engine.builder.build(step)
        built = time.perf_counter()
        engine._commit(step, Sampled([7] * len(step.sampled()), None))
        self.bookkeeping.append(scheduled - start + time.perf_counter() - built)
        self.tensors.append(built - scheduled)

    def add(self, number: int, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add(AddRequest(str(number), prompt, params))


def time_decode(num_running: int, num_steps: int) -> dict[str, float]:
    """Median microseconds of a decode step, bookkeeping and batch tensors apart."""
    timer = StepTimer(num_running, num_running * (64 + num_steps + 16))
    for number in range(num_running):
        timer.add(number, [number % VOCAB] * (32 + number % 32), num_steps + 8)
    while timer.engine.scheduler.num_waiting or timer.engine.scheduler.prefilling:
        timer.step()
    timer.bookkeeping.clear()
    timer.tensors.clear()
    for _ in range(num_steps):
        timer.step()
    assert timer.engine.scheduler.num_running == num_running
    return {"bookkeeping_us": median_us(timer.bookkeeping), "tensors_us": median_us(timer.tensors)}


def time_prompts(make_prompt: Callable[[int], list[int]], expect_hits: bool) -> float:
    """Median microseconds per prompt token from arrival to the first token, one prompt per step, bookkeeping only."""
    timer = StepTimer(4, 4 * NUM_PROMPTS * PROMPT_LEN)
    seconds = []
    for number in range(NUM_PROMPTS + 1):
        prompt = make_prompt(number)
        start = time.perf_counter()
        timer.add(number, prompt, 1)
        added = time.perf_counter()
        timer.step()
        seconds.append(added - start + timer.bookkeeping[-1])
    assert (timer.engine.stats()["cached_tokens"] > 0) == expect_hits
    return median_us(seconds[1:]) / PROMPT_LEN


def median_us(seconds: list[float]) -> float:
    return 1e6 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--steps", type=int, default=400, help="timed decode steps per size")
    args = parser.parse_args()
    rng = random.Random(0)
    shared = [rng.randrange(VOCAB) for _ in range(PROMPT_LEN)]
    decode = {running: time_decode(running, args.steps) for running in RUNNING}
    prompts = {
        "new": time_prompts(lambda number: [rng.randrange(VOCAB) for _ in range(PROMPT_LEN)], False),
        "cached": time_prompts(lambda number: shared, True),
    }
    beyond = (decode[1024]["bookkeeping_us"] - decode[256]["bookkeeping_us"]) / (1024 - 256)
    if args.json:
        print(json.dumps({"decode": decode, "us_per_request_beyond_256": beyond, "us_per_prompt_token": prompts}))
        return
    print("plain decode, microseconds per step (median)")
    print(f"{'running':>8} {'bookkeeping':>12} {'batch tensors':>14}")
    for running, times in decode.items():
        print(f"{running:>8} {times['bookkeeping_us']:>12.1f} {times['tensors_us']:>14.1f}")
    print(f"per running request beyond 256: {beyond:.2f} (limit {LIMIT_BEYOND}); at 256 the limit is {LIMIT_AT_256:.0f}")
    print("prompts, microseconds per prompt token (median)")
    for name, value in prompts.items():
        print(f"{name:>8} {value:>12.3f}")


if __name__ == "__main__":
    main()
