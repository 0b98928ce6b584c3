# SPDX-License-Identifier: Apache-2.0
"""A scripted engine behind the real server, on a loopback port, with the official client in front."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai
from aiohttp import web

from rocm_infer.config import EngineConfig, ServerConfig
from rocm_infer.engine.messages import AddRequest, ErrorInfo, RequestOutput, TokenLogprob
from rocm_infer.server.app import build_app
from rocm_infer.server.service import Service, load_model_files
from rocm_infer.server.sse import OpenStreams
from rocm_infer.text.tokenizer import Tokenizer
from tests.text.toys import CONFIG, byte_level, write_folder

TOKENIZER = Tokenizer(byte_level(), CONFIG)
CONTEXT = 256
MODEL = "toy"


def logprob_of(position: int, token_id: int) -> float:
    """What the fake model thinks of a token: any fixed function does."""
    return -0.001 * token_id - 0.25 * position


def _entry(position: int, token_id: int, num_top: int) -> TokenLogprob:
    top = [(other % TOKENIZER.vocab_size, logprob_of(position, other)) for other in range(token_id, token_id + num_top)]
    return TokenLogprob(token_id, logprob_of(position, token_id), top)


@dataclass
class Script:
    """What the fake engine answers to one request."""

    text: str = "Hello there, wörld 😀!"
    ids: list[int] | None = None
    step: int = 1
    delay: float = 0.0
    error: ErrorInfo | None = None
    fail_after: int = 0
    hang_after: int | None = None
    eos: bool = True
    num_cached: int = 0

    def outputs(self, request: AddRequest) -> Iterator[RequestOutput | None]:
        """Outputs of one request, step by step; None hangs until the request is aborted."""
        ids = list(TOKENIZER.encode(self.text) if self.ids is None else self.ids)
        params = request.params
        eos = TOKENIZER.eos_id or 0
        if self.eos:
            ids.append(eos)
        limit = CONTEXT - len(request.prompt_ids) if params.max_tokens is None else params.max_tokens
        reason = "length" if limit < len(ids) or not self.eos else "stop"
        ids = ids[:limit]
        produced = 0
        while True:
            if self.error is not None and produced >= self.fail_after:
                yield RequestOutput(request.rid, [], "error", error=self.error)
                return
            if self.hang_after is not None and produced >= self.hang_after:
                yield None
                return
            new = ids[produced : produced + self.step]
            last = produced + len(new) == len(ids)
            yield RequestOutput(
                request.rid,
                new,
                reason if last else None,
                eos if last and reason == "stop" else None,
                len(request.prompt_ids),
                self.num_cached,
                None if params.logprobs is None else [_entry(produced + i, t, params.logprobs) for i, t in enumerate(new)],
                self._prompt_logprobs(request) if produced == 0 else None,
            )
            produced += len(new)
            if last:
                return

    def _prompt_logprobs(self, request: AddRequest) -> list[TokenLogprob | None] | None:
        num_top = request.params.prompt_logprobs
        if num_top is None:
            return None
        entries = [_entry(position, token_id, num_top) for position, token_id in enumerate(request.prompt_ids)]
        return [None, *entries[1:]]


class FakeStream:
    def __init__(self, client: FakeClient, request: AddRequest, script: Script) -> None:
        self._client, self._request, self._script = client, request, script
        self._outputs = script.outputs(request)
        self._aborted = asyncio.Event()
        self.ended = False

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.ended:
            raise StopAsyncIteration
        output = next(self._outputs)
        if output is None:
            await self._aborted.wait()
        else:
            await asyncio.sleep(self._script.delay)
        if self._aborted.is_set():
            output = self._client.last_words or RequestOutput(self._request.rid, [], "abort")
        assert output is not None
        if output.finish_reason is not None:
            self._end()
        return output

    def _end(self) -> None:
        self.ended = True
        self._client.live.pop(self._request.rid, None)

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        if not self.ended:
            self._client.aborted.append(self._request.rid)
            self._end()
            self.abort()


class FakeClient:
    """Stands where EngineClient stands; `script` decides what each request gets."""

    def __init__(self, script: Script | Callable[[AddRequest], Script] | None = None, **info: Any) -> None:
        self._script = script or Script()
        self.state = "new"
        self.failure: str | None = None
        self.has_vocabulary = False
        self.vocabulary: list[bytes] = []
        self.info = {
            "model": MODEL,
            "context_length": CONTEXT,
            "vocab_size": TOKENIZER.vocab_size,
            "page_size": 16,
            "max_total_tokens": 1024,
        } | info
        self.requests: list[AddRequest] = []
        self.live: dict[str, FakeStream] = {}
        self.aborted: list[str] = []
        self.flushes = 0
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.start_error: Exception | None = None
        self.last_words: RequestOutput | None = None
        self.on_death: Callable[[str], None] | None = None

    @property
    def num_requests(self) -> int:
        return len(self.live)

    async def start(self) -> dict[str, Any]:
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        self.state = "ready"
        return self.info

    def add(self, request: AddRequest) -> FakeStream:
        self.requests.append(request)
        script = self._script(request) if callable(self._script) else self._script
        self.live[request.rid] = FakeStream(self, request, script)
        return self.live[request.rid]

    def set_vocabulary(self, tokens: list[bytes]) -> None:
        self.vocabulary, self.has_vocabulary = tokens, True

    def abort(self, rid: str) -> None:
        if rid in self.live:
            self.live[rid].abort()

    def abort_all(self) -> None:
        for rid in list(self.live):
            self.abort(rid)

    def die(self, message: str = "killed by signal 9") -> None:
        """What happens when the worker process is gone."""
        self.state, self.failure = "dead", message
        self.last_words = RequestOutput("", [], "error", error=ErrorInfo("engine_dead", f"the engine worker died: {message}"))
        self.abort_all()
        if self.on_death is not None:
            self.on_death(message)

    async def flush(self) -> int:
        self.flushes += 1
        return 0

    async def stats(self) -> dict[str, float]:
        return {"num_running": float(len(self.live)), "num_waiting": 0.0, "token_usage": 0.25, "preemptions": 3.0}

    async def shutdown(self, timeout: float = 10.0) -> None:
        if self.state != "dead":
            self.state = "closed"
        self.abort_all()


@dataclass
class Harness:
    """A server at `url` and clients for it."""

    url: str
    engine: FakeClient
    service: Service
    http: aiohttp.ClientSession
    sdk: openai.AsyncOpenAI
    runner: web.AppRunner = field(repr=False)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and decoded body."""
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path, headers=headers) as response:
            text = await response.text()
            return response.status, (await response.json()) if response.content_type == "application/json" else text

    async def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The data of every event of a stream."""
        async with self.http.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            raw = (await response.read()).decode()
        return [part.removeprefix("data: ") for part in raw.split("\n\n") if part]


def make_service(engine: FakeClient, folder: Path, **settings: Any) -> Service:
    """A service over a toy checkpoint folder."""
    engine_config = EngineConfig(model=MODEL, max_queued_requests=64, max_running_requests=8)
    server_config = ServerConfig(**settings)
    files = load_model_files(folder, server_config)
    return Service(engine_config, server_config, files, engine)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def serving(
    engine: FakeClient | None = None, *, ping: float = 15.0, stuck: float = 300.0, **settings: Any
) -> AsyncIterator[Harness]:
    """A ready server over the fake engine."""
    engine = engine or FakeClient()
    await engine.start()
    with tempfile.TemporaryDirectory() as name:
        service = make_service(engine, write_folder(Path(name)), **settings)
    service.enter("ready", "")
    runner = web.AppRunner(
        build_app(service, OpenStreams(ping, stuck)), handler_cancellation=True, access_log=None, shutdown_timeout=0.5
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    key = service.config.api_key[0] if service.config.api_key else "none"
    try:
        async with aiohttp.ClientSession() as http, openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0) as sdk:
            yield Harness(url, engine, service, http, sdk, runner)
    finally:
        await runner.cleanup()


def run(scenario: Callable[[Harness], Awaitable[None]], engine: FakeClient | None = None, **settings: Any) -> None:
    """Runs one asynchronous scenario against a fresh server, within two minutes."""

    async def main() -> None:
        async with serving(engine, **settings) as harness:
            await asyncio.wait_for(scenario(harness), 120)

    asyncio.run(main())


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds, for 30 s and more where the machine is busy."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never came true")
