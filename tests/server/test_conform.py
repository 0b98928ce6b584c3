# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer conform`: the real server passes every check, and a broken one fails those that it breaks."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from rocm_infer import cli
from rocm_infer.server.lifecycle import READY_LINE
from rocm_infer.server.metrics import MIN_RATE_SECONDS
from rocm_infer.tools.conform import CHECKS, run_checks, select
from tests.server.fakes import FakeClient, Harness, Script, run

KEY = "conform-key"
START_SECONDS = 150
# What vLLM's and SGLang's public Grafana boards query.
BOARDS = {
    "vllm": (
        *("e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_count"),
        *("prompt_tokens_total", "generation_tokens_total", "inter_token_latency_seconds_bucket"),
        *("inter_token_latency_seconds_sum", "inter_token_latency_seconds_count", "time_to_first_token_seconds_bucket"),
        *("time_to_first_token_seconds_sum", "time_to_first_token_seconds_count", "num_requests_running"),
        *("num_requests_waiting", "kv_cache_usage_perc", "request_prompt_tokens_bucket", "request_generation_tokens_bucket"),
        *("request_success_total", "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum"),
        *("request_decode_time_seconds_sum", "request_max_num_generation_tokens_sum"),
    ),
    "sglang": (
        *("e2e_request_latency_seconds_bucket", "time_to_first_token_seconds_bucket", "num_running_reqs"),
        *("gen_throughput", "cache_hit_rate", "num_queue_reqs"),
    ),
}


@dataclass
class Served:
    """A server process with the embedded model."""

    url: str
    lines: list[str]
    profiles: Path

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        made = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(made, timeout=60) as response:
                text = response.read().decode()
                return response.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metrics(self) -> dict[str, float]:
        """The sum of each name's samples."""
        found: dict[str, float] = {}
        for line in self.send("GET", "/metrics")[1].splitlines():
            if not line.startswith("#"):
                name, value = re.split(r"[{ ]", line)[0], float(line.split()[-1])
                found[name] = found.get(name, 0.0) + value
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("conform")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--max-total-tokens 8192 --log-format json --log-requests params --max-running-requests 16"
    command = [sys.executable, "-m", "rocm_infer.cli", "serve", "--port", str(port), "--api-key", KEY, *flags.split()]
    process = subprocess.Popen(
        [*command, "--profile-dir", str(folder / "profiles")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    made = Served(f"http://127.0.0.1:{port}", [], folder / "profiles")

    def read() -> None:
        assert process.stdout is not None
        made.lines.extend(process.stdout)

    threading.Thread(target=read, daemon=True).start()
    try:
        end = time.monotonic() + START_SECONDS
        while READY_LINE + "\n" not in made.lines:
            assert time.monotonic() < end, "".join(made.lines)
            assert process.poll() is None, "".join(made.lines)
            time.sleep(0.05)
        yield made
    finally:
        process.kill()
        process.wait()


def test_the_server_passes_every_check(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    code = cli.main(["conform", "--base-url", served.url + "/v1", "--api-key", KEY, "--json", str(path)])
    printed = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert [result for result in results if not result["passed"]] == [], printed
    assert (code, len(results)) == (0, len(CHECKS))
    assert printed.endswith(f"{len(CHECKS)} passed, 0 failed\n")
    assert len(CHECKS) >= 150
    assert len({check.id for check in CHECKS}) == len(CHECKS)


def test_what_the_boards_query_moves(served: Served) -> None:
    """Every metric of both boards is there; counts grow, and gauges are not always zero. Two that wait need a full queue."""
    before, seen = served.metrics(), {}

    def watch() -> None:
        while asking.is_alive():
            for name, value in served.metrics().items():
                seen[name] = max(seen.get(name, 0.0), value)
            time.sleep(0.02)

    body = {"prompt": ["one two three four five six seven eight nine ten"] * 24, "max_tokens": 48, "ignore_eos": True}
    asking = threading.Thread(target=served.send, args=("POST", "/v1/completions", body))
    asking.start()
    watch()
    asking.join()
    time.sleep(MIN_RATE_SECONDS)
    after = served.metrics()
    for prefix, names in BOARDS.items():
        for name in names:
            full = f"{prefix}:{name}"
            assert full in before, full
            most = max(seen.get(full, 0.0), after[full])
            moved = most > before[full] if name.endswith(("_total", "_sum", "_count", "_bucket")) else most > 0
            assert moved, full


def test_a_profile_of_the_served_steps(served: Served) -> None:
    ask = {"prompt": "a", "max_tokens": 6, "ignore_eos": True}
    assert served.send("POST", "/start_profile", {"output_dir": "../up"})[1]["error"]["param"] == "output_dir"
    assert served.send("POST", "/start_profile", {"output_dir": "/tmp"})[0] == 400
    assert served.send("POST", "/start_profile", {"activities": ["RPD"]})[0] == 400
    assert served.send("POST", "/stop_profile")[0] == 400
    status, started = served.send("POST", "/start_profile", {"output_dir": "mine", "num_steps": 100, "record_shapes": True})
    assert (status, started["message"]) == (200, "Start profiling.")
    assert served.send("GET", "/start_profile")[0] == 400
    assert served.send("POST", "/v1/completions", ask)[0] == 200
    status, stopped = served.send("POST", "/stop_profile")
    assert (status, stopped["path"]) == (200, started["path"])
    path = Path(stopped["path"])
    assert path.parent == served.profiles / "mine"
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert any(str(name).startswith("aten::") for name in names)


def test_log_lines_are_json_with_ids_and_without_texts(served: Served) -> None:
    secret = "xylophone-\u00e9-quartz"
    served.send("POST", "/v1/completions", {"prompt": secret, "max_tokens": 3, "ignore_eos": True, "seed": 12345})
    time.sleep(0.2)
    logged = [json.loads(line) for line in served.lines if line.startswith("{")]
    assert len(logged) > 100
    others = {line for line in served.lines if not line.startswith("{")}
    assert all(line.startswith(("Serving ", READY_LINE, "USDT:")) for line in others), others
    ended = next(line for line in reversed(logged) if line["logger"] == "rocm_infer.requests")
    access = next(line for line in reversed(logged) if line["logger"] == "rocm_infer.access" and line["id"] == ended["id"])
    assert (access["status"], access["path"]) == (200, "/v1/completions")
    assert ended["params"]["seed"] == 12345
    assert ended["outputs"][0]["completion_tokens"] == 3
    assert not any("xylophone" in line for line in served.lines)


# defect, the check that must find it, what it does to (path, request fields, answer)
Rewrite = Callable[[str, bytes], bytes]
DEFECTS: tuple[tuple[str, str, Callable[[dict[str, Any]], None] | None, Rewrite | None], ...] = (
    (
        "finish_reason is an empty string",
        "stream.finish-null",
        None,
        lambda _, raw: raw.replace(b'"finish_reason":null', b'"finish_reason":""'),
    ),
    ("no [DONE]", "stream.done", None, lambda _, raw: raw.replace(b"data: [DONE]\n\n", b"")),
    ("events not separated", "stream.framing", None, lambda _, raw: raw.replace(b"\n\ndata", b"\ndata")),
    ("no role", "stream.role-first", None, lambda _, raw: raw.replace(b'"role":"assistant",', b"")),
    ("empty deltas", "stream.no-empty-delta", None, lambda _, raw: re.sub(rb'"content":"[a-z]"', b'"content":""', raw)),
    ("ids differ", "stream.same-head", None, lambda _, raw: raw.replace(b'"id":"chatcmpl-', b'"id":"chatcmpl-x', 1)),
    ("usage without choices: null", "stream.usage-last", None, lambda _, raw: raw.replace(b'"choices":[],', b"")),
    ("stop strings leak", "stream.stop", lambda body: body.pop("stop", None), None),
    ("stop strings are ignored", "chat.stop", lambda body: body.pop("stop", None), None),
    ("n is ignored", "chat.n", lambda body: body.pop("n", None), None),
    ("n is ignored in streams", "stream.n", lambda body: body.pop("n", None), None),
    ("max_tokens is ignored", "chat.max-tokens-1", lambda body: body.pop("max_tokens", None), None),
    ("logprobs are not reported", "chat.logprobs", lambda body: body.pop("logprobs", None), None),
    ("another object", "chat.object", None, lambda _, raw: raw.replace(b'"chat.completion"', b'"text"')),
    ("content is empty", "stream.same-text", None, lambda _, raw: raw.replace(b"Hello", b"")),
    ("usage does not add up", "chat.usage", None, lambda _, raw: re.sub(rb'"total_tokens":\d+', b'"total_tokens":1', raw)),
    ("a flat error body", "errors.path", None, lambda _, raw: raw.replace(b'{"error":', b'{"object":"error","detail":')),
    ("a flat error body for a field", "errors.temperature", None, lambda _, raw: raw.replace(b'{"error":', b'{"detail":')),
    ("errors name no field", "errors.top-p", None, lambda _, raw: raw.replace(b'"param":"top_p"', b'"param":null')),
    ("a stack in an error", "errors.model", None, lambda _, raw: raw.replace(b"The model", b"Traceback")),
    ("out-of-range values pass", "errors.n-0", lambda body: body.pop("n", None), None),
    ("one name in /detokenize", "info.detokenize", None, lambda _, raw: raw.replace(b'"text":', b'"other":')),
    ("no models", "info.models", None, lambda path, raw: b'{"object":"list","data":[]}' if path == "/v1/models" else raw),
    ("echo is ignored", "completions.echo", lambda body: body.pop("echo", None), None),
    (
        "Anthropic's last event is missing",
        "messages.events",
        None,
        lambda _, raw: raw.replace(b"event: message_stop", b"event: x"),
    ),
    (
        "events are not numbered",
        "responses.events",
        None,
        lambda _, raw: re.sub(rb'"sequence_number":\d+', b'"sequence_number":0', raw),
    ),
)


def _proxy(upstream: str, change: Callable[[dict[str, Any]], None] | None, rewrite: Rewrite | None) -> web.Application:
    """A server that has one defect more than `upstream`."""

    async def forward(request: web.Request) -> web.Response:
        data = await request.read()
        if change is not None and data:
            body = json.loads(data)
            change(body)
            data = json.dumps(body).encode()
        headers = {name: value for name, value in request.headers.items() if name in ("Content-Type", "X-Request-Id")}
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, upstream + request.path, data=data or None, headers=headers) as reply,
        ):
            raw = await reply.read()
            kept = {name: value for name, value in reply.headers.items() if name.lower() in ("x-request-id", "content-type")}
            return web.Response(body=rewrite(request.path, raw) if rewrite else raw, status=reply.status, headers=kept)

    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


async def _results(upstream: str, ids: list[str], change: Any = None, rewrite: Any = None) -> dict[str, bool]:
    runner = web.AppRunner(_proxy(upstream, change, rewrite), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        checks = [check for name in ids for check in select(name)]
        found = await run_checks(checks, f"http://127.0.0.1:{runner.addresses[0][1]}", model="toy", api_key=None)
        return {result.id: result.passed for result in found}
    finally:
        await runner.cleanup()


def over_toy(scenario: Callable[[Harness], Awaitable[None]]) -> None:
    run(scenario, FakeClient(Script(text="Hello there, this is an answer of some length!")))


def test_a_broken_server_fails() -> None:
    ids = [name for _, name, _, _ in DEFECTS]

    async def scenario(server: Harness) -> None:
        sound = await _results(server.url, ids)
        assert all(sound.values()), sound
        broken = await asyncio.gather(*[_results(server.url, [name], change, rewrite) for _, name, change, rewrite in DEFECTS])
        missed = [what for (what, name, _, _), found in zip(DEFECTS, broken, strict=True) if found[name]]
        assert missed == []

    over_toy(scenario)


def test_no_server_and_no_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["conform", "--base-url", "http://127.0.0.1:9", "--only", "chat"]) == 1
    assert cli.main(["conform", "--base-url", "http://127.0.0.1:9", "--only", "nothing"]) == 1
    assert "matches no check; areas are chat, stream" in capsys.readouterr().err


def test_a_failure_says_expected_and_got(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(server: Harness) -> None:
        url = server.url
        code = await asyncio.to_thread(cli.main, ["conform", "--base-url", url, "--only", "structured.schema"])
        assert code == 1

    over_toy(scenario)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL  structured.schema")
    assert lines[-1].endswith("failed")
    assert any(line.lstrip().startswith("expected ") for line in lines)
    assert any(line.lstrip().startswith("got ") for line in lines)
