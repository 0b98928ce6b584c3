# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode on the CPU beside transformers, as ratios within one run.

python -m bench.cpu [--models 125m,1.1b,deepseek] [--rounds 7] [--json FILE]

Both run the same random bf16 checkpoint in this process, in turns. Ours is the whole engine (scheduler, paged cache, sampler);
theirs is a bare loop of forward passes with SDPA attention, a dynamic cache and an arg-max.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import timing
from rocm_infer.config import EngineConfig, SamplingParams
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest

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


@dataclass(frozen=True)
class Row:
    """One measurement: tokens per second of both, the median of ratios, and the share of what the machine can do."""

    model: str
    what: str
    ours: float
    theirs: float
    ratio: float
    share: float
    limit: str


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", default=",".join(MODELS), help=f"comma separated, of {', '.join(MODELS)}")
    add("--batches", default="1,8,32", help="sequences decoded together, comma separated")
    add("--prompt", type=int, default=512, help="tokens of the prefill")
    add("--context", type=int, default=128, help="prompt tokens of each sequence before decoding is timed")
    add("--steps", type=int, default=6, help="decode steps per turn")
    add("--rounds", type=int, default=7, help="turns of each side")
    add("--threads", type=int, default=None, help="default: the cores this process may use")
    add("--work-dir", type=Path, help="where the checkpoints are made and kept, default: a temporary directory")
    add("--json", type=Path, help="append the rows there as JSON lines")
    return parser.parse_args(argv)


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

    def decoder(self, tokens: torch.Tensor, steps: int) -> Callable[[], None]:
        """A function that decodes `steps` tokens more at each call, after the prompts [B, T]."""
        state = self.prefill(tokens)

        @torch.inference_mode()
        def decode() -> None:
            nonlocal state
            for _ in range(steps):
                found = self.model(state[0], past_key_values=state[1], use_cache=True)
                state = (found.logits[:, -1:].argmax(-1), found.past_key_values)

        return decode


class Ours:
    """The engine, in process."""

    def __init__(self, directory: Path, threads: int | None) -> None:
        config = EngineConfig(
            model=str(directory),
            device="cpu",
            dtype="bfloat16",
            max_total_tokens=32768,
            chunked_prefill_size=4096,
            disable_radix_cache=True,
            num_threads=threads,
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

    def decoder(self, tokens: torch.Tensor, steps: int) -> tuple[Callable[[], None], list[str]]:
        """A function that decodes `steps` tokens more at each call, and the requests to stop in the end."""
        rids = self.start(tokens, 1024)

        def decode() -> None:
            for _ in range(steps):
                self.engine.step()

        return decode, rids


def measure(name: str, directory: Path, args: argparse.Namespace, bandwidth: float, rate: float) -> list[Row]:
    """Prefill and decode of one model."""
    theirs, ours = Theirs(directory), Ours(directory, args.threads)
    generator = torch.Generator().manual_seed(1)
    vocab_size = ours.engine.model.config.vocab_size
    prompt = torch.randint(0, vocab_size, (1, args.prompt), generator=generator)
    embedding = 2 * vocab_size * ours.engine.model.config.hidden
    weights = ours.engine.model.weight_bytes - embedding
    sides = {"theirs": lambda: theirs.prefill(prompt), "ours": lambda: ours.start(prompt, 1)}
    times = timing.interleaved(sides, args.rounds)
    # The head multiplies one row of a prefill; a mixture of experts is not counted, since not all of it is used.
    flops = (weights - embedding) * args.prompt if name != "deepseek" else 0.0
    rows = [_row(name, f"prefill {args.prompt}", args.prompt, times, flops / rate, "matmul rate")]
    for batch in (int(text) for text in args.batches.split(",")):
        prompts = torch.randint(0, vocab_size, (batch, args.context), generator=generator)
        decode, rids = ours.decoder(prompts, args.steps)
        sides = {"theirs": theirs.decoder(prompts, args.steps), "ours": decode}
        times = timing.interleaved(sides, args.rounds)
        ours.stop(rids)
        floor = args.steps * weights / bandwidth if name != "deepseek" else 0.0
        rows.append(_row(name, f"decode B={batch}", batch * args.steps, times, floor, "read bandwidth"))
    return rows


def _row(model: str, what: str, tokens: int, times: dict[str, list[float]], floor: float, limit: str) -> Row:
    """floor: seconds that the limit alone would take; 0 where it is not known."""
    ours, theirs = (statistics.median(times[side]) for side in ("ours", "theirs"))
    return Row(
        model, what, tokens / ours, tokens / theirs, timing.median_ratio(times["theirs"], times["ours"]), floor / ours, limit
    )


def report(row: Row) -> str:
    share = f"{row.share:6.0%} of {row.limit}" if row.share else ""
    return f"{row.model:<9} {row.what:<12} {row.ours:>8.1f} {row.theirs:>13.1f} {row.ratio:>7.2f} {share}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads is None:
        args.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(args.threads)
    bandwidth, rate = timing.read_bandwidth(), timing.matmul_rate()
    print(f"{timing.device_name()}; reads {bandwidth / 1e9:.1f} GB/s, bf16 matmul {rate / 1e9:.0f} GFLOP/s")
    for module, name in OTHERS.items():
        state = (
            "installed, not driven by this program: use bench.serving" if importlib.util.find_spec(module) else "not installed"
        )
        print(f"{name}: {state}")
    print(f"tokens/s, medians of {args.rounds} turns; decode after {args.context} tokens of context")
    print(f"{'model':<9} {'':<12} {'ours':>8} {'transformers':>13} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models.split(","):
            directory = make_checkpoint(name, (args.work_dir or Path(temporary)) / name)
            for row in measure(name, directory, args, bandwidth, rate):
                print(report(row), flush=True)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps({**vars(row), "device": timing.device_name()}) + "\n")


if __name__ == "__main__":
    main()
