# SPDX-License-Identifier: Apache-2.0
"""Mixtral: the Mistral decoder with a mixture of experts in every layer. Source: Jiang et al. 2024."""

from __future__ import annotations

from rocm_infer.config import ModelConfig, MoeConfig
from rocm_infer.models import llama
from rocm_infer.models.builder import Builder
from rocm_infer.models.decoder import Decoder
from rocm_infer.models.hf_config import HfConfig, model_config, windowed_layers
from rocm_infer.models.layers import Moe


def translate(hf: HfConfig) -> ModelConfig:
    values = llama.attention_config(hf, "MixtralForCausalLM")
    window, layers = windowed_layers(hf, values["num_layers"], by_default=True)
    hf.only("attention_bias", (None, False))
    moe = MoeConfig(
        num_experts=hf.integer("num_local_experts"),
        top_k=hf.integer("num_experts_per_tok"),
        intermediate=values["intermediate"],
    )
    everywhere = tuple(range(values["num_layers"]))
    return model_config(
        hf, {**values, "sliding_window": window, "windowed_layers": layers, "moe": moe, "moe_layers": everywhere}
    )


def build(builder: Builder, max_len: int) -> Decoder:
    return llama.build(builder, max_len, make_moe)


def make_moe(builder: Builder, layer: str, index: int) -> Moe:
    config, moe = builder.config, builder.config.moe
    assert moe is not None
    name = f"{layer}.block_sparse_moe"
    router = builder.matrix(f"{name}.gate.weight", (moe.num_experts, config.hidden))
    experts = builder.experts(f"{name}.experts", ("w1", "w3", "w2"), moe.num_experts, config.hidden, moe.intermediate)
    return Moe(builder.ops, moe, router, None, experts, None)
