# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode on the CPU beside transformers, as ratios within one run.

python -m bench.cpu [--models 125m,1.1b,deepseek] [--batches 1,8,32] [--threads N] [--quick] [--json FILE]

Both run the same random bf16 checkpoint in this process, in turns. Ours is the whole engine (scheduler, paged cache, sampler);
theirs is a bare loop of forward passes with SDPA attention, a dynamic cache and an arg-max. Every turn is timed twice: by the
wall clock, and by the CPU time of this process, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench import timing
from rocm_infer.config import EngineConfig, SamplingParams
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest
from rocm_infer.platform import usable_cores

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "125m": {
        **LLAMA,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1.1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "deepseek": {
        "model_type": "deepseek_v3",
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
    },
}
OTHERS = {"llama_cpp": "llama.cpp", "vllm": "vLLM"}
MAX_TOKENS = 16384  # of our KV cache
TURN_SECONDS = 0.4  # decode steps per turn are chosen to last about that long


class Turn(NamedTuple):
    """One timed call."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Row:
    """One measurement. Rates are tokens per second of the median turn; ratios are medians over pairs of turns, theirs / ours."""

    model: str
    what: str
    ours: float
    theirs: float
    wall_ratio: float
    cpu_ratio: float
    share: float  # of `limit`, by the wall clock; 0 where the work is not known
    limit: str


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", default=",".join(MODELS), help=f"comma separated, of {', '.join(MODELS)}")
    add("--batches", default="1,8,32", help="sequences decoded together, comma separated; empty: no decode")
    add("--prompt", type=int, default=512, help="tokens of the prefill; 0: no prefill")
    add("--context", type=int, default=64, help="prompt tokens of each sequence before decoding is timed")
    add("--rounds", type=int, default=7, help="turns of each side")
    add("--threads", type=int, default=None, help="default: the cores this process may use")
    add("--quick", action="store_true", help="the small models, 3 rounds")
    add("--backend", default="auto", help="our kernel backend, as in rocm-infer serve --kernel-backend")
    add("--work-dir", type=Path, help="where the checkpoints are made and kept, default: a temporary directory")
    add("--json", type=Path, help="append the rows there as JSON lines")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.rounds = "125m,deepseek", min(args.rounds, 3)
    if unknown := set(args.models.split(",")) - MODELS.keys():
        parser.error(f"--models: expected some of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    return args


def make_checkpoint(name: str, directory: Path) -> Path:
    """A random bf16 checkpoint in HF layout; made once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (directory / "config.json").exists():
        values = dict(MODELS[name])
        torch.manual_seed(0)
        config = AutoConfig.for_model(values.pop("model_type"), **values, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


class Theirs:
    """transformers, one forward pass at a time."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Next tokens [B, 1] and the cache of prompts [B, T]."""
        found = self.model(tokens, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1:].argmax(-1), found.past_key_values

    def decoder(self, tokens: torch.Tensor) -> Callable[[int], None]:
        """A function that decodes that many tokens more at each call, after the prompts [B, T]."""
        state = self.prefill(tokens)

        @torch.inference_mode()
        def decode(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                found = self.model(state[0], past_key_values=state[1], use_cache=True)
                state = (found.logits[:, -1:].argmax(-1), found.past_key_values)

        return decode


class Ours:
    """The engine, in process."""

    def __init__(self, directory: Path, threads: int, backend: str) -> None:
        config = EngineConfig(
            model=str(directory),
            device="cpu",
            dtype="bfloat16",
            max_total_tokens=MAX_TOKENS,
            chunked_prefill_size=4096,
            disable_radix_cache=True,
            num_threads=threads,
            kernel_backend=backend,
        )
        self.engine = Engine(config)
        self.rids = itertools.count()

    def start(self, tokens: torch.Tensor, max_tokens: int) -> list[str]:
        """Queue prompts [B, T]; run until each has its first token."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        rids = [str(next(self.rids)) for _ in tokens]
        for rid, prompt in zip(rids, tokens.tolist()):
            self.engine.add(AddRequest(rid, prompt, params))
        waiting = set(rids)
        while waiting:
            waiting -= {output.rid for output in self.engine.step()}
        return rids

    def stop(self, rids: list[str]) -> None:
        for rid in rids:
            self.engine.abort(rid)
        while self.engine.has_work:
            self.engine.step()

    def decoder(self, tokens: torch.Tensor, max_tokens: int) -> tuple[Callable[[int], None], list[str]]:
        """A function that decodes that many tokens more at each call, and the requests to stop in the end."""
        rids = self.start(tokens, max_tokens)

        def decode(steps: int) -> None:
            for _ in range(steps):
                self.engine.step()

        return decode, rids


def turn(function: Callable[[], object]) -> Turn:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, progress: tqdm[Any]) -> dict[str, list[Turn]]:
    """Turns of every side. Who goes first alternates, so that what one leaves in the caches helps both alike."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in list(sides)[:: 1 if index % 2 else -1]:
            turns[name].append(turn(sides[name]))
            progress.update()
    return turns


def measure(
    name: str, directory: Path, args: argparse.Namespace, bandwidth: float, rate: float, progress: tqdm[Any]
) -> Iterator[Row]:
    """Prefill and decode of one model."""
    theirs, ours = Theirs(directory), Ours(directory, args.threads, args.backend)
    model = ours.engine.model
    generator = torch.Generator().manual_seed(1)
    embedding = 2 * model.config.vocab_size * model.config.hidden
    weights = model.weight_bytes - embedding
    counted = model.config.moe is None  # of a mixture of experts not all is used
    if args.prompt:
        prompt = torch.randint(0, model.config.vocab_size, (1, args.prompt), generator=generator)
        sides = {"theirs": lambda: theirs.prefill(prompt), "ours": lambda: ours.start(prompt, 1)}
        for warm in sides.values():
            warm()
        turns = interleaved(sides, args.rounds, progress)
        flops = (weights - embedding) * args.prompt if counted else 0  # the head multiplies one row
        yield _row(name, f"prefill {args.prompt}", args.prompt, turns, flops / rate, "matmul rate")
    for batch in (int(text) for text in args.batches.split(",") if text):
        prompts = torch.randint(0, model.config.vocab_size, (batch, args.context), generator=generator)
        decode, rids = ours.decoder(prompts, min(2048, MAX_TOKENS // batch - args.context))
        steps, turns = _decode_turns(theirs.decoder(prompts), decode, args.rounds, progress)
        ours.stop(rids)
        yield _row(name, f"decode B={batch}", batch * steps, turns, counted * steps * weights / bandwidth, "read bandwidth")


def _decode_turns(
    theirs: Callable[[int], None], ours: Callable[[int], None], rounds: int, progress: tqdm[Any]
) -> tuple[int, dict[str, list[Turn]]]:
    """(steps per turn, the turns)."""
    slowest = max(turn(functools.partial(side, 2)).wall / 2 for side in (theirs, ours))
    steps = max(2, min(16, round(TURN_SECONDS / slowest)))
    sides = {"theirs": functools.partial(theirs, steps), "ours": functools.partial(ours, steps)}
    return steps, interleaved(sides, rounds, progress)


def _row(model: str, what: str, tokens: int, turns: dict[str, list[Turn]], floor: float, limit: str) -> Row:
    """floor: seconds that the limit alone would take; 0 where it is not known."""
    ours, theirs = turns["ours"], turns["theirs"]
    seconds = statistics.median(turn.wall for turn in ours)
    return Row(
        model=model,
        what=what,
        ours=tokens / seconds,
        theirs=tokens / statistics.median(turn.wall for turn in theirs),
        wall_ratio=timing.median_ratio([turn.wall for turn in theirs], [turn.wall for turn in ours]),
        cpu_ratio=timing.median_ratio([turn.cpu for turn in theirs], [turn.cpu for turn in ours]),
        share=floor / seconds,
        limit=limit,
    )


def report(row: Row) -> str:
    share = f"{row.share:5.0%} of {row.limit}" if row.share else ""
    rates = f"{row.ours:>8.1f} {row.theirs:>13.1f} {row.wall_ratio:>7.2f} {row.cpu_ratio:>7.2f}"
    return f"{row.model:<9} {row.what:<12} {rates}  {share}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.threads = args.threads or usable_cores()
    torch.set_num_threads(args.threads)
    names = args.models.split(",")
    bandwidth, rate = timing.read_bandwidth(), timing.matmul_rate()
    print(f"{timing.device_name()}; reads {bandwidth / 1e9:.1f} GB/s, bf16 matmul {rate / 1e9:.0f} GFLOP/s")
    for module, name in OTHERS.items():
        if importlib.util.find_spec(module):
            print(f"{name}: installed, not driven by this program: use bench.serving")
    print(f"tokens/s, medians of {args.rounds} turns; decode after {args.context} tokens of context")
    print(f"{'model':<9} {'':<12} {'ours':>8} {'transformers':>13} {'wall x':>7} {'CPU x':>7}", flush=True)
    num_rows = bool(args.prompt) + sum(bool(text) for text in args.batches.split(","))
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=2 * args.rounds * num_rows * len(names)) as progress:
        for name in names:
            progress.set_description(name)
            directory = make_checkpoint(name, (args.work_dir or Path(temporary)) / name)
            for row in measure(name, directory, args, bandwidth, rate, progress):
                progress.write(report(row))
                sys.stdout.flush()
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps({**vars(row), "device": timing.device_name()}) + "\n")


if __name__ == "__main__":
    main()
