# SPDX-License-Identifier: Apache-2.0
"""HIP kernels on an emulated device: the host half prepares its launches as ever, the emulator runs their machine code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from rocm_infer.emulator.device import Device, LoadedKernel
from rocm_infer.hip import _library, build

logger = logging.getLogger(__name__)


class HipDriver:
    """Runs ops of the HIP library on a device. code_objects: folder with <op>.co and <op>.s of the device's architecture."""

    def __init__(self, device: Device, code_objects: Path | None = None) -> None:
        self.device = device
        self.folder = code_objects or _library.build_folder() / "code_objects" / device.arch
        self._kernels: dict[str, LoadedKernel] = {}
        self._up_to_date: set[str] = set()

    def prepare(self) -> None:
        """In a checkout, compiles what is missing or older than its source: the host half and the machine code of all ops."""
        if not self._in_checkout():
            return
        ops = sorted(source.stem for source in (build.ROOT / "csrc" / "hip").glob("*.hip"))
        build.build(("host", "bind"))
        for number, op in enumerate(ops, 1):
            if not (self.folder / f"{op}.co").exists():
                logger.info("emulated %s: compiling the HIP kernels of %s (%d of %d)", self.device.arch, op, number, len(ops))
            self._bring_up_to_date(op)

    def supports(self, op: str) -> str | None:
        """The reason why there is no machine code of an op, or None. In a checkout, compiles it."""
        try:
            self._bring_up_to_date(op)
            _library.host_library(64)
        except (_library.Missing, build.BuildError) as error:
            return str(error)
        return None

    def kernel(self, op: str, symbol: str) -> LoadedKernel:
        """Raises Missing, LoadError or DecodeError."""
        if symbol not in self._kernels:
            self._bring_up_to_date(op)
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

    def _in_checkout(self) -> bool:
        return self.folder.parents[1] == build.ROOT / "build" / "hip" and (build.ROOT / "csrc" / "hip").is_dir()

    def _bring_up_to_date(self, op: str) -> None:
        if op in self._up_to_date:
            return
        if self._in_checkout():
            build.build(("host", "bind", f"code_objects/{self.device.arch}/{op}.co"))
        if not (self.folder / f"{op}.co").exists():
            raise _library.Missing(f"no machine code of {op} for {self.device.arch} in {self.folder}; {_library.HOW_TO_BUILD}")
        self._up_to_date.add(op)
