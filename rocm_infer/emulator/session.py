# SPDX-License-Identifier: Apache-2.0
"""One context in which everything believes in the emulated device: Triton, the HIP library, the tile choices, the dispatch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rocm_infer import arch as archs
from rocm_infer.emulator.device import Checks, Device
from rocm_infer.emulator.hip_driver import emulated_hip
from rocm_infer.emulator.triton_driver import emulated
from rocm_infer.ops import _op


def _forget_plans() -> None:
    for op in _op.registry().values():
        op._plans.clear()


@contextmanager
def emulated_device(name: str, *, checks: Checks | None = None, threads: int | None = None, num_cus: int | None = None,
                    dispatch: bool = False, **options: Any) -> Iterator[Device]:  # fmt: skip
    """Within, Triton and HIP kernels launched on CPU tensors run as machine code of architecture `name`.

    num_cus: compute units kernels plan for, instead of the chip's (few of them give small sizes several tiles each).
    dispatch: ops called with CPU tensors take the order of a GPU (hip, triton, reference), so that a model runs on the
    emulated device. Triton must not be in interpreter mode. options: those of `Device`.
    """
    record = archs.of(name)
    record = dataclasses.replace(record, num_cus=num_cus or record.num_cus)
    before = archs.current, _op.CPU_ORDER
    with ExitStack() as stack:
        device = stack.enter_context(emulated(name, checks=checks, threads=threads, **options))
        stack.enter_context(emulated_hip(device))
        archs.current = lambda device: record  # type: ignore[assignment]
        if dispatch:
            _op.CPU_ORDER = _op.GPU_ORDER  # type: ignore[assignment]
        _forget_plans()
        try:
            yield device
        finally:
            archs.current, _op.CPU_ORDER = before  # type: ignore[assignment]
            _forget_plans()
