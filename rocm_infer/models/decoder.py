# SPDX-License-Identifier: Apache-2.0
"""The decoder all families share: embedding, layers of attention and MLP with pre-norm, last norm, output head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from rocm_infer.config import ModelConfig
from rocm_infer.models.builder import Builder
from rocm_infer.models.layers import Batch, Cache, Linear, Step
from rocm_infer.ops._op import Ops


class AttentionLayer(Protocol):
    """Mixes tokens; owns its cache."""

    def __call__(self, x: torch.Tensor, step: Step, cache: Cache) -> torch.Tensor: ...
    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> Cache: ...
    def cache_values_per_token(self) -> int: ...


@dataclass(frozen=True)
class Layer:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    input_norm: torch.Tensor
    attention: AttentionLayer
    post_norm: torch.Tensor
    mlp: Callable[[torch.Tensor], torch.Tensor]


class Decoder:
    """A whole model on one device. `weight_bytes` counts what its weights take there."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: list[Layer],
        norm: torch.Tensor,
        head: Linear,
        *,
        device: torch.device,
        dtype: torch.dtype,
        weight_bytes: int,
    ) -> None:
        self.ops = ops
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.next_norms = [*(layer.input_norm for layer in layers[1:]), norm]
        self.head = head
        self.device = device
        self.dtype = dtype
        self.weight_bytes = weight_bytes

    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> list[Cache]:
        """Zeroed cache tensors, one entry per layer."""
        return [layer.attention.make_cache(num_pages, page_size, dtype) for layer in self.layers]

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return dtype.itemsize * sum(layer.attention.cache_values_per_token() for layer in self.layers)

    def forward(self, batch: Batch, cache: list[Cache]) -> torch.Tensor:
        """Hidden states [T, C] after the last norm. Writes the new tokens' K/V into `cache`."""
        step = Step.of(batch)
        eps = self.config.rms_eps
        residual = self.embedding.index_select(0, batch.token_ids)
        x: torch.Tensor = self.ops.rms_norm(residual, self.layers[0].input_norm, eps=eps)
        for layer, layer_cache, next_norm in zip(self.layers, cache, self.next_norms):
            x = layer.attention(x, step, layer_cache)
            x = self.ops.add_rms_norm(x, residual, layer.post_norm, eps=eps)
            x = layer.mlp(x)
            x = self.ops.add_rms_norm(x, residual, next_norm, eps=eps)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, C] -> [n, V] f32."""
        return self.head(hidden).float()


def build_decoder(builder: Builder, layers: list[Layer]) -> Decoder:
    """The layers with embedding, norm and head around them, under the names that all families use."""
    config = builder.config
    shape = (config.vocab_size, config.hidden)
    embedding = builder.tensor("model.embed_tokens.weight", shape)
    norm = builder.tensor("model.norm.weight", (config.hidden,))
    head = builder.dense(embedding, kept=True) if config.tied else builder.linear("lm_head", config.hidden, config.vocab_size)
    return Decoder(
        builder.ops,
        config,
        embedding,
        layers,
        norm,
        head,
        device=builder.device,
        dtype=builder.dtype,
        weight_bytes=builder.weight_bytes,
    )
