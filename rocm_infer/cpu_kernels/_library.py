# SPDX-License-Identifier: Apache-2.0
"""The library of csrc/cpu: built once per machine with the compiler there is, kept in the user's cache, called through ctypes.

Its kernels take bf16 and fp32, run on torch's own threads, and give a row the same bits in any batch.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.int32: "i32"}
PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Called(Protocol):
    """The part of ops._op.Call that `Kernel.refuses` reads."""

    dtypes: Mapping[str, torch.dtype]


class Kernel:
    """An op of the library. types: of its arguments in order, p a pointer (0: none), i an integer, d a float."""

    def __init__(self, op: str, types: str) -> None:
        self.op = op
        self.pack = struct.Struct("=" + types.replace(" ", "").replace("p", "q").replace("i", "q")).pack
        self.found: dict[torch.dtype, Callable[[bytes], None]] = {}

    def __call__(self, dtype: torch.dtype, *arguments: float) -> None:
        """Run the instance for tensors of a type."""
        function = self.found.get(dtype) or self._find(dtype)
        function(self.pack(*arguments))

    def _find(self, dtype: torch.dtype) -> Callable[[bytes], None]:
        address = ctypes.c_void_p.in_dll(library()[0], f"{self.op}_{SUFFIXES[dtype]}").value
        assert address is not None  # every exported name is a pointer to an instance
        self.found[dtype] = PROTOTYPE(address)
        return self.found[dtype]

    def refuses(self, call: Called, *names: str) -> str | None:
        """Why the kernel cannot serve a call whose tensors `names` must be of one type the library has."""
        for name in names:
            if call.dtypes[name] not in (torch.bfloat16, torch.float32):
                return f"{name}: expected bfloat16 or float32, got {str(call.dtypes[name]).removeprefix('torch.')}"
        return library()[1]


def rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where its rows are not contiguous inside."""
    if x.is_contiguous():
        return x
    inner = 1
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1]):
        if stride != inner and size != 1:
            return x.contiguous()
        inner *= size
    return x


def pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@functools.cache
def library() -> tuple[Any, str | None]:
    """(the loaded library or None, why there is none). Builds it when this machine has not yet."""
    try:
        found = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        reason = f"the CPU library of csrc/cpu is missing: {error}"
        logger.warning("%s. Models run on torch's operators instead, which is slower", reason)
        return None, reason
    openmp = _openmp()
    if openmp is not None:
        found.use_threads(openmp.GOMP_parallel, openmp.omp_get_max_threads)
    return found, None


@functools.cache
def lanes() -> int:
    """Floats in one vector of the library; 0 without one."""
    found, missing = library()
    return 0 if missing else int(found.lanes())


def _built() -> Path:
    """The library's file. Its name tells the sources and the processor it was built from and for."""
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise OSError(f"no sources in {SOURCES}")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    texts = [file.read_bytes() for file in sorted(SOURCES.glob("*.*"))]
    key = hashlib.sha256(b"".join([*texts, features.encode(), *map(str.encode, FLAGS)])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rocm-infer"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"cpu-{key}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            _build(sources, file)
    return file


def _build(sources: list[Path], file: Path) -> None:
    """Compile all sources as one unit, with the first compiler that can."""
    unit = "".join(f'#include "{source}"\n' for source in sources)
    logger.info("building the CPU kernels for this machine, once")
    refusal = "no C++ compiler: install g++ or clang++, or pip install ziglang"
    for compiler in _compilers():
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            command = [*compiler, *FLAGS, "-x", "c++", "-", "-o", str(made)]
            done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.replace(file)
                return
        refusal = f"{compiler[0]}: {done.stderr.strip()[-400:]}"
    raise OSError(refusal)


def _compilers() -> list[tuple[str, ...]]:
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    found: list[tuple[str, ...]] = [(path,) for name in names if name and (path := shutil.which(name))]
    zig = importlib.util.find_spec("ziglang")
    if zig is not None and zig.origin is not None:
        found.append((str(Path(zig.origin).parent / "zig"), "c++"))
    return found


def _openmp() -> Any:
    """The OpenMP library that torch has loaded, or None; a second one would mean a second pool of threads."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    named = sorted(path for path in paths if re.search(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$", path))
    for path in sorted(named, key=lambda path: "/torch/" not in path):
        found = ctypes.CDLL(path)
        if hasattr(found, "GOMP_parallel") and hasattr(found, "omp_get_max_threads"):
            return found
    return None
