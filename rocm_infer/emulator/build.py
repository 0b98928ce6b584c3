# SPDX-License-Identifier: Apache-2.0
"""Compiles the emulator's C++ core on first use, with the tools of the Python environment alone."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

from rocm_infer.platform import usable_cores

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = _ROOT / "csrc" / "emulator"
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden"]


def _compiler() -> list[str]:
    """The system's C++20 compiler, else the one in the `ziglang` wheel."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            probe = [name, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
            source = "#include <bit>\nauto f = []<class G>(G) { return G()(1); };\nint x = f([](int a) { return a; });\n_Float16 h = 1;"
            if subprocess.run(probe, input=source, text=True, capture_output=True).returncode == 0:
                return [name]
    if importlib.util.find_spec("ziglang") is None:
        raise RuntimeError("the emulator needs a C++20 compiler: install g++ 12 or newer, or `pip install ziglang`")
    return [sys.executable, "-m", "ziglang", "c++"]


def _cpu() -> str:
    """What -march=native depends on: a cached build must not move to another processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next((line for line in text.splitlines() if line.startswith("flags")), platform.machine())
    except OSError:
        return platform.machine()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"building the emulator failed: {' '.join(command)}\n{done.stderr[-4000:]}")


def build(directory: Path | None = None) -> Path:
    """Compiles what changed and links; returns the extension's path. Objects are cached by content.

    Processes that build the same directory wait for each other. Raises RuntimeError with the compiler's words, or without sources.
    """
    if not _SOURCES.is_dir():
        raise RuntimeError("the emulator is compiled from csrc/emulator, which comes with a checkout: clone it, then make")
    directory = directory or _ROOT / "build" / "emulator"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(directory)


def _build(directory: Path) -> Path:
    import pybind11

    compiler = _compiler()
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    headers = b"".join(h.read_bytes() for h in sorted(_SOURCES.glob("*.h")))
    base = headers + " ".join([*compiler, *_FLAGS, *includes, _cpu()]).encode()

    def compiled(source: Path) -> Path:
        key = hashlib.sha256(base + source.read_bytes()).hexdigest()[:16]
        target = directory / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = directory / f"{target.name}.{os.getpid()}"
            _run([*compiler, *_FLAGS, *includes, "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(usable_cores()) as pool:
        objects = list(pool.map(compiled, sorted(_SOURCES.glob("*.cpp"))))
    key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = directory / key / f"_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_name(f"{library.name}.{os.getpid()}")
        _run([*compiler, "-shared", "-o", str(partial), *map(str, objects), "-lpthread"])
        partial.replace(library)
    return library


@cache
def core() -> ModuleType:
    """The compiled module, built if needed."""
    path = build()
    spec = importlib.util.spec_from_file_location("_emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
