# SPDX-License-Identifier: Apache-2.0
"""Runs one planted kernel and prints its result: `python -m tests.hip.planted BIND LIBRARY OP WRONG`. Without torch, so that a
process under a sanitizer starts quickly."""

from __future__ import annotations

import array
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TYPE_F32 = 2


def load_bind(folder: Path) -> ModuleType:
    """The Python module of a build."""
    spec = importlib.util.spec_from_file_location("_bind", next(folder.glob("_bind.*so")))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(bind: Path, path: Path, op: str, wrong: bool, *, threads: int = 128, order: int = 0) -> list[float]:
    """y of one launch with x = 0, 1, 2, ..."""
    library = load_bind(bind).Library(str(path))
    library.set_order(order)
    x = array.array("f", range(threads))
    y = array.array("f", [float("nan")] * threads)
    tensors = [(buffer.buffer_info()[0], TYPE_F32, (threads,), (1,)) for buffer in (y, x)]
    library.call(op, tensors, [threads, wrong], 0)
    return list(y)


if __name__ == "__main__":
    sys.stdout.write(f"{run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == '1')}\n")
