# SPDX-License-Identifier: Apache-2.0
"""What kernels need to know of a GPU: one frozen record per architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from rocm_infer import platform


@dataclass(frozen=True)
class Arch:
    """One architecture. Peaks are dense, per second, as published; 0 where nobody has recorded a figure.

    num_xcds: dies with an L2 cache of their own; workgroups go to them round robin.
    lds_bytes: what one workgroup can have. wave: threads that run in step.
    fp8: the dialect that the matrix cores multiply, None if they do not.
    matrix_shapes: (M, N, K) of the matrix instructions for 16-bit input.
    """

    name: str
    vendor: str
    wave: int
    num_cus: int
    num_xcds: int
    lds_bytes: int
    fp8: str | None
    matrix_shapes: tuple[tuple[int, int, int], ...]
    bytes_per_s: float = 0.0
    bf16_flops: float = 0.0
    fp8_flops: float = 0.0

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether the matrix cores take this fp8 type as it is."""
        return str(dtype) == f"torch.float8_{self.fp8}"

    @property
    def fp8_dtype(self) -> torch.dtype:
        """The type of fp8 weights and caches: the native dialect, else e4m3fn, which checkpoints have."""
        return torch.float8_e4m3fnuz if self.fp8 == "e4m3fnuz" else torch.float8_e4m3fn


# Sources of sizes: the tables of ROCm's "GPU specifications" page, and the CDNA3, CDNA4, RDNA3 and RDNA4 instruction set documents.
# Sources of peaks: AMD's data sheets of MI250X (one GCD), MI300X, MI355X, RX 7900 XTX and RX 9070 XT, NVIDIA's of H100 SXM.
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("gfx90a", "amd", 64, 110, 1, 64 << 10, None, ((16, 16, 16), (32, 32, 8)), 1.6e12, 191.5e12),
        Arch("gfx942", "amd", 64, 304, 8, 64 << 10, "e4m3fnuz", ((16, 16, 16), (32, 32, 8)), 5.3e12, 1307.4e12, 2614.9e12),
        Arch("gfx950", "amd", 64, 256, 8, 160 << 10, "e4m3fn", ((16, 16, 32), (32, 32, 16)), 8e12, 2.5e15, 5.03e15),
        Arch("gfx1100", "amd", 32, 96, 1, 64 << 10, None, ((16, 16, 16),), 0.96e12, 122.8e12),
        Arch("gfx1201", "amd", 32, 64, 1, 64 << 10, "e4m3fn", ((16, 16, 16),), 0.64e12, 194.6e12, 389.3e12),
        # For development on NVIDIA. Its fp8 products keep about 14 bits of the sum, so kernels there multiply in bf16.
        Arch("sm_90", "nvidia", 32, 132, 1, 227 << 10, None, ((64, 8, 16),), 3.35e12, 989e12, 1979e12),
    )
}

# Boards whose published peaks (bytes/s, bf16, fp8) differ from their architecture's record, by a word of the device's name.
BOARDS = {
    "MI300A": (5.3e12, 980.6e12, 1961.2e12),
    "MI325X": (6.0e12, 1307.4e12, 2614.9e12),
    "MI350X": (8e12, 2.3e15, 4.6e15),
    "H100 PCIe": (2.0e12, 756e12, 1513e12),
    "H100 NVL": (3.9e12, 835e12, 1671e12),
    "H200": (4.8e12, 989e12, 1979e12),
}

_played: ContextVar[Arch | None] = ContextVar("played", default=None)


class CpuRole:
    """What tensors on the CPU stand for: themselves, or the GPU that `rocm_infer.emulator` plays with them."""

    plays: Arch | None = None


cpu_role = CpuRole()


def roles() -> tuple[Arch | None, Arch | None]:
    """What the CPU and the meta device play now; what was planned for a device holds while these stay."""
    return cpu_role.plays, _played.get()


def of(name: str) -> Arch:
    """The record of an architecture by its name, such as "gfx942"."""
    if name not in ARCHS:
        raise NotImplementedError(f"arch: expected one of {', '.join(ARCHS)}, got {name!r}")
    return ARCHS[name]


@contextmanager
def played_by_meta(arch: Arch) -> Iterator[None]:
    """Within, tensors of torch's meta device, which have no data, count as lying on a GPU of this architecture.

    For dry runs: which kernels would serve, and which would be compiled.
    """
    token = _played.set(arch)
    try:
        yield
    finally:
        _played.reset(token)


def current(device: torch.device) -> Arch:
    """The record of a device, with the compute units it really has.

    The CPU, where Triton interprets programs one by one, plays a gfx942 of few compute units: small sizes then fill it.
    """
    if device.type == "cpu" and cpu_role.plays is not None:
        return cpu_role.plays
    if device.type == "meta":
        found = _played.get()
        if found is None:
            raise NotImplementedError("arch: tensors of the meta device are on no GPU outside of arch.played_by_meta")
        return found
    return _of_device(device)


def runs_gpu_kernels(device: torch.device) -> bool:
    """Whether GPU kernels work on tensors of a device; on those of the CPU where an emulator plays a GPU."""
    return device.type != "cpu" or cpu_role.plays is not None


def fp8_dtype(device: torch.device) -> torch.dtype:
    """The type of fp8 weights and caches on a device. A CPU has no fp8 arithmetic and takes e4m3fn, as does no device at all."""
    if not runs_gpu_kernels(device) or (device.type == "meta" and _played.get() is None):
        return torch.float8_e4m3fn
    return current(device).fp8_dtype


@functools.cache
def _of_device(device: torch.device) -> Arch:
    if device.type == "cpu":
        return dataclasses.replace(ARCHS["gfx942"], num_cus=4)
    properties = torch.cuda.get_device_properties(device)
    found = of(platform.gfx(device.index or 0)) if platform.is_hip() else _nvidia(properties)
    for board, (bytes_per_s, bf16_flops, fp8_flops) in BOARDS.items():
        if board in properties.name:
            found = dataclasses.replace(found, bytes_per_s=bytes_per_s, bf16_flops=bf16_flops, fp8_flops=fp8_flops)
    return dataclasses.replace(found, num_cus=properties.multi_processor_count)


def _nvidia(properties: Any) -> Arch:
    """sm_90, or for another chip the same with its own shared memory and no peaks: good enough to develop on."""
    name = f"sm_{properties.major}{properties.minor}"
    if name in ARCHS:
        return ARCHS[name]
    lds_bytes = properties.shared_memory_per_block_optin
    return dataclasses.replace(ARCHS["sm_90"], name=name, lds_bytes=lds_bytes, bytes_per_s=0.0, bf16_flops=0.0, fp8_flops=0.0)
