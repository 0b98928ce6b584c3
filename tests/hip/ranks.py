# SPDX-License-Identifier: Apache-2.0
"""Two ranks, two calls each, in streams of their own: `python -m tests.hip.ranks BIND LIBRARY OP` prints the first number of both
results. Without torch, so that a process under a sanitizer starts quickly."""

from __future__ import annotations

import array
import sys
from pathlib import Path

from tests.hip.planted import TYPE_F32, load_bind

TYPE_I64, TYPE_U8 = 4, 5
WORLD, WIDTH, REGION_BYTES = 2, 64, 8192


def run(bind: Path, path: Path, op: str) -> list[float]:
    library = load_bind(bind).Library(str(path))
    library.set_order(1)
    library.set_max_threads(64)
    shared = array.array("Q", [0] * (WORLD * REGION_BYTES // 8))
    first = shared.buffer_info()[0]
    regions = array.array("q", [first, first + REGION_BYTES])
    data = [array.array("f", [float(call + 1)] * WIDTH) for call in range(2)]
    results = [[array.array("f", [0.0] * WIDTH) for _ in data] for _ in range(WORLD)]
    for rank in range(WORLD):
        library.queue(rank)
        for x, y in zip(data, results[rank]):
            rows = [(buffer.buffer_info()[0], TYPE_F32, (1, WIDTH), (WIDTH, 1)) for buffer in (y, x)]
            region = (regions[rank], TYPE_U8, (1, REGION_BYTES), (REGION_BYTES, 1))
            library.call(op, [*rows, region, (regions.buffer_info()[0], TYPE_I64, (WORLD,), (1,))], [rank, 1], 0)
    library.run_queued()
    return [y[0] for y in results[0]]


if __name__ == "__main__":
    sys.stdout.write(f"{run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])}\n")
