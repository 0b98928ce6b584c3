# SPDX-License-Identifier: Apache-2.0
"""Traces of an engine's steps by torch's profiler, in Chrome's format (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from rocm_infer.engine.messages import Profiled, StartProfile

logger = logging.getLogger(__name__)

MAX_STEPS = 1000  # of one trace; torch keeps every event in memory until the end


class Profiler:
    """At most one trace at a time; `count_step` after every step of the engine."""

    def __init__(self) -> None:
        self._trace: torch.profiler.profile | None = None
        self._path = Path()
        self._steps_left = 0

    def start(self, ask: StartProfile) -> Profiled:
        """Begin to trace."""
        if self._trace is not None:
            return Profiled(ask.id, error=f"a profile is running already, into {self._path}; stop it first")
        activities = []
        if "CPU" in ask.activities:
            activities.append(torch.profiler.ProfilerActivity.CPU)
        if "GPU" in ask.activities and torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if not activities:
            return Profiled(
                ask.id, error=f"nothing to trace: this machine has no GPU, and activities are {list(ask.activities)}"
            )
        self._path = Path(ask.path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("x").close()
        except OSError as error:
            return Profiled(ask.id, error=f"the trace cannot be written: {error}")
        self._steps_left = min(ask.num_steps or MAX_STEPS, MAX_STEPS)
        self._trace = torch.profiler.profile(activities=activities, with_stack=ask.with_stack, record_shapes=ask.record_shapes)
        self._trace.start()
        return Profiled(ask.id, ask.path)

    def count_step(self) -> None:
        """One more step is done; the last one that was asked for ends the trace."""
        if self._trace is None:
            return
        self._steps_left -= 1
        if self._steps_left == 0:
            done = self.stop(0)
            logger.info("profile: %s", done.error or f"the trace is in {done.path}")

    def stop(self, number: int) -> Profiled:
        """End the trace and write it."""
        if self._trace is None:
            last = f"; the last one is in {self._path}" if self._path.name else ""
            return Profiled(number, error=f"no profile is running{last}")
        trace, self._trace = self._trace, None
        try:
            trace.stop()
            trace.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            return Profiled(number, error=f"the trace could not be written: {error}")
        return Profiled(number, str(self._path))
