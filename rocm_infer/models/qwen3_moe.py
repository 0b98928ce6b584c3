# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: the Qwen3 decoder with a mixture of experts in some or all layers. Source: Qwen team 2025."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rocm_infer.config import ModelConfig, MoeConfig
from rocm_infer.models import llama
from rocm_infer.models.builder import Builder
from rocm_infer.models.decoder import Decoder
from rocm_infer.models.hf_config import HfConfig, model_config, windowed_layers
from rocm_infer.models.layers import Moe


def translate(hf: HfConfig) -> ModelConfig:
    values = llama.attention_config(hf, "Qwen3MoeForCausalLM")
    num_layers = values["num_layers"]
    window, windowed = windowed_layers(hf, num_layers, by_default=False)
    bias = hf.flag("attention_bias", False)
    moe = MoeConfig(
        num_experts=hf.integer("num_experts", hf.get("num_local_experts")),
        top_k=hf.integer("num_experts_per_tok"),
        intermediate=hf.integer("moe_intermediate_size"),
        renormalise=hf.flag("norm_topk_prob", False),
    )
    every, dense = hf.integer("decoder_sparse_step", 1), hf.get("mlp_only_layers", [])
    sparse = tuple(i for i in range(num_layers) if every and i not in dense and (i + 1) % every == 0)
    values |= {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "sliding_window": window, "windowed_layers": windowed}
    return model_config(hf, {**values, "moe": moe, "moe_layers": sparse})


def build(builder: Builder, max_len: int) -> Decoder:
    return llama.build(builder, max_len, make_mlp)


def make_mlp(builder: Builder, layer: str, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    config, moe = builder.config, builder.config.moe
    if index not in config.moe_layers:
        return llama.dense_mlp(builder, layer, index)
    assert moe is not None
    router = builder.matrix(f"{layer}.mlp.gate.weight", (moe.num_experts, config.hidden))
    names = ("gate_proj", "up_proj", "down_proj")
    experts = builder.experts(f"{layer}.mlp.experts", names, moe.num_experts, config.hidden, moe.intermediate)
    return Moe(builder.ops, moe, router, None, experts, None)
