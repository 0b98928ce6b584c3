# SPDX-License-Identifier: Apache-2.0
"""Timing that survives a busy machine: candidates take turns within one run, medians are compared, the device is named."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, the device idle before and after."""
    wait()
    start = time.perf_counter()
    function()
    wait()
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


def device_seconds(
    calls: Sequence[Callable[[], object]], rounds: int, warmup: int = 3, *, capture: bool = True
) -> tuple[float, bool]:
    """(median seconds of one call, whether they were captured into a graph), between events of the GPU around all of `calls`.

    A graph leaves the host out. Calls that read the device while they run cannot be captured (capture=False spares the try): then
    the host's time counts too.
    """
    if not torch.cuda.is_available():
        return statistics.median(seconds(functools.partial(_all, calls)) for _ in range(rounds)) / len(calls), False
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, allocates
        torch.cuda.synchronize()
        replay, captured = _captured(calls, stream) if capture else (functools.partial(_all, calls), False)
        times = []
        for index in range(warmup + rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            replay()
            end.record(stream)
            end.synchronize()
            if index >= warmup:
                times.append(start.elapsed_time(end) / 1e3)
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times) / len(calls), captured


def _captured(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> tuple[Callable[[], object], bool]:
    """A function that makes all calls, from a captured graph if that works."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return functools.partial(_all, calls), False
    return graph.replay, True


def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def about_gpu(device: torch.device) -> dict[str, str]:
    """The device by name, and what compiles and drives its kernels."""
    import triton

    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "runtime": runtime,
    }


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


def wait() -> None:
    """Until the GPU, if there is one, has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
