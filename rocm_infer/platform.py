# SPDX-License-Identifier: Apache-2.0
"""The device in front of us. Nothing here runs at import."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def is_hip() -> bool:
    """Whether this torch is a ROCm build; its devices answer to the name "cuda"."""
    return torch.version.hip is not None


def is_cuda() -> bool:
    """Whether this torch is a CUDA build."""
    return torch.version.cuda is not None


def has_gpu() -> bool:
    return torch.cuda.is_available()


def gfx(device: int = 0) -> str:
    """The architecture name of an AMD GPU, such as "gfx942"."""
    if not is_hip():
        raise RuntimeError(f"gfx: expected a ROCm build of torch, got {torch.__version__}; see README, section AMD")
    return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]


def resolve_device(name: str) -> torch.device:
    """The torch device of an engine setting: auto takes the GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if has_gpu() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device: expected auto, cpu, cuda[:index], emulated:gfx942 or emulated:gfx950, got {name!r}"
        ) from None
    if device.type == "cuda" and not has_gpu():
        raise ValueError(
            f"device {name!r}: torch {torch.__version__} sees no GPU; use --device cpu, or install ROCm wheels (README)"
        )
    return device


def exact_sums() -> None:
    """Library products of 16-bit matrices add up in fp32, however they split K, as the contract of `gemm` says."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def usable_cores() -> int:
    """CPU cores this process may keep busy: its affinity, cut by the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = CGROUP / "cpu.max"
    if quota.exists():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, -(-int(allowed) // int(period)))
    return max(1, cores)
