# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: every file, name, shape and setting is accounted for, and what is wrong with one is said in one error."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from rocm_infer.config import ConfigError
from rocm_infer.cpu_kernels._library import lanes
from rocm_infer.models import FAMILIES, read_config
from rocm_infer.models.loader import INDEX_FILE, CheckpointError
from rocm_infer.ops.quant_fp8 import BLOCK
from tests.models import harness
from tests.models.test_families import LATENT, LLAMA3, SMALL, V3, YARN

ONE_LAYER = {**SMALL, "num_hidden_layers": 1}
WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    harness.make_checkpoint(tmp_path, hf.LlamaConfig(**ONE_LAYER))
    return tmp_path


def edit(directory: Path, **changes: Any) -> None:
    """Change config.json; a value of ... removes the key."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS)


def first_logits(directory: Path, **changes: Any) -> torch.Tensor:
    found = harness.drive(harness.load(directory, **changes), harness.prompts(), 1)
    return torch.stack([sequence.logits[0] for sequence in found])


def test_sharded_is_the_same_as_single(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sharded = tmp_path_factory.mktemp("sharded")
    harness.make_checkpoint(sharded, hf.LlamaConfig(**ONE_LAYER), max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(first_logits(llama), first_logits(sharded))


def test_missing_shard(tmp_path: Path) -> None:
    harness.make_checkpoint(tmp_path, hf.LlamaConfig(**ONE_LAYER), max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*: this shard is listed in .*index\.json but missing"):
        harness.load(tmp_path)


def test_index_that_lies(tmp_path: Path) -> None:
    harness.make_checkpoint(tmp_path, hf.LlamaConfig(**ONE_LAYER), max_shard_size="20KB")
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["model.layers.7.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lists weights that its files do not hold: model\.layers\.7\.weight"):
        harness.load(tmp_path)
    (tmp_path / INDEX_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object with a weight_map"):
        harness.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_file(llama: Path, keep: int) -> None:
    path = llama / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        harness.load(llama)


def test_garbage_file(llama: Path) -> None:
    (llama / WEIGHTS).write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        harness.load(llama)


def test_no_weights(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected \*\.safetensors files, found none"):
        harness.load(llama)


def test_one_weight_in_two_files(llama: Path) -> None:
    (llama / "copy.safetensors").write_bytes((llama / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="is also in copy"):
        harness.load(llama)


def test_every_wrong_name_and_shape_is_in_one_error(llama: Path) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
        weights["lm_head.weight"] = weights["lm_head.weight"][:-1].contiguous()

    rewrite(llama, damage)
    with pytest.raises(CheckpointError) as caught:
        harness.load(llama)
    for text in (
        r"missing: model.norm.weight",
        "not known to this architecture: model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight: expected shape (97, 48), got (96, 48)",
    ):
        assert text in str(caught.value)


def test_integer_weights_are_not_read_as_numbers(llama: Path) -> None:
    rewrite(llama, lambda weights: weights.update({"lm_head.weight": torch.zeros(97, 48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected a floating type, got I8"):
        harness.load(llama)


def test_derived_buffers_and_a_tied_head_may_be_stored(tmp_path: Path) -> None:
    harness.make_checkpoint(tmp_path, hf.LlamaConfig(**{**ONE_LAYER, "tie_word_embeddings": True}))
    before = first_logits(tmp_path)

    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)

    rewrite(tmp_path, add)
    assert torch.equal(before, first_logits(tmp_path))


def test_other_stored_types(llama: Path) -> None:
    want = first_logits(llama)
    for dtype in (torch.float16, torch.bfloat16):
        rewrite(llama, lambda weights, dtype=dtype: weights.update({k: v.to(dtype) for k, v in weights.items()}))
        torch.testing.assert_close(first_logits(llama), want, rtol=0, atol=0.3)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    """Packed weights, bf16 activations and cache: the same model with 8 bits of mantissa."""
    harness.make_checkpoint(tmp_path, hf.LlamaConfig(**SMALL, attention_bias=True))
    given = harness.prompts()
    model = harness.load(tmp_path, dtype="bfloat16")
    wide, narrow = harness.drive(harness.load(tmp_path), given, 4), harness.drive(model, given, 4)
    for a, b in zip(wide, narrow):
        assert (a.logits[0] - b.logits[0]).norm() < 0.05 * a.logits[0].norm()
    assert model.dtype == torch.bfloat16
    assert model.weight_bytes == packed_bytes(load_file(tmp_path / WEIGHTS))


def packed_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """What a Llama's tensors take in bf16: matrices that are read together as one, in whole panels of this machine's vectors."""
    total = 0
    matrices: Counter[tuple[str, int]] = Counter()
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or "embed_tokens" in name:
            total += 2 * tensor.numel()
        else:
            joined = re.sub("(gate|up)_proj", "gate_up", re.sub("[qkv]_proj", "qkv", name))
            matrices[joined, tensor.shape[1]] += tensor.shape[0]
    width, step = (lanes(), 2) if lanes() else (1, 1)
    return total + sum(2 * -(-rows // width) * width * -(-depth // step) * step for (_, depth), rows in matrices.items())


def test_dtype_auto_is_that_of_the_checkpoint(llama: Path) -> None:
    assert harness.load(llama, dtype="auto").dtype == torch.float32
    edit(llama, dtype="bfloat16")
    assert harness.load(llama, dtype="auto").dtype == torch.bfloat16
    edit(llama, dtype=..., torch_dtype="float16")
    assert harness.load(llama, dtype="auto").dtype == torch.float16


def test_cache_size(tmp_path: Path) -> None:
    harness.make_checkpoint(tmp_path, hf.DeepseekV3Config(**V3))
    model = harness.load(tmp_path)
    assert model.cache_bytes_per_token(torch.bfloat16) == 3 * (24 + 8) * 2
    cache = model.make_cache(5, 4, torch.bfloat16)
    assert sum(layer.nbytes for layer in cache) == 5 * 4 * model.cache_bytes_per_token(torch.bfloat16)


def test_dummy_weights_depend_on_the_seed_alone(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    first, again, other = (first_logits(llama, load_format="dummy", random_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite().all()


def test_progress_bar_when_asked(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from rocm_infer.models import load_model

    load_model(harness.settings(llama))
    assert "loading weights" not in capfd.readouterr().err
    load_model(harness.settings(llama), progress=True)
    assert "loading weights: 100%" in capfd.readouterr().err


def test_multi_token_prediction_layers_are_skipped(tmp_path: Path) -> None:
    harness.make_checkpoint(tmp_path, hf.DeepseekV3Config(**V3))
    before = first_logits(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.layers.3.eh_proj.weight": torch.zeros(48, 96)}))
    with pytest.raises(CheckpointError, match=r"not known to this architecture: model\.layers\.3\.eh_proj\.weight"):
        harness.load(tmp_path)
    edit(tmp_path, num_nextn_predict_layers=1)
    assert torch.equal(before, first_logits(tmp_path))


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 codes of a matrix and the scale of each block of 128 x 128, as DeepSeek stores them."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[part].abs().amax() / 448
            codes[part] = (weight[part] / scale[i, j]).to(codes.dtype)
    return codes, scale


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
WIDE = {"hidden_size": 136, "intermediate_size": 150, "moe_intermediate_size": 130, "kv_lora_rank": 64, "q_lora_rank": 144}


@pytest.mark.parametrize(
    "config",
    [
        hf.DeepseekV3Config(**{**LATENT, **WIDE, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0}),
        hf.Qwen3Config(**{**ONE_LAYER, "hidden_size": 136, "intermediate_size": 150, "head_dim": 20}),
    ],
    ids=["deepseek-v3", "qwen3"],
)
def test_fp8_blocks(config: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An fp8 checkpoint gives what a checkpoint of its dequantised weights gives."""
    harness.make_checkpoint(tmp_path, config)
    plain = tmp_path_factory.mktemp("plain")
    (plain / "config.json").write_text((tmp_path / "config.json").read_text())
    weights, expanded = load_file(tmp_path / WEIGHTS), {}
    for name, weight in list(weights.items()):
        expanded[name] = weight
        if weight.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
            codes, scale = quantise(weight)
            weights |= {name: codes, f"{name}_scale_inv": scale}
            blocks = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            expanded[name] = codes.float() * blocks[: weight.shape[0], : weight.shape[1]]
    save_file(expanded, plain / WEIGHTS)
    save_file(weights, tmp_path / WEIGHTS)
    edit(tmp_path, quantization_config=FP8)
    torch.testing.assert_close(first_logits(tmp_path), first_logits(plain), rtol=0, atol=1e-5)

    weights.pop(next(name for name in weights if name.endswith("o_proj.weight_scale_inv")))
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"missing: .*o_proj\.weight_scale_inv"):
        harness.load(tmp_path)
    edit(tmp_path, quantization_config=...)
    with pytest.raises(CheckpointError, match="got F8_E4M3 without a quantization_config"):
        harness.load(tmp_path)


def test_unknown_architecture_names_the_nearest(llama: Path) -> None:
    edit(llama, architectures=["Qwen3MoEForCausalLM"])
    (llama / WEIGHTS).unlink()
    with pytest.raises(ConfigError) as caught:
        harness.load(llama)
    text = str(caught.value)
    assert "architecture Qwen3MoEForCausalLM is not supported. Nearest: Qwen3MoeForCausalLM." in text
    assert all(name in text for name in FAMILIES)


def test_no_config_and_broken_config(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        harness.load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"expected a checkpoint directory with a config\.json"):
        harness.load(llama)


def test_tensor_parallel_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size: expected 1"):
        harness.load(llama, tensor_parallel_size=2)


LLAMA, MISTRAL, QWEN2 = (
    hf.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]),
    hf.MistralConfig(**SMALL, architectures=["MistralForCausalLM"]),
    hf.Qwen2Config(**SMALL, architectures=["Qwen2ForCausalLM"]),
)
DEEPSEEK2, DEEPSEEK3 = (
    hf.DeepseekV2Config(**LATENT, architectures=["DeepseekV2ForCausalLM"]),
    hf.DeepseekV3Config(**V3, architectures=["DeepseekV3ForCausalLM"]),
)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"hidden_act": "gelu"}, r'hidden_act: expected "silu" or .*, got "gelu"'),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA, {"sliding_window": 128}, "sliding_window"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3"),
        (LLAMA, {"hidden_size": 50, "head_dim": None}, "num_attention_heads: expected a divisor of hidden_size = 50"),
        (LLAMA, {"hidden_size": "48"}, 'hidden_size: expected an integer >= 0, got "48"'),
        (LLAMA, {"torch_dtype": "int8", "dtype": None}, "torch_dtype: expected bfloat16, float16, float32"),
        (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: expected .*yarn, got .*dynamic"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "spin": 1}}, "keys of linear scaling, got .*spin"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config: expected fp8.*gptq"),
        (LLAMA, {"quantization_config": {**FP8, "activation_scheme": "static"}}, "static"),
        (MISTRAL, {"attention_bias": True}, "attention_bias: expected null or false"),
        (QWEN2, {"attention_bias": False}, "attention_bias: expected null or true"),
        (QWEN2, {"layer_types": ["linear_attention"] * 2, "use_sliding_window": True, "sliding_window": 4}, "layer_types"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected full_attention everywhere"),
        (DEEPSEEK2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK2, {"topk_method": "noaux_tc"}, "topk_method"),
        (DEEPSEEK2, {"scoring_func": "sigmoid"}, "scoring_func"),
        (DEEPSEEK3, {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK3, {"attention_bias": True}, "attention_bias"),
        (DEEPSEEK3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (DEEPSEEK3, {"n_group": 3}, "n_group: expected a divisor of n_routed_experts = 8, got 3"),
        (DEEPSEEK3, {"topk_group": 5}, "topk_group: expected 1 to n_group = 4, got 5"),
        (DEEPSEEK3, {"num_experts_per_tok": 5}, "num_experts_per_tok: expected 1 to 4, got 5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_are_not_supported_are_refused_by_name(config: Any, changes: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    read_config(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_unknown_settings_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LLAMA.save_pretrained(tmp_path)
    read_config(tmp_path)
    assert not caplog.records
    edit(tmp_path, spin_rate=3)
    read_config(tmp_path)
    assert "not known here and not used: spin_rate" in caplog.text


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
def test_old_and_new_spelling_of_rope(rope: dict[str, Any], tmp_path: Path) -> None:
    hf.LlamaConfig(**SMALL, rope_parameters=rope, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(
        tmp_path
    )
    new = read_config(tmp_path)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    old = {"type": rope["rope_type"], **scaling} if scaling else None
    edit(tmp_path, rope_parameters=..., dtype=..., rope_theta=rope["rope_theta"], rope_scaling=old, torch_dtype="bfloat16")
    assert read_config(tmp_path) == new
    assert new.rope.theta == rope["rope_theta"]


def test_stop_tokens_of_both_files(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    assert read_config(tmp_path).eos_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert read_config(tmp_path).eos_ids == (1, 7)


def test_partial_rotary_factor(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert read_config(tmp_path).rope.width == 6


def test_deepseek_v3_as_published() -> None:
    """The softmax scale and MTP layer of DeepSeek-V3's own config.json, in its old spelling."""
    from rocm_infer.models.deepseek import skipped, translate_v3
    from rocm_infer.models.hf_config import HfConfig

    published = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "ep_size": 1,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 163840,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "quantization_config": FP8,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    config = translate_v3(HfConfig(published))
    assert config.softmax_scale == pytest.approx(0.1352338, abs=1e-7)
    assert skipped(config) == (r"model\.layers\.61\..*",)
    assert config.max_len == 163840
    assert config.moe_layers == tuple(range(3, 61))
    assert config.rope.interleaved
