# SPDX-License-Identifier: Apache-2.0
"""A Triton driver for emulated devices: `kernel[grid](...)` on CPU tensors runs AMD machine code in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from rocm_infer.emulator import loader
from rocm_infer.emulator.device import LDS_BYTES, Checks, Device


def _flatten(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    for kind, value in zip(types, values):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _pack(kind: str, value: Any, size: int) -> Any:
    """Tensors stay tensors (the device registers their memory); numbers become bytes of the compiled type."""
    if kind.startswith("tensordesc"):
        raise loader.LoadError("host tensor descriptors are not emulated; pass pointers")
    if kind.startswith("*"):
        return value
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "f32": torch.float32, "fp64": torch.float64}
    if kind in dtypes:
        return torch.tensor([float(value)], dtype=dtypes[kind]).view(torch.uint8).numpy().tobytes()
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


class EmulatedLauncher:
    """What Triton calls for each launch. Loads the compiled kernel's files from Triton's cache on the first one."""

    def __init__(self, src: Any, metadata: Any) -> None:
        driver = triton.runtime.driver.active
        group = get_cache_manager(metadata.hash).get_group(f"{src.name[:150]}.json") or {}
        files = {Path(path).suffix: Path(path) for path in group.values()}
        if ".amdgcn" not in files or ".hsaco" not in files:
            raise loader.LoadError(f"{metadata.name}: no assembly in Triton's cache; clear the cache and compile again")
        self.loaded = driver.device.load(files[".hsaco"].read_bytes(), files[".amdgcn"].read_text(), metadata.name)
        self.names = list(getattr(src.fn, "arg_names", []))
        self.types = tuple(src.signature.values())
        self.threads = metadata.num_warps * loader.WAVE_SIZE
        self.lds = metadata.shared
        if any(getattr(metadata, name, 0) for name in ("global_scratch_size", "profile_scratch_size")):  # Triton 3.4 has none
            raise loader.LoadError(f"{metadata.name}: Triton's global scratch memory is not emulated")

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, kernel_metadata: Any, launch_metadata: Any,
                 enter: Callable[[Any], None] | None, leave: Callable[[Any], None] | None, *arguments: Any) -> None:  # fmt: skip
        if x * y * z == 0:
            return
        user = self.loaded.kernel.user_arguments
        flat = list(_flatten(self.types, arguments))
        values = [_pack(kind, value, argument.size) for (kind, value), argument in zip(flat, user)]
        values += [None] * (len(user) - len(flat))  # Triton's scratch pointers
        names = [n for n, kind in zip(self.names, self.types) if kind != "constexpr"]
        if enter is not None:
            enter(launch_metadata)
        device = triton.runtime.driver.active.device
        device.run(self.loaded, (x, y, z), (self.threads, 1, 1), values, lds=self.lds, tensors=(), names=names)
        if leave is not None:
            leave(launch_metadata)


class _Utils:
    """The part of Triton's HIP utilities that needs no HIP."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {"max_shared_mem": LDS_BYTES[self.arch], "multiprocessor_count": {"gfx942": 304, "gfx950": 256}[self.arch],
                "warpSize": 64, "arch": self.arch, "max_num_regs": 65536}  # fmt: skip

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, name, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class EmulatedDriver(DriverBase):  # type: ignore[misc]  # Triton ships no types
    """Triton driver whose target is hip/<arch> and whose tensors live on the CPU."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.utils = _Utils(device.arch)
        self.launcher_cls = EmulatedLauncher

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by Triton itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the emulated device compiles no launcher")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self.device.arch, 64)

    def get_current_device(self) -> int:
        return int(self.device.arch[3:])  # a number per architecture: Triton keeps compiled kernels per device number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("an emulated device has no time to measure")


def activate(device: Device) -> None:
    """Makes device the one Triton kernels run on, for the rest of the process."""
    triton.runtime.driver.set_active(EmulatedDriver(device))


@contextmanager
def emulated(arch: str, *, checks: Checks | None = None, threads: int | None = None, trace: tuple[int, int] | None = None,
             break_at: int | None = None) -> Iterator[Device]:  # fmt: skip
    """Within, Triton kernels launched on CPU tensors run as machine code of arch. Yields the device."""
    device = Device(arch, checks=checks, threads=threads, trace=trace, break_at=break_at)
    config = triton.runtime.driver
    before = dict(vars(config))  # where it keeps the driver differs between versions
    config.set_active(EmulatedDriver(device))
    try:
        yield device
    finally:
        vars(config).update(before)
