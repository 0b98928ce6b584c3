# SPDX-License-Identifier: Apache-2.0
"""The real server process over the real worker process, with the toy model: `python -m tests.server.toy_server FOLDER FLAGS...`.

`ToyServer` starts one for a test. Texts of the server's toy tokenizer never contain the tokens that make the toy fail; requests
that give token ids may: NAN, FAIL, CRASH, SLEEP.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from rocm_infer.config import EngineConfig, SamplingParams
from rocm_infer.engine.client import EngineClient
from rocm_infer.engine.messages import AddRequest
from rocm_infer.server import lifecycle
from rocm_infer.server.lifecycle import READY_LINE
from tests.text.toys import byte_level, write_folder

ROOT = Path(__file__).resolve().parents[2]
NUM_TEXTS = byte_level().get_vocab_size()
EOS = byte_level().token_to_id("<|end|>")
VOCAB = NUM_TEXTS + 4
SLEEP, CRASH, FAIL, NAN = VOCAB - 4, VOCAB - 3, VOCAB - 1, VOCAB - 2
WORKER = (sys.executable, "-m", "tests.server.toy_server", "worker")
START_SECONDS = 600  # what a worker may take to start on a machine that does much else
IS_NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def make_engine(config: EngineConfig) -> Any:
    from tests.engine.toy_worker import AuditedEngine, HazardousModel

    return AuditedEngine(config, model=HazardousModel(512, VOCAB, EOS, NUM_TEXTS))


def main() -> int:
    if sys.argv[1] == "worker":
        from rocm_infer.engine import worker

        return worker.main(sys.argv[2:], make_engine=make_engine)
    from rocm_infer import cli

    lifecycle.FIRST_BACKOFF = lifecycle.LONGEST_BACKOFF = 0.05
    lifecycle.CRASH_WINDOW = 3600.0  # so that crashes count together however long a start takes
    lifecycle.run_server = functools.partial(lifecycle.run_server, make_client=functools.partial(EngineClient, command=WORKER))
    return cli.main(["serve", *sys.argv[1:]])


class ToyServer:
    """A server in a process of its own; `toy_server` waits until it is ready."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.capsules = folder / "capsules"
        command = [sys.executable, "-m", "tests.server.toy_server", str(write_folder(folder / "toy")), "--port", str(port)]
        settings = (
            f"--page-size 4 --max-total-tokens 2048 --num-threads 1 --served-model-name toy "
            f"--capsule-dir {self.capsules} --profile-dir {folder / 'profiles'}"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [*command, *settings.split(), *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def num_starts(self) -> int:
        return self.lines.count(READY_LINE + "\n")

    def wait_for(self, condition: Any) -> None:
        end = time.monotonic() + START_SECONDS
        while not condition():
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def request(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and decoded JSON body (or text)."""
        data = None if body is None else json.dumps(body).encode()
        made = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(made, timeout=START_SECONDS) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        with contextlib.suppress(ValueError):
            return status, json.loads(text)
        return status, text

    def complete(self, prompt: Any, max_tokens: int, **fields: Any) -> tuple[int, Any]:
        return self.request("/v1/completions", completion(prompt, max_tokens, **fields))

    def stats(self) -> dict[str, float]:
        """The engine's statistics."""
        status, info = self.request("/server_info")
        assert status == 200, info
        found: dict[str, float] = info["internal_states"][0]
        return found

    def worker(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children() if "worker" in child.cmdline())

    def kill_worker(self) -> None:
        """Kill the worker and wait for the next one."""
        starts = self.num_starts
        self.worker().kill()
        self.wait_for(lambda: self.num_starts > starts or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    def assert_idle(self) -> None:
        """Nothing runs, waits or holds a page; after a flush all pages are free."""
        end = time.monotonic() + START_SECONDS
        while True:
            assert self.request("/flush_cache")[0] in (200, 400)  # 400: something still runs
            stats = self.stats()
            idle = stats["num_running"] + stats["num_waiting"] + stats["num_pages_used"] == 0
            if idle and stats["num_pages_free"] == stats["num_pages"]:
                return
            assert time.monotonic() < end, f"requests or pages are left: {stats}"
            time.sleep(0.05)


def completion(prompt: Any, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A greedy request that says its token ids."""
    base = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**base, "model": "toy", **fields}


@contextlib.contextmanager
def toy_server(folder: Path, *flags: str) -> Iterator[ToyServer]:
    server = ToyServer(folder, *flags)
    try:
        server.wait_for(lambda: server.num_starts == 1 or server.process.poll() is not None)
        assert server.num_starts == 1, server.log
        yield server
    finally:
        server.process.kill()
        server.process.wait()


class Oracle:
    """What the toy answers, from an engine in this process that serves one request at a time."""

    def __init__(self) -> None:
        self._engine = make_engine(EngineConfig(model="toy", page_size=4, max_total_tokens=2048, num_threads=1))
        self._known: dict[tuple[int, ...], list[int]] = {}

    def tokens(self, prompt: list[int], max_tokens: int) -> list[int]:
        known = self._known.get(tuple(prompt), [])
        if len(known) < max_tokens:
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            self._engine.add(AddRequest("oracle", prompt, params))
            known = []
            while self._engine.has_work:
                known += [token for output in self._engine.step() for token in output.token_ids]
            self._known[tuple(prompt)] = known
        return known[:max_tokens]


if __name__ == "__main__":
    sys.exit(main())
