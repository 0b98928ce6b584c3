# SPDX-License-Identifier: Apache-2.0
"""Timing that survives a busy machine: candidates take turns within one run, medians are compared, the device is named."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, the device idle before and after."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call: each round calls each function once, so that a disturbance meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warmup + rounds):
        for name, function in functions.items():
            taken = seconds(function)
            if index >= warmup:
                times[name].append(taken)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of slow / fast: how many times faster `fast` is."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def read_bandwidth(num_bytes: int = 1 << 29) -> float:
    """Bytes per second that all threads together read from memory, the best of several passes over `num_bytes`."""
    data = torch.ones(num_bytes // 4, dtype=torch.int32)
    return data.nbytes / min(seconds(data.max) for _ in range(8))


def matmul_rate(dtype: torch.dtype = torch.bfloat16, size: int = 2048) -> float:
    """Operations per second of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(8))


def device_name() -> str:
    """The CPU as the system names it, with the threads torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
