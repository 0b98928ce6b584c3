# SPDX-License-Identifier: Apache-2.0
"""The process that owns an engine: `python -m rocm_infer.engine.worker --socket ipc://...`, started by `EngineClient`.

The first line of stdin is the EngineConfig as JSON. After that stdin says only one thing: when it closes, the parent is gone
and so must we be. Signals are the parent's business.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zmq

from rocm_infer.config import EngineConfig
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import (
    STACKS,
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
    SetVocabulary,
    Shutdown,
    StartProfile,
    Stats,
    StopProfile,
    ToWorker,
    decode_to_worker,
    encode,
)
from rocm_infer.engine.profiler import Profiler
from rocm_infer.engine.recorder import FILE_NAME, Recorder
from rocm_infer.engine.request import RequestRefused
from rocm_infer.logs import handler_of

logger = logging.getLogger("rocm_infer.engine.worker")  # run as a script, __name__ is another

EXIT_FATAL = 1


class UnusableModel(Exception):
    """The settings or the checkpoint are at fault; the message tells the user what to do."""


class Worker:
    """Messages in, steps, messages out, until Shutdown."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], recorder: Recorder) -> None:
        self.engine = engine
        self.socket = socket
        self.recorder = recorder
        self.profiler = Profiler()
        self.refused: list[RequestOutput] = []

    def serve(self) -> None:
        """Run until told to stop. Waits for messages only when there is nothing to compute."""
        while True:
            for message in self._receive(wait=not self.engine.has_work):
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            self.recorder.beat()
            has_work = self.engine.has_work
            outputs = self.refused + self.engine.step()
            self.refused = []
            if has_work:
                self.profiler.count_step()
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
        elif isinstance(message, SetVocabulary):
            self.engine.set_vocabulary(message.tokens)
        elif isinstance(message, FlushCache):
            self._send(CacheFlushed(message.id, self.engine.flush()))
        elif isinstance(message, GetStats):
            self._send(Stats(message.id, self.engine.stats()))
        elif isinstance(message, StartProfile):
            self._send(self.profiler.start(message))
        elif isinstance(message, StopProfile):
            self._send(self.profiler.stop(message.id))

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
    parser.add_argument("--log-format", default="text")
    args = parser.parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler_of(args.log_format)])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    folder = Path(args.socket.removeprefix("ipc://")).parent
    threading.Thread(target=_leave_with_parent, args=(folder,), daemon=True).start()
    _tell_stacks(folder / STACKS)
    _be_chosen_when_memory_runs_out()
    recorder = Recorder(folder / FILE_NAME)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        socket.linger = 2000
        socket.connect(args.socket)
        try:
            _serve(config, make_engine, socket, recorder)
        except UnusableModel as error:
            logger.error("%s", error)
            socket.send(encode(Fatal(str(error))))
            return EXIT_FATAL
        except Exception as error:
            logger.exception("the engine worker stops")
            socket.send(encode(Fatal(f"{type(error).__name__}: {error}")))
            return EXIT_FATAL
    return 0


def _serve(
    config: EngineConfig, make_engine: Callable[[EngineConfig], Engine], socket: zmq.Socket[bytes], recorder: Recorder
) -> None:
    try:
        engine = make_engine(config)
    except (ValueError, OSError) as error:
        logger.debug("loading failed", exc_info=True)
        raise UnusableModel(str(error)) from error
    engine.recorder = recorder
    worker = Worker(engine, socket, recorder)
    gc.collect()
    gc.freeze()  # what is alive now stays alive: later collections need not look at it
    socket.send(encode(Ready(engine.info)))
    worker.serve()


def _leave_with_parent(folder: Path) -> None:
    """End the process when stdin closes, which is when the parent ends, however it ends; remove the folder it left."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(EXIT_FATAL)


def _tell_stacks(path: Path) -> None:
    """Write the stacks of all threads to a file when a fault ends the process, and at SIGUSR2, which the parent sends to a
    worker that hangs. Both work without the interpreter's lock, so also where a library call never returns."""
    file = path.open("w")
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR2, file)


def _be_chosen_when_memory_runs_out() -> None:
    """The kernel should end this process, which is replaced, and not the server, which is not."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


if __name__ == "__main__":
    sys.exit(main())
