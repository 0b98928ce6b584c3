# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, readers that stall, workers that die, signals, busy ports: nothing is lost, nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rocm_infer.engine.client import EngineDied
from rocm_infer.server import body, lifecycle
from rocm_infer.server.lifecycle import READY_LINE
from rocm_infer.server.service import Service
from tests.server.fakes import FakeClient, Harness, Script, eventually, make_service, run
from tests.text.toys import write_folder

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]
HANG = Script(hang_after=2)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_connection_aborts(stream: bool, n: int) -> None:
    async def scenario(server: Harness) -> None:
        for path, fields in (
            (CHAT, {"messages": HI, "n": n}),
            (COMPLETIONS, {"prompt": ["x"] * n}),
            ("/generate", {"text": "x"}),
        ):
            sent = asyncio.ensure_future(server.http.post(server.url + path, json={**fields, "stream": stream}))
            await eventually(lambda: server.engine.num_requests > 0)
            await asyncio.sleep(0.05)
            if stream:
                response = await sent
                assert b"data: " in await response.content.readany()
                response.close()
            else:
                sent.cancel()
            await eventually(lambda: server.engine.num_requests == 0)
        assert len(server.engine.aborted) == 2 * n + 1
        assert server.service.num_running == 0

    run(scenario, FakeClient(HANG))


def test_silent_streams_are_pinged() -> None:
    async def scenario(server: Harness) -> None:
        async with server.http.post(server.url + CHAT, json={"messages": HI, "stream": True}) as response:
            assert response.status == 200
            for _ in range(2):
                assert await response.content.readuntil(b"\n\n") == b": ping\n\n"

    run(scenario, FakeClient(Script(hang_after=0)), ping=0.05)


def test_a_reader_that_takes_nothing_is_cut() -> None:
    async def scenario(server: Harness) -> None:
        body = json.dumps({"text": "x", "stream": True, "sampling_params": {"max_new_tokens": 100_000}}).encode()
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.socket() as quiet:
            quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            quiet.setblocking(False)
            await asyncio.get_running_loop().sock_connect(quiet, ("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
            await asyncio.get_running_loop().sock_sendall(quiet, head + body)
            await eventually(lambda: bool(server.engine.aborted))

    token = max(range(256), key=lambda i: len(str(i)))
    run(scenario, FakeClient(Script(ids=[token] * 100_000, step=50), context_length=10**6), ping=0.05, stuck=0.2)


async def talk(server: Harness, data: bytes) -> bytes:
    """Sends bytes on a connection of their own; all that comes back until the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.close()


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT", 0.1)

    async def scenario(server: Harness) -> None:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        answer = await talk(server, head.encode())
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 0.1 s" in answer

    run(scenario)


@pytest.mark.parametrize("head", [b"GET /" + b"x" * 9000, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 9000])
def test_headers_are_bounded(head: bytes) -> None:
    async def scenario(server: Harness) -> None:
        assert (await talk(server, head + b" HTTP/1.1\r\n\r\n")).split()[1] == b"400"
        assert (await server.get("/live"))[0] == 200

    run(scenario)


def test_a_path_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Harness) -> None:
        assert b" 404 " in await talk(server, b"GET /a%0A%1b[31mforged HTTP/1.0\r\n\r\n")

    with caplog.at_level(logging.INFO, "rocm_infer"):
        run(scenario)
    assert "GET /a%0A%1b[31mforged 404" in caplog.text


def test_a_dying_worker_answers_everybody() -> None:
    async def scenario(server: Harness) -> None:
        headers = {"X-Request-Id": "me"}
        whole = asyncio.ensure_future(server.post(CHAT, {"messages": HI, "n": 2}, **headers))
        stream = await server.http.post(server.url + CHAT, json={"messages": HI, "stream": True}, headers=headers)
        await eventually(lambda: server.engine.num_requests == 3)
        server.engine.die()
        status, body = await whole
        assert status == 500
        assert "killed by signal 9" in body["error"]["message"]
        assert "me" in body["error"]["message"]
        text = await stream.text()
        assert text.count('"error"') == 1
        assert "[DONE]" not in text
        assert "(request id me)" in text

    run(scenario, FakeClient(HANG))


class Life:
    """A whole server life over fake engines: one `FakeClient` per start, made by `engine`."""

    def __init__(self, engine: Callable[[], FakeClient], **settings: Any) -> None:
        self.engines: list[FakeClient] = []
        self.said: list[str] = []
        self._engine = engine
        with tempfile.TemporaryDirectory() as name, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
            self.service: Service = make_service(
                FakeClient(), write_folder(Path(name)), port=settings.pop("port", self.port), **settings
            )
        self.url = f"http://127.0.0.1:{self.port}"

    def make(self, on_death: Callable[[str], None] | None = None) -> Any:
        engine = self._engine()
        engine.on_death = on_death
        self.engines.append(engine)
        return engine

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[asyncio.Task[int], aiohttp.ClientSession]]:
        task = asyncio.ensure_future(lifecycle.serve(self.service, self.make, self.said.append))
        try:
            async with aiohttp.ClientSession(self.url) as http:
                yield task, http
                await task
        finally:
            task.cancel()

    async def listening(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return
            await asyncio.sleep(0.01)

    async def ready(self, times: int = 1) -> None:
        await eventually(lambda: self.said.count(READY_LINE) == times)


def live(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_it_starts_warms_up_and_says_so() -> None:
    async def scenario() -> None:
        engine = FakeClient()
        engine.may_start.clear()
        life = Life(lambda: engine)
        async with life.running() as (task, http):
            await life.listening()
            async with http.get("/health") as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "starting")
            async with http.post(COMPLETIONS, json={"prompt": "x"}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "starting")
            assert life.said == []
            engine.may_start.set()
            await life.ready()
            assert life.said == [f"Serving toy on {life.url}", READY_LINE]
            (warm_up,) = engine.requests
            assert life.service.tokenizer.decode(warm_up.prompt_ids) == "The capital city of France is"
            assert (warm_up.params.max_tokens, warm_up.params.temperature) == (8, 0)
            async with http.get("/health") as response:
                assert response.status == 200
            os.kill(os.getpid(), signal.SIGTERM)
        assert task.result() == 0

    live(scenario)


def test_sigterm_drains() -> None:
    async def scenario() -> None:
        life = Life(lambda: FakeClient(Script(delay=0.05)), skip_server_warmup=True)
        async with life.running() as (task, http):
            await life.ready()
            running = asyncio.ensure_future(http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 10}))
            await eventually(lambda: life.engines[-1].num_requests == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await eventually(lambda: life.service.phase == "draining")
            async with http.post(COMPLETIONS, json={"prompt": "x"}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "draining")
                assert "Retry-After" in response.headers
            async with http.get("/health") as response:
                assert response.status == 503
            answer = await (await running).json()
            assert answer["choices"][0]["finish_reason"] == "length"
        assert task.result() == 0
        assert life.engines[-1].state == "closed"

    live(scenario)


@pytest.mark.parametrize("second_signal", [False, True])
def test_draining_ends(second_signal: bool) -> None:
    """After the drain time, or at a second signal, what still runs is aborted and says so."""

    async def scenario() -> None:
        life = Life(lambda: FakeClient(HANG), skip_server_warmup=True, drain_timeout=30.0 if second_signal else 0.2)
        async with life.running() as (task, http):
            await life.ready()
            running = asyncio.ensure_future(http.post(COMPLETIONS, json={"prompt": "x"}))
            await eventually(lambda: life.engines[-1].num_requests == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await eventually(lambda: life.service.phase == "draining")
            if second_signal:
                os.kill(os.getpid(), signal.SIGINT)
            answer = await (await running).json()
            assert answer["choices"][0]["finish_reason"] == "abort"
        assert task.result() == 0

    live(scenario)


def test_a_dead_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_BACKOFF", 0.2)

    async def scenario() -> None:
        life = Life(FakeClient, skip_server_warmup=True)
        async with life.running() as (_, http):
            await life.ready()
            life.engines[-1].die("killed by signal 9")
            await eventually(lambda: life.service.phase == "unhealthy")
            async with http.get("/health") as response:
                body = await response.json()
                assert (response.status, body["error"]["code"]) == (503, "unhealthy")
                assert "signal 9" in body["error"]["message"]
            await life.ready(times=2)
            async with http.post(COMPLETIONS, json={"prompt": "x"}) as response:
                assert response.status == 200
            async with http.get("/server_info") as response:
                assert (await response.json())["num_crashes"] == 1
            os.kill(os.getpid(), signal.SIGTERM)

    live(scenario)


def test_repeated_crashes_end_the_server(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_BACKOFF", 0.01)

    async def scenario() -> None:
        life = Life(FakeClient, skip_server_warmup=True)
        async with life.running() as (task, _):
            for times in (1, 2, 3):
                await life.ready(times)
                life.engines[-1].die("it broke")
        assert task.result() == 1

    live(scenario)
    assert "died 3 times within 60 s, giving up: it broke" in caplog.text


@pytest.mark.parametrize("fails", ["start", "warm-up"])
def test_a_failed_start_ends_the_server(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        from rocm_infer.engine.messages import ErrorInfo

        engine = FakeClient(Script(error=ErrorInfo("internal_error", "no such weight")))
        engine.start_error = EngineDied("no such weight") if fails == "start" else None
        life = Life(lambda: engine)
        async with life.running() as (task, _):
            pass
        assert task.result() == 1
        assert life.said == []

    live(scenario)
    assert "the model could not be started: no such weight" in caplog.text


def test_a_busy_port(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            life = Life(FakeClient, port=taken.getsockname()[1])
            async with life.running() as (task, _):
                pass
            assert task.result() == 1

    live(scenario)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "is in use" in record.message
    assert "--port" in record.message


def test_an_open_address_without_a_key_warns(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        life = Life(FakeClient, host="0.0.0.0", skip_server_warmup=True)
        async with life.running():
            await life.ready()
            os.kill(os.getpid(), signal.SIGINT)

    live(scenario)
    assert "without --api-key" in caplog.text
