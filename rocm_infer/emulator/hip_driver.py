# SPDX-License-Identifier: Apache-2.0
"""HIP kernels on an emulated device: the host half prepares its launches as ever, the emulator runs their machine code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rocm_infer.emulator.device import Device, LoadedKernel
from rocm_infer.hip import _library, build


class HipDriver:
    """Runs ops of the HIP library on a device. code_objects: folder with <op>.co and <op>.s of the device's architecture."""

    def __init__(self, device: Device, code_objects: Path | None = None) -> None:
        self.device = device
        self.folder = code_objects or _library.build_folder() / "code_objects" / device.arch
        self._kernels: dict[str, LoadedKernel] = {}

    def kernel(self, op: str, symbol: str) -> LoadedKernel:
        if symbol not in self._kernels:
            if self.folder.parents[1] == build.ROOT / "build" / "hip":  # a checkout: its machine code follows its sources
                build.build((f"code_objects/{self.device.arch}/{op}.co",))
            if not (self.folder / f"{op}.co").exists():
                raise _library.Missing(
                    f"no machine code of {op} for {self.device.arch} in {self.folder}; {_library.HOW_TO_BUILD}"
                )
            code, text = (self.folder / f"{op}.co").read_bytes(), (self.folder / f"{op}.s").read_text()
            self._kernels[symbol] = self.device.load(code, text, symbol)
        return self._kernels[symbol]

    def launch(self, kernel: _library.Kernel, tensors: tuple[torch.Tensor | None, ...], scalars: dict[str, Any]) -> None:
        """What `_library.Kernel.launch` does, on the emulated device. Raises EmulationError."""
        library = _library.host_library(64)
        given = [t for t in tensors if t is not None]
        for asked in library.record(kernel.op, kernel.arguments(tensors), kernel.numbers(scalars)):
            loaded = self.kernel(asked.op, asked.kernel)
            loaded.launch(asked.blocks, [asked.threads], [asked.params], lds=asked.lds_bytes, tensors=given)


@contextmanager
def emulated_hip(device: Device, code_objects: Path | None = None) -> Iterator[HipDriver]:
    """Within, HIP kernels launched on CPU tensors run as machine code on device."""
    driver = HipDriver(device, code_objects)
    original = _library.Kernel.launch

    def launch(self: _library.Kernel, *tensors: torch.Tensor | None, **scalars: Any) -> None:
        driver.launch(self, tensors, scalars)

    _library.Kernel.launch = launch  # type: ignore[method-assign]
    try:
        yield driver
    finally:
        _library.Kernel.launch = original  # type: ignore[method-assign]
