# SPDX-License-Identifier: Apache-2.0
"""Each mistake that a kernel can make is planted once, and found."""

from __future__ import annotations

import math

import pytest

from tests.hip import planted
from tests.hip.conftest import PLANTED, built

THREADS = 128
OPS = (
    "missing_barrier",
    "reused_array",
    "lds_overrun",
    "memory_overrun",
    "divergent_collective",
    "different_collectives",
    "early_return",
    "wave_of_64",
    "unwritten_lds",
)


def expected(op: str, wave: int) -> list[float]:
    x = [float(i) for i in range(THREADS)]
    return {
        "missing_barrier": x[::-1],
        "reused_array": [3 * sum(x)] * THREADS,
        "lds_overrun": [x[i % 64] for i in range(THREADS)],
        "memory_overrun": [2 * value for value in x],
        "divergent_collective": [x[i // wave * wave] for i in range(THREADS)],
        "different_collectives": [x[i // wave * wave] for i in range(THREADS)],
        "wave_of_64": [sum(x[i // wave * wave : i // wave * wave + wave]) for i in range(THREADS)],
    }.get(op, x)


@pytest.mark.parametrize("wave", [64, 32])
@pytest.mark.parametrize("op", OPS)
def test_without_its_mistake_a_kernel_is_right_in_any_order(bind_folder, planted_folder, op, wave):
    for order in range(4):
        got = planted.run(bind_folder, planted_folder / f"libkernels_w{wave}.so", op, False, threads=THREADS, order=order)
        assert got == expected(op, wave)


@pytest.mark.parametrize("wave", [64, 32])
@pytest.mark.parametrize(
    ("op", "message"),
    [
        (
            "divergent_collective",
            r"shfl at .*planted.hip:\d+: lane \d+ of wave 0 \(thread \d+, block \(0, 0, 0\)\) does not take part",
        ),
        (
            "different_collectives",
            r"lanes of wave 0 \(block \(0, 0, 0\)\) meet different collectives: thread \d+ shfl at .*planted.hip:\d+",
        ),
        ("early_return", r"sync at .*planted.hip:\d+: thread 127 of block \(0, 0, 0\) does not arrive; it has ended"),
    ],
)
def test_what_would_hang_is_an_error_that_says_where(bind_folder, planted_folder, op, message, wave):
    with pytest.raises(RuntimeError, match=message):
        planted.run(bind_folder, planted_folder / f"libkernels_w{wave}.so", op, True, threads=THREADS)


@pytest.mark.parametrize("op", ["missing_barrier", "reused_array"])
def test_the_order_of_threads_shows_a_missing_barrier(bind_folder, planted_folder, op):
    library = planted_folder / "libkernels_w64.so"
    results = [planted.run(bind_folder, library, op, True, threads=THREADS, order=order) for order in range(6)]
    # What was not there yet is NaN, which equals nothing.
    assert any(result != expected(op, 64) for result in results)


def test_64_written_for_the_wave_size_is_wrong_where_waves_have_32(bind_folder, planted_folder):
    small, large = (
        planted.run(bind_folder, planted_folder / f"libkernels_w{wave}.so", "wave_of_64", True) for wave in (32, 64)
    )
    assert large == expected("wave_of_64", 64)
    assert small != expected("wave_of_64", 32)


def test_lds_that_nobody_wrote_is_nan(bind_folder, planted_folder):
    got = planted.run(bind_folder, planted_folder / "libkernels_w64.so", "unwritten_lds", True, threads=THREADS)
    assert [i for i, value in enumerate(got) if math.isnan(value)] == [5]


@pytest.mark.parametrize("op", ["lds_overrun", "memory_overrun"])
def test_the_address_sanitizer_finds_an_overrun(bind_folder, sanitized, op):
    folder = built(("kernels_w64",), "hip-planted-address", sources=(PLANTED,), sanitize="address")
    command = ["-m", "tests.hip.planted", str(bind_folder), str(folder / "libkernels_w64.so"), op]
    right = sanitized("address", [*command, "0"])
    assert right.returncode == 0, right.stderr[-3000:]
    wrong = sanitized("address", [*command, "1"])
    assert wrong.returncode != 0
    assert f"{op}_kernel" in wrong.stderr, wrong.stderr[-3000:]
    assert "AddressSanitizer" in wrong.stderr or "runtime error" in wrong.stderr


@pytest.mark.parametrize("op", ["missing_barrier", "reused_array"])
def test_the_thread_sanitizer_finds_a_race_in_lds(bind_folder, sanitized, op):
    folder = built(("kernels_w64",), "hip-planted-thread", sources=(PLANTED,), sanitize="thread")
    command = ["-m", "tests.hip.planted", str(bind_folder), str(folder / "libkernels_w64.so"), op]
    right = sanitized("thread", [*command, "0"])
    assert right.returncode == 0, right.stderr[-3000:]
    wrong = sanitized("thread", [*command, "1"])
    assert wrong.returncode == 66, wrong.stderr[-3000:]
    assert "data race" in wrong.stderr
    assert "planted.hip" in wrong.stderr
