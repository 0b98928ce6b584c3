# SPDX-License-Identifier: Apache-2.0
"""The process that owns an engine: `python -m rocm_infer.engine.worker --socket ipc://...`, started by `EngineClient`.

The first line of stdin is the EngineConfig as JSON. After that stdin says only one thing: when it closes, the parent is gone
and so must we be. Signals are the parent's business.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zmq

from rocm_infer.config import EngineConfig
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import (
    EXIT_HUNG,
    AbortRequest,
    AddRequest,
    CacheFlushed,
    Fatal,
    FlushCache,
    FromWorker,
    GetStats,
    Outputs,
    Ready,
    RequestOutput,
    Shutdown,
    Stats,
    ToWorker,
    decode_to_worker,
    encode,
)
from rocm_infer.engine.request import RequestRefused

logger = logging.getLogger(__name__)

EXIT_FATAL = 1


class UnusableModel(Exception):
    """The settings or the checkpoint are at fault; the message tells the user what to do."""


class Worker:
    """Messages in, steps, messages out, until Shutdown."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self.engine = engine
        self.socket = socket
        self.refused: list[RequestOutput] = []
        self.step_started: float | None = None  # read by the watchdog

    def serve(self) -> None:
        """Run until told to stop. Waits for messages only when there is nothing to compute."""
        while True:
            for message in self._receive(wait=not self.engine.has_work):
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            self.step_started = time.monotonic()
            outputs = self.refused + self.engine.step()
            self.step_started = None
            self.refused = []
            if outputs:
                self._send(Outputs(outputs))

    def _receive(self, wait: bool) -> Iterator[ToWorker]:
        if wait:
            yield decode_to_worker(self.socket.recv())
        while self.socket.poll(0):
            yield decode_to_worker(self.socket.recv())

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, AddRequest):
            self._add(message)
        elif isinstance(message, AbortRequest):
            self.engine.abort(message.rid)
        elif isinstance(message, FlushCache):
            self._send(CacheFlushed(message.id, self.engine.flush()))
        elif isinstance(message, GetStats):
            self._send(Stats(message.id, self.engine.stats()))

    def _add(self, request: AddRequest) -> None:
        try:
            self.engine.add(request)
        except RequestRefused as refusal:
            num_prompt = len(request.prompt_ids)
            self.refused.append(RequestOutput(request.rid, [], "error", num_prompt=num_prompt, error=refusal.info))

    def _send(self, message: FromWorker) -> None:
        self.socket.send(encode(message))


def main(argv: list[str] | None = None, make_engine: Callable[[EngineConfig], Engine] = Engine) -> int:
    """Entry point. Returns the exit status; failures are told to the parent in a Fatal message first."""
    parser = argparse.ArgumentParser(description="engine worker process; started by the server")
    parser.add_argument("--socket", required=True, help="ZeroMQ address of the parent")
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    threading.Thread(target=_leave_with_parent, args=(args.socket,), daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        socket.linger = 2000
        socket.connect(args.socket)
        try:
            _serve(config, make_engine, socket)
        except UnusableModel as error:
            logger.error("%s", error)
            socket.send(encode(Fatal(str(error))))
            return EXIT_FATAL
        except Exception as error:
            logger.exception("the engine worker stops")
            socket.send(encode(Fatal(f"{type(error).__name__}: {error}")))
            return EXIT_FATAL
    return 0


def _serve(config: EngineConfig, make_engine: Callable[[EngineConfig], Engine], socket: zmq.Socket[bytes]) -> None:
    try:
        engine = make_engine(config)
    except (ValueError, OSError) as error:
        logger.debug("loading failed", exc_info=True)
        raise UnusableModel(str(error)) from error
    worker = Worker(engine, socket)
    threading.Thread(target=_watch_steps, args=(worker, config.step_timeout), daemon=True).start()
    gc.collect()
    gc.freeze()  # what is alive now stays alive: later collections need not look at it
    socket.send(encode(Ready(engine.info)))
    worker.serve()


def _leave_with_parent(address: str) -> None:
    """End the process when stdin closes, which is when the parent ends, however it ends; remove the socket it left."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    path = Path(address.removeprefix("ipc://"))
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()
    os._exit(EXIT_FATAL)


def _watch_steps(worker: Worker, timeout: float) -> None:
    """End the process when one step takes longer than `timeout` seconds: a hung device gives no other sign."""
    while True:
        time.sleep(min(1.0, timeout / 4))
        started = worker.step_started
        if started is not None and time.monotonic() - started > timeout:
            logger.critical("a step takes longer than step_timeout (%g s); the worker ends itself", timeout)
            os._exit(EXIT_HUNG)


if __name__ == "__main__":
    sys.exit(main())
