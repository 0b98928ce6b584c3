# SPDX-License-Identifier: Apache-2.0
"""From start to exit: listen, load, warm up, replace a dead worker, drain on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import gc
import ipaddress
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from rocm_infer.config import EngineConfig, SamplingParams, ServerConfig
from rocm_infer.engine.capsule import default_folder
from rocm_infer.engine.client import EngineClient, EngineDied
from rocm_infer.hub import resolve_model
from rocm_infer.server.app import build_app
from rocm_infer.server.call import Call
from rocm_infer.server.errors import ApiError
from rocm_infer.server.service import Service, load_model_files

log = logging.getLogger("rocm_infer.server")

READY_LINE = "The server is fired up and ready to roll!"
WARM_UP_PROMPT = "The capital city of France is"
WARM_UP_TOKENS = 8
CRASH_WINDOW = 60.0  # seconds in which --max-crashes end the server
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds, doubled with every crash in the window
ABORT_TIMEOUT = 1.0  # seconds that the worker gets to end aborted requests before it is killed
CLOSING_TIMEOUT = 5.0  # seconds that open connections get after the last request

ClientFactory = Callable[..., EngineClient]


class GaveUp(RuntimeError):
    """The server cannot go on; the message says why in one sentence."""


def run_server(
    engine: EngineConfig,
    server: ServerConfig,
    *,
    announce: Callable[[str], None],
    make_client: ClientFactory = EngineClient,
) -> int:
    """Serves until a signal comes. Returns the exit code.

    Raises ModelNotFound, TextFileError or ChatError before anything is started.
    """
    path = resolve_model(engine.model)
    tokenizer_path = resolve_model(engine.tokenizer) if engine.tokenizer else None
    files = load_model_files(path, server, tokenizer_path)
    if files.defaults:
        log.info("sampling defaults from generation_config.json: %s (--generation-config none ignores them)", files.defaults)
    log.info("tool calls are read as %s writes them (--tool-call-parser chooses another way)", files.tool_format.name)
    if files.thinks:
        log.info("the chat template knows <think>: thinking is returned as reasoning_content")
    worker = dataclasses.replace(engine, model=str(path))

    def make(on_death: Callable[[str], None] | None = None) -> EngineClient:
        return make_client(
            worker,
            on_death=on_death,
            log_level=server.log_level,
            log_format=server.log_format,
            capsule_dir=_capsule_folder(server),
            capsule_token_ids=server.capsule_token_ids,
        )

    async def main() -> int:
        service = Service(engine, server, files, make())
        gc.collect()
        gc.freeze()  # what is alive now stays alive: later collections need not look at it
        return await serve(service, make, announce)

    return asyncio.run(main())


def _capsule_folder(server: ServerConfig) -> Path | None:
    if server.capsule_dir == "none":
        return None
    return Path(server.capsule_dir) if server.capsule_dir else default_folder()


async def serve(service: Service, make: ClientFactory, announce: Callable[[str], None]) -> int:
    """Listens at once (503 while starting), runs the engine beside it, and drains on SIGTERM or SIGINT."""
    stop, stop_now = _on_signals()
    runner = web.AppRunner(
        build_app(service), handler_cancellation=True, access_log=None, shutdown_timeout=CLOSING_TIMEOUT, keepalive_timeout=75
    )
    await runner.setup()
    try:
        if not await _listen(runner, service):
            return 1
        _warn_if_open(service)
        engine = asyncio.ensure_future(keep_engine(service, make, announce))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({engine, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            stopping.cancel()
            log.error("%s", engine.exception() or "the engine ended")
            return 1
        await _drain(service, stop_now)
        engine.cancel()
        with contextlib.suppress(asyncio.CancelledError, GaveUp):
            await engine
        return 0
    finally:
        await service.client.shutdown()
        await runner.cleanup()


def _on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Two events: the first SIGTERM or SIGINT, and the second."""
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, on_signal)
    return first, second


async def _listen(runner: web.AppRunner, service: Service) -> bool:
    host, port = service.config.host, service.config.port
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            log.error("port %d on %s is in use: stop the program that has it, or choose another with --port", port, host)
        else:
            log.error("cannot listen on %s port %d: %s; check --host and --port", host, port, error)
        return False
    return True


def _warn_if_open(service: Service) -> None:
    host = service.config.host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not service.config.api_key:
        log.warning("listening on %s without --api-key: anyone who reaches this address can use the model", host)


async def keep_engine(service: Service, make: ClientFactory, announce: Callable[[str], None]) -> None:
    """Starts the worker and, when it dies, a new one after a pause. Raises GaveUp at a failed start or repeated crashes."""
    crashes: list[float] = []
    while True:
        died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        service.client = make(on_death=died.set_result)
        try:
            await _start(service)
            service.enter("ready", "")
            if not crashes:
                announce(f"Serving {service.names[0]} on http://{service.config.host}:{service.config.port}")
            announce(READY_LINE)
            reason = await died
        except (EngineDied, ApiError) as error:
            reason = str(error)
            if not crashes:
                raise GaveUp(f"the model could not be started: {reason}") from error
        service.num_crashes += 1
        service.enter("unhealthy", f"the engine worker died: {reason}")
        now = time.monotonic()
        crashes = [*(earlier for earlier in crashes if now - earlier < CRASH_WINDOW), now]
        await service.client.shutdown()
        if len(crashes) >= service.config.max_crashes:
            raise GaveUp(f"the engine worker died {len(crashes)} times within {CRASH_WINDOW:.0f} s, giving up: {reason}")
        pause = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** min(len(crashes) - 1, 10))
        log.error("the engine worker died: %s; a new one starts in %.1f s", reason, pause)
        await asyncio.sleep(pause)


async def _start(service: Service) -> None:
    """Worker up, and one short generation done, as far as the settings ask for it."""
    seconds = {}
    began = time.perf_counter()
    await service.client.start()
    seconds["load"] = time.perf_counter() - began
    if not service.config.skip_server_warmup:
        began = time.perf_counter()
        await _warm_up(service)
        seconds["warmup"] = time.perf_counter() - began
    service.metrics.engine.startup_seconds = seconds


async def _warm_up(service: Service) -> None:
    ids = service.tokenizer.encode(WARM_UP_PROMPT)
    params = SamplingParams(max_tokens=max(1, min(WARM_UP_TOKENS, service.context_len - len(ids))), temperature=0.0)
    generation = service.generate(Call("warm-up"), [ids], [params], 1, timeout=0)
    try:
        await generation.finish()
    finally:
        generation.close()


async def _drain(service: Service, stop_now: asyncio.Event) -> None:
    """Refuses new work, gives running requests their time, then aborts the rest."""
    timeout = service.config.drain_timeout
    service.enter("draining", "it is shutting down")
    log.info("draining: %d requests are running, they have %.0f s", service.num_running, timeout)
    deadline = time.monotonic() + timeout
    while service.num_running and time.monotonic() < deadline and not stop_now.is_set():
        await asyncio.sleep(0.05)
    if service.num_running:
        log.warning("aborting %d requests", service.num_running)
        service.client.abort_all()
        await service.client.shutdown(ABORT_TIMEOUT)
