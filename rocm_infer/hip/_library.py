# SPDX-License-Identifier: Apache-2.0
"""Finds the built kernel libraries and calls them: which one serves a device, and how an op's arguments become integers.

The kernels' host halves are in `libkernels_w64.so` and `libkernels_w32.so` (waves of 64 and 32). The same library runs launches
on the CPU, or sends them to an AMD GPU, whose machine code lies in `code_objects/<gfx>/<op>.co`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from rocm_infer import arch as archs

# The order is that of `enum Type` in csrc/hip/grid/types.h.
TYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
)
TYPE_CODES = {dtype: code for code, dtype in enumerate(TYPES)}
BUILD_VARIABLE = "ROCM_INFER_HIP_BUILD"
HOW_TO_BUILD = "build them with: python setup_rocm.py build"


class Missing(RuntimeError):
    """There is no library, or no code object, for this device."""


class Called(Protocol):
    """The part of ops._op.Call that a kernel's `supports` reads."""

    device: torch.device


def build_folder() -> Path:
    """Where the libraries are: named by ROCM_INFER_HIP_BUILD, else in the installed package, else in the checkout's build."""
    named = os.environ.get(BUILD_VARIABLE)
    if named:
        return Path(named)
    package = Path(__file__).parent / "lib"
    return package if package.exists() else Path(__file__).parent.parent.parent / "build" / "hip"


@functools.lru_cache(maxsize=1)
def _bind(folder: Path) -> ModuleType:
    found = sorted(folder.glob("_bind.*so"))
    if not found:
        raise Missing(f"no kernel library in {folder}; {HOW_TO_BUILD}")
    spec = importlib.util.spec_from_file_location("_bind", found[0])
    if spec is None or spec.loader is None:
        raise Missing(f"{found[0]} cannot be imported by this Python; {HOW_TO_BUILD}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _open(file: str) -> Any:
    path = build_folder() / file
    if not path.exists():
        raise Missing(f"{path} does not exist; {HOW_TO_BUILD}")
    return _bind(build_folder()).Library(str(path))


@functools.cache
def host_library(wave_size: int = 64) -> Any:
    """The kernels on the CPU, with waves of 64 (gfx9) or 32 (RDNA, CUDA) threads."""
    return _open(f"libkernels_w{wave_size}.so")


@functools.cache
def gpu_library(gfx: str) -> Any:
    """The kernels on an AMD GPU, or with gfx "cuda" on an NVIDIA GPU."""
    if gfx == "cuda":
        return _open("libkernels_cuda.so")
    library = _open(f"libkernels_w{64 if gfx.startswith('gfx9') else 32}.so")
    library.use_hip(str(machine_code(gfx)))
    return library


def machine_code(gfx: str) -> Path:
    """The file or folder with an architecture's machine code. Errors: Missing."""
    code = build_folder() / ("libkernels_cuda.so" if gfx == "cuda" else f"code_objects/{gfx}")
    if not code.exists():
        how = HOW_TO_BUILD if gfx == "cuda" else f"AMDGPU_TARGET={gfx} python setup_rocm.py build"
        raise Missing(f"no machine code for {gfx} in {code.parent}; {how}")
    return code


def _gfx(device: torch.device) -> str:
    found = archs.current(device)
    return "cuda" if found.vendor == "nvidia" else found.name


class Emulator(Protocol):
    """Runs ops on tensors of the CPU as machine code of an AMD GPU (rocm_infer.emulator)."""

    def supports(self, op: str) -> str | None:
        """The reason why it has no machine code of an op, or None."""

    def launch(self, kernel: Kernel, tensors: tuple[torch.Tensor | None, ...], scalars: dict[str, Any]) -> None:
        """What `Kernel.launch` does."""


class HostSettings:
    """How ops run on the CPU: the wave size, the seed of the thread order (0: natural), and threads per block at most; or
    not by the host build but in an emulator."""

    wave_size = 64
    order = 0
    max_threads = 1024
    emulator: Emulator | None = None


host_settings = HostSettings()


def library_for(device: torch.device) -> Any:
    """The library that serves tensors of a device. Errors: Missing."""
    if device.type != "cpu":
        return gpu_library(_gfx(device))
    library = host_library(host_settings.wave_size)
    library.set_order(host_settings.order)
    library.set_max_threads(host_settings.max_threads)
    return library


class Kernel:
    """An op of the libraries. `num_tensors` counts outputs, scratch and inputs, of which the first `num_outputs` are outputs."""

    def __init__(self, op: str, num_outputs: int, num_tensors: int) -> None:
        self.op = op
        self.num_outputs = num_outputs
        self.num_tensors = num_tensors

    def supports(self, call: Called) -> str | None:
        """The reason why the op cannot run on the call's device, or None."""
        emulator = host_settings.emulator if call.device.type == "cpu" else None
        if emulator is not None:
            return emulator.supports(self.op)
        try:
            if call.device.type == "meta":
                machine_code(_gfx(call.device))
            else:
                library_for(call.device)
        except Missing as error:
            return str(error)
        return None

    def launch(self, *tensors: torch.Tensor | None, **scalars: Any) -> None:
        """Runs the op. Outputs that the call does not make are left out of `tensors`; they are the last ones."""
        device = next(t.device for t in tensors if t is not None)
        if device.type == "cpu" and host_settings.emulator is not None:
            host_settings.emulator.launch(self, tensors, scalars)
            return
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # a launch goes to the current device
                self.launch(*tensors, **scalars)
            return
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        library_for(device).call(self.op, self.arguments(tensors), self.numbers(scalars), stream)

    def arguments(
        self, tensors: tuple[torch.Tensor | None, ...]
    ) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]] | None]:
        """(address, type code, sizes, strides) of each tensor, None for an absent one."""
        absent = self.num_tensors - len(tensors)
        padded = (*tensors[: self.num_outputs - absent], *(None,) * absent, *tensors[self.num_outputs - absent :])
        return [None if t is None else (t.data_ptr(), TYPE_CODES[t.dtype], tuple(t.shape), t.stride()) for t in padded]

    def numbers(self, scalars: dict[str, Any]) -> list[float]:
        """Scalars in the order of the contract; a dtype travels with its tensor and counts as 0."""
        return [float(value) if isinstance(value, (int, float)) else 0.0 for value in scalars.values()]


def kernel(op: str, *, outputs: int, tensors: int) -> tuple[Callable[..., None], Callable[[Any], str | None]]:
    """(launch, supports) of an op, as ops._op expects them in a backend's module."""
    found = Kernel(op, outputs, tensors)
    return found.launch, found.supports


SPLIT_TOKENS = 256  # kSplit in csrc/hip/decode.h


def num_splits(dims: Mapping[str, int]) -> int:
    """Splits that the longest sequence a page table [B, W] can hold has."""
    return -(-dims["W"] * dims["P"] // SPLIT_TOKENS)


def refuse_widths(widths: Mapping[str, int], most: int) -> str | None:
    """Matrix tiles are 16 wide, and a tile of rows has to fit into LDS."""
    for name, width in widths.items():
        if width % 16 or width > most:
            return f"{name}: expected a multiple of 16 and at most {most}, got {width}"
    return None


def refuse_wide_floats(call: Any, name: str) -> str | None:
    """fp32 matrix instructions exist on gfx9 alone."""
    if call.dtypes[name] != torch.float32 or call.device.type == "cpu" or _gfx(call.device).startswith("gfx9"):
        return None
    return f"{name}: expected bfloat16 or float16 on this chip, got float32"
