# SPDX-License-Identifier: Apache-2.0
"""Llama 3, Mistral, Qwen2, Qwen2.5 and Qwen3 (dense): one decoder, told apart by flags.

Sources: Touvron et al. 2023, Jiang et al. 2023, Qwen team 2024 and 2025, and the configurations of their checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rocm_infer.config import ModelConfig
from rocm_infer.models.builder import Builder
from rocm_infer.models.decoder import Decoder, Layer, build_decoder
from rocm_infer.models.hf_config import HfConfig, common, head_dim, model_config, rope_config, windowed_layers
from rocm_infer.models.layers import Attention
from rocm_infer.ops.rope import rope_table

MakeMlp = Callable[[Builder, str, int], Callable[[torch.Tensor], torch.Tensor]]


def attention_config(hf: HfConfig, architecture: str) -> dict[str, Any]:
    """What decoders with grouped-query attention have in common."""
    size = head_dim(hf)
    return common(hf, architecture, head_dim=size, rope=rope_config(hf, size))


def translate_llama(hf: HfConfig) -> ModelConfig:
    values = attention_config(hf, "LlamaForCausalLM")
    hf.only("sliding_window", (None,))
    bias = hf.flag("attention_bias", False)
    return model_config(hf, {**values, "qkv_bias": bias, "o_bias": bias, "mlp_bias": hf.flag("mlp_bias", False)})


def translate_mistral(hf: HfConfig) -> ModelConfig:
    values = attention_config(hf, "MistralForCausalLM")
    window, layers = windowed_layers(hf, values["num_layers"], by_default=True)
    hf.only("attention_bias", (None, False))
    hf.only("mlp_bias", (None, False))
    return model_config(hf, {**values, "sliding_window": window, "windowed_layers": layers})


def translate_qwen2(hf: HfConfig) -> ModelConfig:
    values = attention_config(hf, "Qwen2ForCausalLM")
    window, layers = windowed_layers(hf, values["num_layers"], by_default=False)
    hf.only("attention_bias", (None, True))
    hf.only("mlp_bias", (None, False))
    return model_config(hf, {**values, "qkv_bias": True, "sliding_window": window, "windowed_layers": layers})


def translate_qwen3(hf: HfConfig) -> ModelConfig:
    values = attention_config(hf, "Qwen3ForCausalLM")
    window, layers = windowed_layers(hf, values["num_layers"], by_default=False)
    bias = hf.flag("attention_bias", False)
    hf.only("mlp_bias", (None, False))
    return model_config(
        hf,
        {**values, "qkv_bias": bias, "o_bias": bias, "qk_norm": True, "sliding_window": window, "windowed_layers": layers},
    )


def build(builder: Builder, max_len: int, make_mlp: MakeMlp | None = None) -> Decoder:
    """The decoder of a grouped-query family. `make_mlp(builder, module, layer)` replaces the dense MLP."""
    config = builder.config
    table = rope_table(config.rope, max_len).to(builder.device)
    layers = []
    for index in range(config.num_layers):
        name = f"model.layers.{index}"
        input_norm = builder.tensor(f"{name}.input_layernorm.weight", (config.hidden,))
        attention = build_attention(builder, f"{name}.self_attn", index, table)
        post_norm = builder.tensor(f"{name}.post_attention_layernorm.weight", (config.hidden,))
        mlp = (make_mlp or dense_mlp)(builder, name, index)
        layers.append(Layer(input_norm, attention, post_norm, mlp))
    return build_decoder(builder, layers)


def dense_mlp(builder: Builder, layer: str, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    config = builder.config
    return builder.mlp(f"{layer}.mlp", config.hidden, config.intermediate, bias=config.mlp_bias)


def build_attention(builder: Builder, name: str, index: int, table: torch.Tensor) -> Attention:
    config = builder.config
    size = config.head_dim
    q_width, kv_width = config.num_heads * size, config.num_kv_heads * size
    projections = [f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"]
    norms = None
    if config.qk_norm:
        q_norm, k_norm = (builder.tensor(f"{name}.{part}_norm.weight", (size,)) for part in "qk")
        norms = (q_norm, k_norm, config.rms_eps)
    return Attention(
        builder.ops,
        builder.linear(projections, config.hidden, [q_width, kv_width, kv_width], bias=config.qkv_bias),
        builder.linear(f"{name}.o_proj", q_width, config.hidden, bias=config.o_bias),
        table,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=size,
        window=config.sliding_window if index in config.windowed_layers else 0,
        interleaved=config.rope.interleaved,
        qk_norm=norms,
    )
