# SPDX-License-Identifier: Apache-2.0
"""Makes everything below the ops believe in an emulated device: Triton, the HIP library, the tile choices."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rocm_infer import arch as archs
from rocm_infer.emulator import build
from rocm_infer.emulator.device import FAST, LDS_BYTES, Checks, Device
from rocm_infer.emulator.hip_driver import HipDriver
from rocm_infer.hip import _library

logger = logging.getLogger(__name__)


@contextmanager
def emulated_device(
    name: str, *, checks: Checks | None = None, threads: int | None = None, num_cus: int | None = None, **options: Any
) -> Iterator[Device]:
    """Within, Triton and HIP kernels launched on CPU tensors run as machine code of architecture `name`.

    num_cus: compute units kernels plan for, instead of the chip's (few of them give small sizes several tiles each).
    options: those of `Device`. Triton must not be in interpreter mode when it is imported.
    """
    from rocm_infer.emulator.triton_driver import emulated  # here, for it imports Triton

    record = archs.of(name)
    settings, role = _library.host_settings, archs.cpu_role
    before = settings.emulator, role.plays
    with emulated(name, checks=checks, threads=threads, **options) as device:
        settings.emulator, role.plays = HipDriver(device), dataclasses.replace(record, num_cus=num_cus or record.num_cus)
        try:
            yield device
        finally:
            settings.emulator, role.plays = before


def start(setting: str, *, hip: bool) -> Device:
    """The device of an engine setting such as "emulated:gfx942", for the rest of the process.

    Compiles what is missing: the emulator, and if `hip` kernels will be used, their machine code for that architecture. Raises ValueError for another name, or when
    this process emulates another architecture already; BuildError and RuntimeError in the words of a compiler.
    """
    name = setting.removeprefix("emulated:")
    if name not in LDS_BYTES:
        raise ValueError(f"device: expected {' or '.join(f'emulated:{a}' for a in LDS_BYTES)}, got {setting!r}")
    running = _library.host_settings.emulator
    if isinstance(running, HipDriver):
        if running.device.arch != name:
            raise ValueError(f"device {setting!r}: this process emulates {running.device.arch} already; start another one")
        return running.device
    from rocm_infer.emulator.triton_driver import activate

    logger.info("emulated %s: making the emulator ready; the first start on a machine compiles it, about a minute", name)
    build.core()
    device = Device(name, checks=FAST)
    driver = HipDriver(device)
    if hip:
        driver.prepare()
    activate(device)
    _library.host_settings.emulator, archs.cpu_role.plays = driver, archs.of(name)
    logger.info("emulated %s: ready; kernels run as machine code, everything else on the CPU", name)
    return device
