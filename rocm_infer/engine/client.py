# SPDX-License-Identifier: Apache-2.0
"""The server's side of the process border: starts the engine worker and talks to it from asyncio. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq
import zmq.asyncio

from rocm_infer.config import EngineConfig
from rocm_infer.engine.capsule import History, make_capsule, write_capsule
from rocm_infer.engine.messages import (
    STACKS,
    AbortRequest,
    AddRequest,
    CacheFlushed,
    ErrorCode,
    ErrorInfo,
    Fatal,
    FinishReason,
    FlushCache,
    FromWorker,
    GetStats,
    Outputs,
    Profiled,
    Ready,
    RequestOutput,
    SetVocabulary,
    Shutdown,
    StartProfile,
    Stats,
    StopProfile,
    ToWorker,
    decode_from_worker,
    encode,
    merged,
)
from rocm_infer.engine.recorder import FILE_NAME, Recording

logger = logging.getLogger(__name__)

ClientState = Literal["new", "starting", "ready", "dead", "closed"]

WORKER = (sys.executable, "-m", "rocm_infer.engine.worker")
MAX_SOCKET_PATH = 100  # bytes; the kernel's limit for a local socket is 107
MAX_STACKS = 1 << 20  # bytes of stacks that are read
STACKS_SECONDS = 1.0  # that a hung worker gets to write its stacks


class EngineDied(RuntimeError):
    """The worker process is not there; the message says why."""


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one request: `async for output in stream`. The last one carries `finish_reason`.

    It never raises for what happens to the request: refusals ("queue_full", "context_length_exceeded", ...), failures and the
    death of the worker are an output with `finish_reason == "error"` and `error` set. A reader that falls behind finds the
    outputs of several steps as one: what waits for it is never more than the tokens of the request. One reader at a time.
    """

    def __init__(self, rid: str, abort: Callable[[str], None]) -> None:
        self.rid = rid
        self.is_finished = False  # the last output has been handed over to the stream
        self._abort = abort
        self._is_exhausted = False
        self._next: RequestOutput | None = None
        self._reader: asyncio.Future[None] | None = None

    async def __anext__(self) -> RequestOutput:
        if self._is_exhausted:
            raise StopAsyncIteration
        while (output := self._next) is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._next = None
        self._is_exhausted = output.finish_reason is not None
        return output

    def close(self) -> None:
        """Abort the request unless it has ended; call it when the consumer goes away. May be called more than once."""
        if not self.is_finished:
            self._abort(self.rid)

    def put(self, output: RequestOutput) -> None:
        """Hand over an output; for the client."""
        self.is_finished = output.finish_reason is not None
        self._next = output if self._next is None else merged(self._next, output)
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)


class EngineClient:
    """One engine worker process, seen from one asyncio loop.

    `on_death(message)` is called once, in the loop, when a worker that was ready is gone without having been asked to. `start`
    may then be called again. Such a death leaves a capsule in `capsule_dir` (None: it does not), with token ids only if asked for.
    A worker that does not begin a step for `config.step_timeout` seconds while requests are alive is killed; the stacks of both
    processes go to the log first.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_death: Callable[[str], None] | None = None,
        command: Sequence[str] = WORKER,
        log_level: str = "info",
        log_format: str = "text",
        capsule_dir: Path | None = None,
        capsule_token_ids: bool = False,
    ) -> None:
        self.config = config
        self.state: ClientState = "new"
        self.info: dict[str, Any] = {}  # Engine.info, once ready
        self.failure: str | None = None  # why the worker is dead
        self.has_vocabulary = False  # whether the worker has what grammars need
        self.capsule: Path | None = None  # what the last dead worker left
        self._on_death = on_death
        self._command = (*command, "--log-level", log_level, "--log-format", log_format)
        self._streams: dict[str, RequestStream] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._reply_ids = itertools.count()
        self._fatal: str | None = None
        self._capsule_dir = capsule_dir
        self._capsule_token_ids = capsule_token_ids
        self._history = History()
        self._owed: set[str] = set()  # requests whose end the worker has not told, expired ones included
        self._busy_since = 0.0
        self._max_requests = config.max_running_requests + config.max_queued_requests

    async def start(self) -> dict[str, Any]:
        """Start the worker, wait until it is ready, return `Engine.info`. Raises EngineDied with the worker's reason."""
        if self.state not in ("new", "dead"):
            raise EngineDied(f"the engine cannot be started when it is {self.state}")
        self.state, self.failure, self._fatal = "starting", None, None
        self.has_vocabulary = False
        self._folder = tempfile.mkdtemp(prefix="rocm-infer-")
        address = f"ipc://{self._folder}/engine"
        if len(os.fsencode(address)) > MAX_SOCKET_PATH:
            self._clean_up()
            self.state = "dead"
            raise EngineDied(f"the path of the engine's socket is too long: {address}; set TMPDIR to a shorter folder")
        self._recording = Recording(Path(self._folder, FILE_NAME))
        self._history = History()
        self._owed = set()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        try:
            # Its own session: a Ctrl-C in the terminal is for the server, which decides what becomes of the worker.
            self._process = await asyncio.create_subprocess_exec(
                *self._command, "--socket", address, stdin=asyncio.subprocess.PIPE, start_new_session=True
            )
        except BaseException as error:
            self.state, self.failure = "dead", f"the engine process could not be started: {error}"
            self._close()
            if isinstance(error, OSError):
                raise EngineDied(self.failure) from error
            raise
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self.config) + b"\n")
        self._receiver = asyncio.create_task(self._receive())
        self._watcher = asyncio.create_task(self._watch())
        self._watchdog = asyncio.create_task(self._watch_beats())
        return await asyncio.shield(self._ready)

    def add(self, request: AddRequest) -> RequestStream:
        """Send a request at once and return its outputs. Raises nothing: see `RequestStream`."""
        stream = RequestStream(request.rid, self.abort)
        if self.state != "ready":
            self._fail(stream, "engine_dead", self.failure or f"the engine is {self.state}")
        elif request.rid in self._streams:
            self._fail(stream, "duplicate_request_id", "this id is in use; choose another")
        elif len(self._streams) >= self._max_requests:  # known here already, whatever the worker is busy with
            self._fail(stream, "queue_full", f"{len(self._streams)} requests are running or waiting, the most allowed")
        else:
            if not self._owed:
                self._busy_since = time.monotonic()
            self._owed.add(request.rid)
            self._streams[request.rid] = stream
            if self._capsule_dir is not None:
                self._history.add(request)
            self._send(request)
        return stream

    def set_vocabulary(self, tokens: list[bytes]) -> None:
        """Tell the worker the bytes of each token (empty: no text); requests with a grammar need it."""
        if self.state == "ready":
            self._send(SetVocabulary(tokens))
            self.has_vocabulary = True

    def abort(self, rid: str) -> None:
        """Abort a request; its stream ends with finish_reason "abort". An unknown rid is ignored."""
        if self.state == "ready" and rid in self._streams:
            self._send(AbortRequest(rid))

    def expire(self, rid: str, seconds: float) -> None:
        """End a request at its deadline: its stream gets the error "timeout" at once, whatever the worker is doing."""
        self.abort(rid)
        stream = self._streams.pop(rid, None)
        if stream is not None:
            self._fail(stream, "timeout", f"not finished within {seconds:g} seconds")

    def abort_all(self) -> None:
        """Abort every request."""
        for rid in self._streams:
            self.abort(rid)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def flush(self) -> int:
        """Drop cached prefixes that no running request uses; returns the number of pages freed. Raises EngineDied."""
        num_pages: int = await self._ask(FlushCache)
        return num_pages

    async def stats(self) -> dict[str, float]:
        """`Engine.stats()` of the worker. Raises EngineDied."""
        values: dict[str, float] = await self._ask(GetStats)
        return values

    async def start_profile(self, path: Path, num_steps: int, activities: tuple[str, ...], **options: bool) -> Profiled:
        """Trace the next steps of the worker; `options`: with_stack, record_shapes. Raises EngineDied."""
        reply: Profiled = await self._ask(lambda number: StartProfile(number, str(path), num_steps, activities, **options))
        return reply

    async def stop_profile(self) -> Profiled:
        """End the trace; returns when it is written. Raises EngineDied."""
        reply: Profiled = await self._ask(StopProfile)
        return reply

    async def shutdown(self, timeout: float = 10.0) -> None:
        """Stop the worker (killed after `timeout` seconds) and remove the socket. Open streams end with "abort"."""
        was_alive = self.state in ("starting", "ready")
        if self.state == "starting":
            self._ready.cancel()
            self._process.kill()
        elif self.state == "ready":
            self._send(Shutdown())
        self.state = "closed"
        if was_alive:
            try:
                await asyncio.wait_for(asyncio.shield(self._watcher), timeout)
            except asyncio.TimeoutError:
                self._process.kill()
                await self._watcher

    def _send(self, message: ToWorker) -> None:
        self._socket.send(encode(message))

    async def _ask(self, question: Callable[[int], ToWorker]) -> Any:
        if self.state != "ready":
            raise EngineDied(self.failure or f"the engine is {self.state}")
        number = next(self._reply_ids)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        self._send(question(number))
        try:
            return await reply
        finally:
            self._replies.pop(number, None)

    async def _receive(self) -> None:
        try:
            while True:
                self._handle(decode_from_worker(await self._socket.recv()))
        except Exception as error:  # nobody else would notice that answers no longer arrive
            logger.exception("a message of the engine could not be handled")
            self._kill(f"a message of the engine could not be handled: {type(error).__name__}: {error}")

    def _handle(self, message: FromWorker) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                self._hand_over(output)
        elif isinstance(message, Ready):
            self.info, self.state = message.info, "ready"
            if not self._ready.done():
                self._ready.set_result(message.info)
        elif isinstance(message, Fatal):
            self._fatal = message.message
        else:
            reply = self._replies.get(message.id)
            if reply is not None and not reply.done():
                reply.set_result(_answer(message))

    def _hand_over(self, output: RequestOutput) -> None:
        self._history.note(output)
        if output.finish_reason is not None:
            self._owed.discard(output.rid)
        stream = self._streams.get(output.rid)
        if stream is not None:
            stream.put(output)
            if stream.is_finished:
                del self._streams[output.rid]

    async def _watch(self) -> None:
        """Wait for the worker to end, read what it said last, and tell everybody who waits for it."""
        status = await self._process.wait()
        self._watchdog.cancel()
        await asyncio.sleep(0.05)  # the receiver gets what was still in the socket
        self._receiver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiver
        reason = self._fatal or self._describe_exit(status)
        if self.state == "ready" and self._capsule_dir is not None:
            self._leave_capsule(reason, self._capsule_dir)
        self._close()
        self._mourn(reason)

    async def _watch_beats(self) -> None:
        """Kill a worker that shows no sign of life while it has work: a hung device gives no other sign."""
        timeout = self.config.step_timeout
        while True:
            await asyncio.sleep(min(1.0, timeout / 4))
            silent = time.monotonic() - max(self._recording.last_beat(), self._busy_since)
            if self.state == "ready" and self._owed and silent > timeout:
                reason = f"a step took longer than step_timeout ({timeout:g} s)"
                await self._log_stacks(reason)
                self._kill(reason)
                return

    def _kill(self, reason: str) -> None:
        self._fatal = reason
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self._process.kill()

    async def _log_stacks(self, reason: str) -> None:
        """The stacks of the hung worker and of this process, to the log."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + STACKS_SECONDS
        while not self._read_stacks() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)  # for the rest of what it is writing
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            own = file.read().decode(errors="replace")
        logger.critical(
            "%s\nstacks of the engine process %d:\n%s\nstacks of this process %d:\n%s",
            reason,
            self._process.pid,
            self._read_stacks() or "it did not answer",
            os.getpid(),
            own,
        )

    def _read_stacks(self) -> str:
        try:
            with open(os.path.join(self._folder, STACKS), "rb") as file:
                return file.read(MAX_STACKS).decode(errors="replace")
        except OSError:
            return ""

    def _leave_capsule(self, reason: str, folder: Path) -> None:
        try:
            capsule = make_capsule(
                reason=reason,
                config=self.config,
                info=self.info,
                steps=self._recording.steps(),
                requests=self._history.entries(),
                stacks=self._read_stacks(),
                with_token_ids=self._capsule_token_ids,
            )
            self.capsule = write_capsule(capsule, folder)
        except Exception as error:  # whoever waits for the dead worker must be told nevertheless
            logger.error("the last steps of the engine could not be written to %s: %r", folder, error)
        else:
            logger.error("the last steps of the engine are in %s; `rocm-infer replay` repeats them", self.capsule)

    def _describe_exit(self, status: int) -> str:
        if status >= 0:
            return f"the engine process exited with status {status}"
        hint = "; the system does that when memory runs out" if -status == signal.SIGKILL else ""
        return f"the engine process was killed by signal {-status} ({signal.strsignal(-status)}{hint})"

    def _mourn(self, reason: str) -> None:
        was_ready, was_asked = self.state == "ready", self.state == "closed"
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            if was_asked:
                stream.put(RequestOutput(stream.rid, [], "abort"))
            else:
                self._fail(stream, "engine_dead", reason)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineDied(reason))
        if not was_asked:
            self.state, self.failure = "dead", reason
        if not self._ready.done():
            self._ready.set_exception(EngineDied(reason))
        if was_ready and self._on_death is not None:
            asyncio.get_running_loop().call_soon(self._on_death, reason)

    def _fail(self, stream: RequestStream, code: ErrorCode, reason: str) -> None:
        finish: FinishReason = "error"
        stream.put(RequestOutput(stream.rid, [], finish, error=ErrorInfo(code, f"request {stream.rid}: {reason}")))

    def _close(self) -> None:
        self._socket.close()
        self._context.term()
        self._recording.close()
        self._clean_up()

    def _clean_up(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _answer(reply: CacheFlushed | Stats | Profiled) -> Any:
    """What a reply says."""
    if isinstance(reply, CacheFlushed):
        return reply.num_pages
    return reply.values if isinstance(reply, Stats) else reply
