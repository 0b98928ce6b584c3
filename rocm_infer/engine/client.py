# SPDX-License-Identifier: Apache-2.0
"""The server's side of the process border: starts the engine worker and talks to it from asyncio. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from rocm_infer.config import EngineConfig
from rocm_infer.engine.messages import AddRequest, RequestOutput

ClientState = Literal["new", "starting", "ready", "dead", "closed"]


class EngineDied(RuntimeError):
    """The worker process is not there; the message says why."""


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one request: `async for output in stream`. The last one carries `finish_reason`.

    It never raises for what happens to the request: refusals ("queue_full", "context_length_exceeded", ...), failures and the
    death of the worker are an output with `finish_reason == "error"` and `error` set.
    """

    async def __anext__(self) -> RequestOutput:
        raise NotImplementedError

    def close(self) -> None:
        """Abort the request unless it has ended; call it when the consumer goes away. May be called more than once."""
        raise NotImplementedError


class EngineClient:
    """One engine worker process, seen from one asyncio loop.

    `on_death(message)` is called once, in the loop, when a worker that was ready is gone without having been asked to.
    """

    def __init__(self, config: EngineConfig, *, on_death: Callable[[str], None] | None = None) -> None:
        self.config = config
        self.state: ClientState = "new"
        self.info: dict[str, Any] = {}  # Engine.info, once ready
        self.failure: str | None = None  # why the worker is dead

    async def start(self) -> dict[str, Any]:
        """Start the worker, wait until it is ready, return `Engine.info`. Raises EngineDied with the worker's reason."""
        raise NotImplementedError

    def add(self, request: AddRequest) -> RequestStream:
        """Send a request at once and return its outputs. Raises nothing: see `RequestStream`."""
        raise NotImplementedError

    def abort(self, rid: str) -> None:
        """Abort a request; its stream ends with finish_reason "abort". An unknown rid is ignored."""
        raise NotImplementedError

    def abort_all(self) -> None:
        """Abort every request."""
        raise NotImplementedError

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        raise NotImplementedError

    async def flush(self) -> int:
        """Drop cached prefixes that no running request uses; returns the number of pages freed. Raises EngineDied."""
        raise NotImplementedError

    async def stats(self) -> dict[str, float]:
        """`Engine.stats()` of the worker. Raises EngineDied."""
        raise NotImplementedError

    async def shutdown(self, timeout: float = 10.0) -> None:
        """Stop the worker (killed after `timeout` seconds) and remove the socket. Open streams end with "abort"."""
        raise NotImplementedError
