# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers on tiny random checkpoints: logits, and greedy tokens over 64 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.models import harness

STEPS = 64
SMALL: dict[str, Any] = {
    "vocab_size": harness.VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
DEEPSEEK_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **SMALL,
    **EXPERTS,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
V3 = {**LATENT, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0}
V2 = {**LATENT, "norm_topk_prob": False, "topk_method": "greedy"}


def no_head_dim(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-gqa-llama3-rope": (hf.LlamaConfig, no_head_dim(rope_parameters=LLAMA3)),
    "llama-mha-tied-biases": (
        hf.LlamaConfig,
        no_head_dim(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "llama-uneven-yarn": (
        hf.LlamaConfig,
        no_head_dim(hidden_size=60, intermediate_size=37, num_attention_heads=3, num_key_value_heads=1, rope_parameters=YARN),
    ),
    "llama-linear-rope": (
        hf.LlamaConfig,
        no_head_dim(head_dim=10, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}),
    ),
    "mistral-window": (hf.MistralConfig, no_head_dim(sliding_window=11, head_dim=16)),
    "mistral-no-window": (hf.MistralConfig, no_head_dim(sliding_window=None)),
    "qwen2-tied": (hf.Qwen2Config, no_head_dim(tie_word_embeddings=True)),
    "qwen2-window-upper-layers": (
        hf.Qwen2Config,
        no_head_dim(num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    ),
    "qwen3": (hf.Qwen3Config, no_head_dim(head_dim=20)),
    "qwen3-bias-mha": (hf.Qwen3Config, no_head_dim(head_dim=8, num_key_value_heads=4, attention_bias=True)),
    "mixtral": (hf.MixtralConfig, no_head_dim(num_local_experts=6, num_experts_per_tok=2)),
    "mixtral-window-tied": (
        hf.MixtralConfig,
        no_head_dim(num_local_experts=3, num_experts_per_tok=1, sliding_window=13, tie_word_embeddings=True),
    ),
    "qwen3-moe": (hf.Qwen3MoeConfig, no_head_dim(**EXPERTS, num_experts=8, head_dim=16, norm_topk_prob=True)),
    "qwen3-moe-mixed-layers": (
        hf.Qwen3MoeConfig,
        no_head_dim(**EXPERTS, num_hidden_layers=4, num_experts=5, decoder_sparse_step=2, mlp_only_layers=[3], head_dim=12),
    ),
    "deepseek-v3": (hf.DeepseekV3Config, V3),
    "deepseek-v3-yarn-no-q-lora": (hf.DeepseekV3Config, {**V3, "q_lora_rank": None, "rope_parameters": DEEPSEEK_YARN}),
    "deepseek-v3-half-rope": (
        hf.DeepseekV3Config,
        {**V3, "rope_interleave": False, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    "deepseek-v2": (hf.DeepseekV2Config, V2),
    "deepseek-v2-groups-yarn-no-q-lora": (
        hf.DeepseekV2Config,
        {
            **V2,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": DEEPSEEK_YARN,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(name: str, tmp_path: Any) -> None:
    kind, values = CASES[name]
    judge = harness.make_checkpoint(tmp_path, kind(**values), seed=len(name))
    given = harness.prompts()
    found = harness.drive(harness.load(tmp_path), given, STEPS)
    for prompt, sequence in zip(given, found):
        tokens, logits = harness.judge(judge, prompt, STEPS)
        torch.testing.assert_close(torch.stack(sequence.logits), logits, rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")
        assert sequence.tokens[len(prompt) :] == tokens
