# SPDX-License-Identifier: Apache-2.0
"""Residual sum and root-mean-square normalisation in one pass, by the kernel of `rms_norm`."""

from __future__ import annotations

import torch

from rocm_infer.triton_kernels.rms_norm import config, start, supports

__all__ = ["config", "launch", "supports"]


def launch(*tensors: torch.Tensor, eps: float, group: int, out_dtype: torch.dtype | None) -> None:
    *outputs, x, residual, weight = tensors
    start(tuple(outputs), x, residual, weight, eps, group)
