# SPDX-License-Identifier: Apache-2.0
"""Paged write of latent rows with rotary embedding, in few calls."""

from __future__ import annotations

import torch

from rocm_infer.cpu_kernels.common import rotate, write


def run(
    c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    q_pe: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    *,
    interleaved: bool = True,
    kv_scale: float = 1.0,
) -> None:
    if q_pe is not None and positions is not None and table is not None:
        angles = table.index_select(0, positions)[:, None]
        q_pe.copy_(rotate(q_pe, angles, interleaved))
        k_pe = rotate(k_pe[:, None], angles, interleaved)[:, 0]
    write(cache, slots, torch.cat([c.to(k_pe.dtype), k_pe], -1), kv_scale)
