# SPDX-License-Identifier: Apache-2.0
"""Exact match of the embedded model on held-out exercises, through the HTTP API: the end-to-end check of a backend.

python -m bench.accuracy [--base-url URL] [--num-prompts 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from training import tasks

FIRST_RECALL_TOKENS = 30
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--base-url", help="a running server; default: start `rocm-infer serve` here and stop it afterwards")
    add("--model", help="name sent in requests, default: the first of /v1/models")
    add("--num-prompts", type=int, default=200, help="prompts per task")
    add("--max-concurrency", type=int, default=32, help="requests in flight at most")
    add("--threshold", type=float, default=0.95, help="exit with 1 when a task's share of right answers is lower")
    add("--seed", type=int, default=0)
    add("--show", type=int, default=0, help="wrong answers printed per task")
    add("--json", type=Path, help="write the result there")
    add("--serve-args", default="", help="arguments for the server started here, e.g. '--kernel-backend reference'")
    return parser.parse_args(argv)


def exercises(num_prompts: int, seed: int) -> dict[str, list[tasks.Exercise]]:
    """Held-out exercises by name of the row: one per task, and the longest recall contexts by themselves."""
    longest = tasks.LONG_RECALL_TOKENS
    ranges = {"recall": (FIRST_RECALL_TOKENS, longest)}
    found = {t: tasks.held_out_exercises(t, num_prompts, seed, ranges.get(t, (0, 0))) for t in tasks.TASKS}
    found[f"recall at {longest}"] = tasks.held_out_exercises("recall", num_prompts, seed + 1, (longest - 50, longest))
    return found


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: str) -> str:
    """The answer to one prompt, or what went wrong in place of it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tasks.LONGEST_ANSWER,
    }
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            reply = await response.json()
            return str(reply["choices"][0]["message"]["content"]) if response.status == 200 else f"error: {reply}"
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, LookupError) as error:
        return f"error: {type(error).__name__} {error}"


async def answer_all(url: str, model: str | None, prompts: list[str], max_concurrency: int) -> tuple[str, list[str]]:
    """The served model's name, and the answers in the order of the prompts."""
    gate = asyncio.Semaphore(max_concurrency)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        if model is None:
            async with session.get(f"{url}/v1/models") as response:
                response.raise_for_status()
                model = str((await response.json())["data"][0]["id"])

        async def one(prompt: str) -> str:
            async with gate:
                return await ask(session, url, model, prompt)

        return model, list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running_server(extra: list[str]) -> Iterator[str]:
    """Start `rocm-infer serve` on a free port; yields its address once /health answers. Stopped by SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "rocm_infer.cli", "serve", "--host", "127.0.0.1", "--port", str(port), *extra]
    with tempfile.TemporaryFile("w+") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            asyncio.run(wait_until_healthy(f"http://127.0.0.1:{port}", server))
            yield f"http://127.0.0.1:{port}"
        except ServerFailed as failure:
            output.seek(0)
            raise SystemExit(f"{failure}; its output:\n{output.read()[-4000:]}") from None
        finally:
            stop(server)


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time."""


async def wait_until_healthy(url: str, server: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            if server.poll() is not None:
                raise ServerFailed(f"rocm-infer serve ended with {server.returncode}")
            if time.monotonic() > end:
                raise ServerFailed(f"rocm-infer serve was not ready within {START_TIMEOUT_S:g} s")
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)


def stop(server: subprocess.Popen[str]) -> None:
    """SIGTERM, then SIGKILL to the whole process group when it does not end in time."""
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ask every exercise; prints wrong answers if wanted, returns the shares of exact matches."""
    asked = exercises(args.num_prompts, args.seed)
    prompts = [exercise.prompt for group in asked.values() for exercise in group]
    start = time.monotonic()
    model, answers = asyncio.run(answer_all(url, args.model, prompts, args.max_concurrency))
    seconds = time.monotonic() - start
    left = iter(answers)
    shares: dict[str, float] = {}
    for name, group in asked.items():
        wrong = [(e, got) for e, got in ((e, next(left)) for e in group) if got != e.answer]
        shares[name] = 1 - len(wrong) / len(group)
        for exercise, got in wrong[: args.show]:
            print(f"{name}: ...{exercise.prompt[-60:]!r} expected {exercise.answer!r}, got {got!r}")
    return {"model": model, "num_prompts": args.num_prompts, "seed": args.seed, "seconds": seconds, "exact_match": shares}


def table(result: dict[str, Any], threshold: float) -> str:
    lines = [f"{result['model']}: exact match over {result['num_prompts']} held-out prompts per task"]
    for name, share in result["exact_match"].items():
        lines.append(f"  {name:<16}{share:>8.1%}{'' if share >= threshold else f'   below {threshold:.0%}'}")
    return "\n".join([*lines, f"  {result['seconds']:.1f} s in all"])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.num_prompts < 1:
        raise SystemExit("--num-prompts: expected at least 1")
    with contextlib.ExitStack() as stack:
        url = args.base_url or stack.enter_context(running_server(args.serve_args.split()))
        try:
            result = measure(url.rstrip("/"), args)
        except (aiohttp.ClientError, OSError) as error:
            raise SystemExit(f"no answer from {url} ({error}); start a server there or leave --base-url away") from None
    print(table(result, args.threshold))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(min(result["exact_match"].values()) < args.threshold)


if __name__ == "__main__":
    sys.exit(main())
