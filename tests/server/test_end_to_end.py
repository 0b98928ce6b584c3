# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer serve` as a user runs it: a real server process, a real worker process, the official client."""

from __future__ import annotations

import contextlib
import json
import re
import signal
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

import openai
import psutil
import pytest

from rocm_infer import LLM, SamplingParams, hub
from rocm_infer.config import EMBEDDED_MODEL
from rocm_infer.server.lifecycle import READY_LINE

HAS_EMBEDDED = (Path(hub.__file__).parent / "assets" / EMBEDDED_MODEL / "config.json").is_file()
START_SECONDS = 120


class Server:
    """`rocm-infer serve` in a subprocess, ready when made."""

    def __init__(self, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "rocm_infer.cli", "serve", "--port", str(port), "--max-total-tokens", "4096", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.wait_for(lambda: self.num_starts == 1 or self.process.poll() is not None)
        assert self.num_starts == 1, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def num_starts(self) -> int:
        """How often the server announced that it is ready."""
        return self.lines.count(READY_LINE + "\n")

    def wait_for(self, condition: Any) -> None:
        end = time.monotonic() + START_SECONDS
        while not condition():
            assert time.monotonic() < end, "".join(self.lines)
            time.sleep(0.02)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def value(self, name: str) -> float:
        """A metric's value."""
        found = re.search(rf"^{re.escape(name)}{{.*}} (.*)$", self.get("/metrics")[1], re.MULTILINE)
        assert found, name
        return float(found[1])

    def worker(self) -> psutil.Process:
        """The engine's process."""
        return next(child for child in psutil.Process(self.process.pid).children() if "worker" in " ".join(child.cmdline()))

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextlib.contextmanager
def server_of(*flags: str) -> Iterator[Server]:
    server = Server(*flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with server_of("--model-path", str(checkpoint), "--served-model-name", "toy", "--random-seed", "3") as made:
        yield made


def test_the_server_says_what_the_library_says(server: Server, checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), device="cpu", max_total_tokens=4096)
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    with server.client() as client:
        for prompt in ("the cat", "a", "wörld"):
            expected = llm.generate(prompt, greedy)
            answer = client.completions.create(model="toy", prompt=prompt, max_tokens=12, temperature=0)
            assert answer.choices[0].text == expected.text
            stream = client.completions.create(model="toy", prompt=prompt, max_tokens=12, temperature=0, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == expected.text
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(model="toy", messages=messages, max_tokens=12, temperature=0)
        assert chat.choices[0].message.content == llm.chat(messages, greedy).text
        seeded: dict[str, Any] = {"model": "toy", "prompt": "x", "max_tokens": 8, "seed": 11, "n": 2}
        texts = [choice.text for choice in client.completions.create(**seeded).choices]
        assert texts == [choice.text for choice in client.completions.create(**seeded).choices]
        assert texts == [
            output.text for output in llm.generate("x", SamplingParams(8, temperature=0.5, top_k=7, seed=11, n=2)).outputs
        ]


def test_log_likelihoods(server: Server) -> None:
    """Echo with token ids, as lm-eval asks: the same numbers cold, from the prefix cache, and as sampled tokens."""
    ids = list(range(40, 80))
    with server.client() as client:
        ask: dict[str, Any] = {"model": "toy", "prompt": ids, "echo": True, "logprobs": 1, "temperature": 0}
        cold, cached = (client.completions.create(**ask, max_tokens=0).choices[0].logprobs for _ in range(2))
        assert cold is not None
        assert cached is not None
        assert cold.token_logprobs == cached.token_logprobs
        assert len(cold.token_logprobs or []) == 40
        grown = client.completions.create(**ask, max_tokens=3).choices[0].logprobs
        assert grown is not None
        assert len(grown.tokens or []) == 43
        assert (grown.token_logprobs or [])[:40] == cold.token_logprobs


def test_what_the_engine_refuses(server: Server) -> None:
    with server.client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="toy", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


def test_a_dropped_connection_frees_its_pages(server: Server) -> None:
    used = "rocm_infer:num_requests_running"
    with server.client() as client:
        stream = client.completions.create(
            model="toy", prompt="x", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    server.wait_for(lambda: server.value(used) == 0)
    assert server.value("rocm_infer:kv_cache_usage_ratio") == 0
    assert server.value("rocm_infer:jit_compiles_total") == 0


def test_flush_and_info(server: Server) -> None:
    server.wait_for(lambda: server.get("/flush_cache") == (200, "Cache flushed.\n"))
    info = json.loads(server.get("/server_info")[1])
    assert info["engine"]["context_length"] == 512
    assert server.get("/health")[0] == 200


def test_a_port_in_use(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "rocm_infer.cli", "serve", "--model", str(checkpoint)]
        done = subprocess.run([*command, "--port", str(taken.getsockname()[1])], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not HAS_EMBEDDED, reason="the embedded model is not in this checkout")
def test_the_embedded_model_answers() -> None:
    with server_of() as server, server.client() as client:
        assert [model.id for model in client.models.list()] == [EMBEDDED_MODEL]
        ask: dict[str, Any] = {
            "model": EMBEDDED_MODEL,
            "messages": [{"role": "user", "content": "What is the sum of 12 and 30?"}],
            "max_tokens": 16,
        }
        answer = client.chat.completions.create(**ask).choices[0].message.content
        assert answer
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(pieces) == answer


def test_a_killed_worker_is_replaced_and_sigterm_ends_it_all(server: Server) -> None:
    """The last test on this server."""
    with server.client() as client:
        ask: dict[str, Any] = {"model": "toy", "prompt": "x", "max_tokens": 500, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**ask, stream=True)
        next(iter(stream))
        worker = server.worker()
        worker.kill()
        with pytest.raises(openai.APIError, match="signal 9"):
            list(stream)
        status, body = server.get("/health")
        assert (status, json.loads(body)["error"]["code"]) == (503, "unhealthy")
        server.wait_for(lambda: server.num_starts == 2)
        assert client.completions.create(**{**ask, "max_tokens": 3}).choices[0].finish_reason == "length"
        worker = server.worker()
        assert server.stop() == 0
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
