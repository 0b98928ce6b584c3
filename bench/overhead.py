# SPDX-License-Identifier: Apache-2.0
"""What HTTP costs: the same prompts through the engine's worker alone and through the whole server, in one run.

    python -m bench.overhead --num-prompts 1000 --max-concurrency 256

Both are started here and take turns, `--rounds` times. Tokens per second depend on what else the machine does, and on whether
it has cores for server and client beside the worker; the CPU time of the processes does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import psutil
import tokenizers

from bench.clients import CLIENTS, Prompt, Sampling, open_session
from bench.serving import random_prompts, send_all, wait_until_ready
from rocm_infer.config import EMBEDDED_MODEL, EngineConfig, SamplingParams
from rocm_infer.engine.client import EngineClient
from rocm_infer.engine.messages import AddRequest
from rocm_infer.hub import resolve_model
from rocm_infer.text.tokenizer import Tokenizer

START_SECONDS = 600.0
LIMIT = 0.15  # of the engine's tokens per second that the server may cost


@dataclass
class Cost:
    """What one way of asking took in all rounds; CPU seconds of the worker and of the server."""

    tokens: int = 0
    seconds: float = 0.0
    worker: float = 0.0
    server: float = 0.0

    def row(self, name: str) -> str:
        each = 1e6 / self.tokens
        rate, worker, server = self.tokens / self.seconds, self.worker * each, self.server * each
        return f"{name:<14}{self.tokens:>9}{rate:>11.1f}{worker:>18.1f}{server:>18.1f}"


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def worker_of(parent: psutil.Process) -> psutil.Process:
    return next(child for child in parent.children() if "rocm_infer.engine.worker" in child.cmdline())


@contextlib.asynccontextmanager
async def serving(args: argparse.Namespace) -> AsyncIterator[tuple[str, psutil.Process]]:
    """A server of its own; yields its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--model", args.model, "--num-threads", str(args.num_threads), "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "rocm_infer.cli", "serve", *flags, stdout=2)
    try:
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        await process.wait()


async def ask_engine(client: EngineClient, prompts: list[Prompt], ids: list[list[int]], concurrency: int) -> int:
    """Number of tokens."""
    gate = asyncio.Semaphore(concurrency)

    async def one(number: int, prompt: Prompt) -> int:
        params = SamplingParams(max_tokens=prompt.output_len, temperature=0.0, ignore_eos=True)
        async with gate:
            outputs = [output async for output in client.add(AddRequest(str(number), ids[number], params))]
        if outputs[-1].error is not None:
            raise SystemExit(f"the engine failed: {outputs[-1].error.message}")
        return sum(len(output.token_ids) for output in outputs)

    return sum(await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts))))


async def measure(args: argparse.Namespace) -> tuple[Cost, Cost]:
    """Costs of the engine alone and through HTTP."""
    folder = resolve_model(args.model)
    prompts = random_prompts(args, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    encode = Tokenizer.load(folder).encode
    ids = [encode(str(prompt.text)) for prompt in prompts]
    engine, http = Cost(), Cost()
    config = EngineConfig(model=str(folder), num_threads=args.num_threads)
    client = EngineClient(config, log_level="error")
    try:
        await client.start()
        async with serving(args) as (url, server), open_session({}) as session:
            name = await wait_until_ready(session, url, START_SECONDS)
            alone, behind = worker_of(psutil.Process()), worker_of(server)
            for number in range(args.rounds):
                part = slice(number, None, args.rounds)
                start, before = time.perf_counter(), cpu_seconds(alone)
                engine.tokens += await ask_engine(client, prompts[part], ids[part], args.max_concurrency)
                engine.seconds += time.perf_counter() - start
                engine.worker += cpu_seconds(alone) - before
                start, before, spent = time.perf_counter(), cpu_seconds(behind), cpu_seconds(server)
                args.base_url = url
                results = await send_all(session, CLIENTS[args.backend], prompts[part], Sampling(name), args)
                http.seconds += time.perf_counter() - start
                http.worker += cpu_seconds(behind) - before
                http.server += cpu_seconds(server) - spent
                if failed := [result.error for result in results if not result.success]:
                    raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
                http.tokens += sum(result.prompt.output_len for result in results)
    finally:
        await client.shutdown()
    assert engine.tokens == http.tokens
    return engine, http


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if the server costs more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=EMBEDDED_MODEL)
    add("--backend", choices=("rocm-infer", "rocm-infer-oai"), default="rocm-infer", help="which API")
    add("--num-prompts", type=int, default=1000)
    add("--random-input-len", type=int, default=128)
    add("--random-output-len", type=int, default=128)
    add("--max-concurrency", type=int, default=256)
    add(
        "--num-threads",
        type=int,
        default=max(1, (os.cpu_count() or 1) - 1),
        help="of each worker; leaves a core for the server",
    )
    add("--rounds", type=int, default=2)
    add("--seed", type=int, default=42)
    add("--json", action="store_true")
    args = parser.parse_args(argv)
    args.dataset_name, args.dataset_path, args.random_range_ratio = "random", None, 0.0
    args.tokenize_prompt, args.request_rate, args.disable_tqdm = False, float("inf"), True
    engine, http = asyncio.run(measure(args))
    lost = 1 - (http.tokens / http.seconds) / (engine.tokens / engine.seconds)
    share = http.server / (http.server + http.worker)
    if args.json:
        print(json.dumps({"engine": vars(engine), "http": vars(http), "lost": lost, "cpu_share": share}))
    else:
        print(f"{'':<14}{'tokens':>9}{'tokens/s':>11}{'worker us/token':>18}{'server us/token':>18}")
        print(engine.row("engine alone"))
        print(http.row("through HTTP"))
        print(f"the way through HTTP loses {lost:.1%} of the tokens per second (limit {LIMIT:.0%}),")
        print(f"the server takes {share:.1%} of the CPU time of server and worker")
    return int(lost > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
