# SPDX-License-Identifier: Apache-2.0
"""A real, tiny checkpoint with random weights; loggers as they were after every test."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rocm_infer.logs import OTHERS
from tests.text.toys import byte_level, write_folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama over the byte-level toy tokenizer, in Hugging Face layout."""
    backend = byte_level()
    folder = write_folder(tmp_path_factory.mktemp("checkpoint") / "toy-llama", backend)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": backend.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "bos_token_id": backend.token_to_id("<|bos|>"),
        "eos_token_id": backend.token_to_id("<|end|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    safetensors.torch.save_file(_weights(backend.get_vocab_size()), folder / "model.safetensors")
    return folder


def _weights(vocab_size: int) -> dict[str, torch.Tensor]:
    """Seeded weights under the names of a Llama checkpoint."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (vocab_size, 64), "lm_head": (vocab_size, 64)}
    for layer in (0, 1):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{part}_proj": (rows, 64) for part, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64))}
        shapes |= {f"{name}mlp.gate_proj": (128, 64), f"{name}mlp.up_proj": (128, 64), f"{name}mlp.down_proj": (64, 128)}
    norms = ["model.norm", *(f"model.layers.{i}.{kind}_layernorm" for i in (0, 1) for kind in ("input", "post_attention"))]
    weights = {f"{name}.weight": 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {f"{name}.weight": torch.ones(64) for name in norms}


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("rocm_infer", *OTHERS)]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, state in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = state
