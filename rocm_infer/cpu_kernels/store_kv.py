# SPDX-License-Identifier: Apache-2.0
"""Paged write of keys and values with rotary embedding, q and k turned together.

Why: at one token per sequence the cost is the number of calls. q and k are neighbours in the row that the fused projection
wrote, so one view covers both; and a contiguous cache takes rows by one index.
"""

from __future__ import annotations

import torch

from rocm_infer.cpu_kernels.common import rotate, write


def run(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    if q is not None and positions is not None and table is not None:
        angles = table.index_select(0, positions)[:, None]
        if _adjacent(q, k):
            num_heads = q.shape[1]
            both = q.as_strided((q.shape[0], num_heads + k.shape[1], q.shape[2]), q.stride())
            turned = rotate(both, angles, interleaved)
            q.copy_(turned[:, :num_heads])
            k = turned[:, num_heads:]
        else:
            q.copy_(rotate(q, angles, interleaved))
            k = rotate(k, angles, interleaved)
    write(k_cache, slots, k, k_scale)
    write(v_cache, slots, v, v_scale)


def _adjacent(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the heads of k follow those of q in every row."""
    return (
        q.stride() == k.stride()
        and q.stride(2) == 1
        and q.stride(1) == q.shape[2]
        and k.data_ptr() - q.data_ptr() == q.shape[1] * q.shape[2] * q.element_size()
    )
