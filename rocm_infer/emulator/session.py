# SPDX-License-Identifier: Apache-2.0
"""One context in which everything below the ops believes in the emulated device: Triton, the HIP library, the tile choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rocm_infer import arch as archs
from rocm_infer.emulator.device import Checks, Device
from rocm_infer.emulator.hip_driver import emulated_hip
from rocm_infer.emulator.triton_driver import emulated


@contextmanager
def emulated_device(
    name: str, *, checks: Checks | None = None, threads: int | None = None, num_cus: int | None = None, **options: Any
) -> Iterator[Device]:
    """Within, Triton and HIP kernels launched on CPU tensors run as machine code of architecture `name`.

    num_cus: compute units kernels plan for, instead of the chip's (few of them give small sizes several tiles each).
    options: those of `Device`. Ops keep what they planned for an architecture: use one per process. Triton must not be in
    interpreter mode when it is imported.
    """
    record = archs.of(name)
    record = dataclasses.replace(record, num_cus=num_cus or record.num_cus)
    before = archs.current
    with ExitStack() as stack:
        device = stack.enter_context(emulated(name, checks=checks, threads=threads, **options))
        stack.enter_context(emulated_hip(device))
        archs.current = lambda device: record  # type: ignore[assignment]
        try:
            yield device
        finally:
            archs.current = before
