# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: errors before the first byte stay HTTP errors, idle streams get comments, stuck readers are cut."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from rocm_infer.server.call import Call
from rocm_infer.server.errors import ApiError, internal_error

log = logging.getLogger("rocm_infer.server")

HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(data)


def openai_error(error: ApiError) -> bytes:
    return event(error.encode())


class OpenStreams:
    """All event streams of one server, watched by one task: no timer per token."""

    def __init__(self, ping_interval: float = 15.0, stuck_timeout: float = 300.0) -> None:
        self.ping_interval = ping_interval
        self.stuck_timeout = stuck_timeout
        self._open: set[EventStream] = set()

    def add(self, stream: EventStream) -> None:
        self._open.add(stream)

    def discard(self, stream: EventStream) -> None:
        self._open.discard(stream)

    async def watch(self) -> None:
        """Pings streams that were silent for an interval; cuts those whose reader has taken nothing for too long."""
        while True:
            await asyncio.sleep(self.ping_interval / 3)
            now = time.monotonic()
            for stream in list(self._open):
                stream.look_after(now)


class EventStream:
    """One response in the making. `done` ends it; `as_event` writes what breaks it off."""

    def __init__(
        self,
        request: web.Request,
        streams: OpenStreams,
        *,
        done: bytes = DONE,
        as_event: Callable[[ApiError], bytes] = openai_error,
    ) -> None:
        self._request = request
        self._done = done
        self._as_event = as_event
        self._streams = streams
        self._response = web.StreamResponse(headers=HEADERS)
        self._last_write = time.monotonic()
        self._writing = False
        self._ping: asyncio.Task[None] | None = None

    async def run(self, events: AsyncIterator[bytes], call: Call) -> web.StreamResponse:
        """Sends `events` and `done`. Headers go out with the first event, or after one ping interval without any.

        An ApiError before that propagates; later it becomes one error event and the connection ends without `done`.
        """
        first = asyncio.ensure_future(anext(events, None))
        try:
            await asyncio.wait({first}, timeout=self._streams.ping_interval)
            if first.done():
                first.result()
            await self._response.prepare(self._request)
            self._streams.add(self)
            await self._send_all(first, events, call)
            await self._response.write_eof()
        finally:
            first.cancel()
            self._streams.discard(self)
        return self._response

    async def _send_all(self, first: asyncio.Future[bytes | None], events: AsyncIterator[bytes], call: Call) -> None:
        try:
            data = await first
            if data:
                await self._write(data)
            async for data in events:
                await self._write(data)
            if self._done:
                await self._write(self._done)
        except ApiError as error:
            await self._fail(error)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("request %s failed while streaming", call.id)
            await self._fail(internal_error(call.id))

    async def _fail(self, error: ApiError) -> None:
        await self._write(self._as_event(error))

    async def _write(self, data: bytes) -> None:
        self._writing = True
        await self._response.write(data)
        self._writing = False
        self._last_write = time.monotonic()

    def look_after(self, now: float) -> None:
        silent = now - self._last_write
        if self._writing:
            if silent > self._streams.stuck_timeout and self._request.transport is not None:
                log.warning("a reader took nothing for %.0f s: closing its connection", silent)
                self._request.transport.abort()
        elif silent >= self._streams.ping_interval:
            self._last_write = now
            self._ping = asyncio.ensure_future(self._response.write(PING))
