# SPDX-License-Identifier: Apache-2.0
"""A GPU that is not there: within `compiling`, launches compile for an architecture, are written down, and run nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from rocm_infer import arch as archs
from rocm_infer.arch import Arch


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel. files: what Triton's cache holds of it, by suffix, ".ttir" and ".amdgcn" among them.

    arguments: the values of the launch by name, constexprs included. lds: bytes per workgroup.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    lds: int
    files: dict[str, Path]
    arguments: dict[str, Any]


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {"max_shared_mem": 1 << 30}  # whether it fits is for the reader of the figures to say

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, name, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    """What Triton calls for each launch of one compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        group = get_cache_manager(metadata.hash).get_group(f"{src.name[:150]}.json") or {}
        self.files = {Path(path).suffix: Path(path) for path in group.values()}
        self.names = list(src.fn.arg_names)
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, kernel_metadata: Any, launch_metadata: Any,
                 enter: Any, leave: Any, *arguments: Any) -> None:  # fmt: skip
        found, metadata = dict(zip(self.names, arguments)), self.metadata
        driver = triton.runtime.driver.active
        driver.launches.append(Launch(metadata.name, (x, y, z), metadata.num_warps, metadata.shared, self.files, found))


class CompileDriver(DriverBase):  # type: ignore[misc]  # Triton ships no types
    """Triton driver whose target is an architecture and whose tensors have no data."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        self.utils = _Utils()
        self.launcher_cls = _Launcher
        self.launches: list[Launch] = []

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by Triton itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched, so no launcher is compiled")

    def get_current_target(self) -> GPUTarget:
        if self.arch.vendor == "nvidia":
            return GPUTarget("cuda", int(self.arch.name.removeprefix("sm_")), self.arch.wave)
        return GPUTarget("hip", self.arch.name, self.arch.wave)

    def get_current_device(self) -> int:
        return 1000 + list(archs.ARCHS).index(self.arch.name)  # Triton keeps compiled kernels per device number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        raise NotImplementedError("there is no device")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here, so there is no time to measure")


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    return Path(triton.knobs.cache.dir)


@contextmanager
def compiling(arch: Arch) -> Iterator[list[Launch]]:
    """Within, Triton kernels launched on tensors of torch's meta device compile for `arch`. Yields the launches as they come."""
    config = triton.runtime.driver
    before, driver = dict(vars(config)), CompileDriver(arch)  # where it keeps the driver differs between versions
    config.set_active(driver)
    try:
        with archs.played_by_meta(arch):
            yield driver.launches
    finally:
        vars(config).update(before)
