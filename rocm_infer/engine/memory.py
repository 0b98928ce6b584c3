# SPDX-License-Identifier: Apache-2.0
"""How much memory goes where, decided before the KV cache is allocated."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rocm_infer.config import ConfigError, EngineConfig, ModelConfig

MIB = 1 << 20
# On a CPU the memory is shared with everything else on the machine: the cache takes what its requests can use, within these.
CPU_SHARE = 0.25
CPU_LIMIT = 4 << 30
GPU_SHARE = 0.88
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, and the size of the KV cache that follows. `num_available` is what was free beside the weights."""

    device: str
    available_bytes: int
    weight_bytes: int
    cache_bytes: int
    workspace_bytes: int
    bytes_per_token: int
    num_pages: int
    page_size: int

    @property
    def max_total_tokens(self) -> int:
        return self.num_pages * self.page_size

    def table(self) -> str:
        """The plan as a small table for people."""
        left = self.available_bytes - self.cache_bytes - self.workspace_bytes
        rows = [
            ("weights", self.weight_bytes, "loaded"),
            ("KV cache", self.cache_bytes, f"{self.max_total_tokens} tokens, {self.bytes_per_token} bytes each"),
            ("workspace", self.workspace_bytes, "estimate of one step"),
            ("left", left, f"of {self.available_bytes / MIB:.0f} MiB free on {self.device}"),
        ]
        return "\n".join(f"{name:<10}{size / MIB:>10.1f} MiB  {note}" for name, size, note in rows)

    def to_dict(self) -> dict[str, int | str]:
        return asdict(self)


def workspace_bytes(config: EngineConfig, model: ModelConfig, itemsize: int) -> int:
    """Activations of the largest step: the widest layer of all its tokens, and the logits (with one copy) of its rows."""
    widths = [model.intermediate, model.num_heads * model.head_dim * 3]
    if model.moe is not None:
        widths.append(model.moe.top_k * model.moe.intermediate)
    tokens = config.chunked_prefill_size + config.max_running_requests
    return tokens * (3 * max(widths) + 4 * model.hidden) * itemsize + 2 * config.max_running_requests * model.vocab_size * 4


def available_bytes(device: torch.device) -> int:
    """Memory this process can still get: of the device, or of the machine and its cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    *,
    weight_bytes: int,
    bytes_per_token: int,
    itemsize: int,
    available: int,
) -> MemoryPlan:
    """The plan. `available` bytes are free now, with the weights loaded. Raises ConfigError if it cannot be met."""
    context_len = config.context_length or model.max_len
    workspace = workspace_bytes(config, model, itemsize)
    page_bytes = bytes_per_token * config.page_size
    useful_pages = config.max_running_requests * -(-context_len // config.page_size)
    budget = _cache_budget(config, device, weight_bytes, available, workspace)
    if config.max_total_tokens is not None:
        num_pages = -(-config.max_total_tokens // config.page_size)
    else:
        num_pages = min(useful_pages, budget // page_bytes if page_bytes else useful_pages)
    if num_pages < 1 or num_pages * page_bytes + workspace > available:
        raise ConfigError(
            "max_total_tokens" if config.max_total_tokens else "mem_fraction_static",
            f"memory: {available / MIB:.0f} MiB are free on {device} beside {weight_bytes / MIB:.0f} MiB of weights; a KV cache of "
            f"{max(num_pages, 1) * config.page_size} tokens takes {max(num_pages, 1) * page_bytes / MIB:.0f} MiB and a step about "
            f"{workspace / MIB:.0f} MiB. Lower max_total_tokens, chunked_prefill_size or max_running_requests, or use a smaller model",
        )
    return MemoryPlan(
        str(device), available, weight_bytes, num_pages * page_bytes, workspace, bytes_per_token, num_pages, config.page_size
    )


def _cache_budget(config: EngineConfig, device: torch.device, weight_bytes: int, available: int, workspace: int) -> int:
    """Bytes the KV cache may take when its size is not given."""
    share = config.mem_fraction_static
    if share is None and device.type == "cpu":
        return min(int(CPU_SHARE * available), CPU_LIMIT, available - workspace)
    return min(int((share or GPU_SHARE) * (available + weight_bytes)) - weight_bytes, available - workspace)
