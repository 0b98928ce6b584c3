# SPDX-License-Identifier: Apache-2.0
"""Builds that the tests of the HIP side share, and processes under a sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rocm_infer.hip import build
from rocm_infer.hip.build import ROOT

PLANTED = Path(__file__).parent / "planted.hip"
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "PYTHONMALLOC": "malloc",  # small buffers of Python's own allocator have no borders
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66 report_thread_leaks=0",
}


def built(goals: tuple[str, ...], name: str, **options: object) -> Path:
    """The folder of a build, or a skip with the reason why there is none."""
    try:
        return build.build(goals, ROOT / "build" / name, **options)
    except build.BuildError as error:
        pytest.skip(f"{name} cannot be built here: {error}")


@pytest.fixture(scope="session")
def bind_folder() -> Path:
    """Where the Python module that calls libraries lies."""
    return built(("host", "bind"), "hip")


@pytest.fixture(scope="session")
def planted_folder() -> Path:
    return built(("host",), "hip-planted", sources=(PLANTED,))


def sanitizer_runtimes(kind: str) -> list[str]:
    """Paths of the sanitizer's libraries; a skip if the host compiler has none that Python could preload."""
    cxx = build.find_tools().cxx
    found = []
    for name in RUNTIMES[kind]:
        asked = [*cxx, f"-print-file-name={name}"]
        path = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() if cxx else ""
        if not Path(path).is_absolute() or not Path(path).exists():
            pytest.skip(f"the host compiler {' '.join(cxx)} has no {name}; g++ does")
        found.append(str(Path(path).resolve()))
    return found


Sanitized = Callable[[str, Sequence[str]], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def sanitized() -> Sanitized:
    """Runs `python ARGS` under a sanitizer ("address" or "thread")."""

    def run(kind: str, args: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            **OPTIONS,
            **variables,
            "LD_PRELOAD": " ".join(sanitizer_runtimes(kind)),
            "OMP_NUM_THREADS": "1",
        }
        # The thread sanitizer wants its shadow where randomised addresses may lie.
        fixed = [setarch, "-R"] if kind == "thread" and (setarch := shutil.which("setarch")) else []
        return subprocess.run(
            [*fixed, sys.executable, *args], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )

    return run
