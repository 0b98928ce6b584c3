# SPDX-License-Identifier: Apache-2.0
"""Sum over the GPUs of a tensor-parallel group through memory they all reach, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Cost, op

WORLD_SIZES = (2, 4, 6, 8)
REGION_HEADER = 64 * 8 + 64 * 8 * 8  # sizeof(Region) in csrc/hip/all_reduce.hip: counters of 64 blocks, marks of 8 ranks each


def region_bytes(max_bytes: int) -> int:
    """Size S of a rank's shared region that serves rows of up to `max_bytes`."""
    return REGION_HEADER + 2 * (-(-max_bytes // 16) * 16)


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: W, N; all ranks on one device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(dims["W"], dims["N"], generator=generator).to(device, dtype)
    shared = torch.zeros(dims["W"], region_bytes(dims["N"] * x.itemsize), dtype=torch.uint8, device=device)
    regions = torch.tensor([row.data_ptr() for row in shared], device=device)
    return {"x": x, "shared": shared, "regions": regions}


def _cost(dims: dict[str, int], *, itemsize: int = 2) -> Cost:
    """One shot: each rank stores its row twice, x to the region and y, and reads x and all regions."""
    rows = dims["W"] * dims["N"] * itemsize
    return Cost(bytes=rows * (3 + dims["W"]), flops=dims["W"] * dims["W"] * dims["N"])


@op("x[L, N]:bf16|f16|f32, shared![L, S]:u8, regions[W]:i64 -> y[L, N]:x", inputs=_inputs, cost=_cost)
def all_reduce(x: torch.Tensor, shared: torch.Tensor, regions: torch.Tensor, *, rank: int = 0, shots: int = 0) -> torch.Tensor:
    """y[l] = sum over all W ranks of their row, the same bits on every rank.

    x: the rows of the ranks played by this call, `rank` the first of them. A process of a group passes its own row (L = 1); a
        call with L = W plays the whole group on one device.
    shared: the regions of those ranks, region_bytes(largest row) each. Zeroed once before the first call, then left alone: it
        keeps count of the calls. Other GPUs read and write it, so it must not be cached for them (fine-grained or uncached memory).
    regions: the addresses of the regions of all ranks, as this device reaches them.
    shots: 1: every rank adds up everything. 2: every rank adds up its part and fetches the others. 0: by size.
        All ranks must make the same calls: sizes, types and shots.
    Numerics: added in fp32 in the order of the ranks, one rounding. Neither shots nor who comes first changes a bit.
    Edges: N = 0 does nothing and is not counted. A rank that does not come leaves the others waiting: the caller's watch ends them.
    Writes: `shared`.
    Errors: ValueError if W is not 2, 4, 6 or 8, a row is not a multiple of 16 bytes, or a region is too small.
    Source: the custom all-reduce of vLLM and SGLang (one and two shots over peer memory).
    """
    world, row_bytes = regions.shape[0], x.shape[1] * x.itemsize
    if world not in WORLD_SIZES:
        raise ValueError(f"all_reduce: regions: expected 2, 4, 6 or 8 ranks, got {world}")
    if rank < 0 or rank + x.shape[0] > world:
        raise ValueError(
            f"all_reduce: rank: expected x to hold ranks within 0 to {world - 1}, got {rank} to {rank + x.shape[0] - 1}"
        )
    if shots not in (0, 1, 2):
        raise ValueError(f"all_reduce: shots: expected 1, 2, or 0 to choose by size, got {shots}")
    if row_bytes % 16:
        raise ValueError(f"all_reduce: x: expected rows of a multiple of 16 bytes, got {row_bytes} bytes")
    if shared.shape[1] < region_bytes(row_bytes):
        expected = f"at least {region_bytes(row_bytes)} bytes for rows of {row_bytes} bytes"
        raise ValueError(f"all_reduce: shared: expected {expected}, got {shared.shape[1]}")
    if x.shape[0] != world:
        raise ValueError(f"all_reduce: x: the reference plays all ranks in one call, expected {world} rows, got {x.shape[0]}")
    total = x[0].float()
    for row in x[1:]:
        total = total + row.float()
    return total.to(x.dtype).expand_as(x).contiguous()
