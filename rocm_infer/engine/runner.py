# SPDX-License-Identifier: Apache-2.0
"""The model and its cache tensors, and one forward pass."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from rocm_infer.config import ModelConfig
from rocm_infer.engine.batch import Batch


class Model(Protocol):
    """What the engine asks of a model (`rocm_infer.models.load_model` makes one)."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K/V that one token takes, all layers together."""

    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> list[Any]:
        """The cache tensors, one entry per layer."""

    def forward(self, batch: Batch, cache: list[Any]) -> torch.Tensor:
        """Hidden states [T, C] after the last norm; writes the new tokens' K/V."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, C] -> [n, V] f32."""


class Runner:
    """Owns a model and its cache."""

    def __init__(self, model: Model, num_pages: int, page_size: int, cache_dtype: torch.dtype) -> None:
        self.model = model
        self.cache = model.make_cache(num_pages, page_size, cache_dtype)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states of all rows, [T, C]."""
        return self.model.forward(batch, self.cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, C] -> [n, V] f32."""
        return self.model.logits(hidden)

    def next_logits(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the rows that get a next token, [n, V] f32, from the hidden states of all rows."""
        rows = batch.logits_index
        return self.logits(hidden if rows.shape == hidden.shape[:1] else hidden[rows])

    def check(self) -> None:
        """Raises when the device no longer works: after a memory fault on a GPU every later call fails."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
