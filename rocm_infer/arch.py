# SPDX-License-Identifier: Apache-2.0
"""What kernels need to know of a GPU: one frozen record per architecture."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from rocm_infer import platform


@dataclass(frozen=True)
class Arch:
    """One architecture. Peaks are dense, per second, as published; 0 where nobody has recorded a figure.

    num_xcds: dies with an L2 cache of their own; workgroups go to them round robin.
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


# Sources: ROCm GPU specification page; CDNA3 and CDNA4 instruction set documents; vendors' data sheets. One GCD of an MI250X.
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("gfx90a", "amd", 64, 110, 1, 64 << 10, None, ((16, 16, 16), (32, 32, 8)), 1.6e12, 191.5e12),
        Arch("gfx942", "amd", 64, 304, 8, 64 << 10, "e4m3fnuz", ((16, 16, 16), (32, 32, 8)), 5.3e12, 1307.4e12, 2614.9e12),
        Arch("gfx950", "amd", 64, 256, 8, 160 << 10, "e4m3fn", ((16, 16, 32), (32, 32, 16)), 8e12, 2.5e15, 5.03e15),
        Arch("gfx1100", "amd", 32, 96, 1, 64 << 10, None, ((16, 16, 16),)),
        Arch("gfx1201", "amd", 32, 64, 1, 64 << 10, "e4m3fn", ((16, 16, 16),)),
        # For development on NVIDIA. Its fp8 products keep about 14 bits of the sum, so kernels there multiply in bf16.
        Arch("sm_90", "nvidia", 32, 132, 1, 227 << 10, None, ((64, 8, 16),), 4.8e12, 989e12, 1979e12),
    )
}


def of(name: str) -> Arch:
    """The record of an architecture by its name, such as "gfx942"."""
    if name not in ARCHS:
        raise NotImplementedError(f"arch: expected one of {', '.join(ARCHS)}, got {name!r}")
    return ARCHS[name]


@functools.cache
def current(device: torch.device) -> Arch:
    """The record of a device, with the compute units it really has.

    The CPU, where Triton interprets programs one by one, plays a gfx942 of few compute units: small sizes then fill it.
    """
    if device.type == "cpu":
        return dataclasses.replace(ARCHS["gfx942"], num_cus=4)
    found = of(platform.gfx(device.index or 0)) if platform.is_hip() else ARCHS["sm_90"]
    return dataclasses.replace(found, num_cus=torch.cuda.get_device_properties(device).multi_processor_count)
