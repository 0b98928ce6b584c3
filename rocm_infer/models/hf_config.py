# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint's config.json: what all families share. What we do not compute is refused by name, never ignored."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from rocm_infer.config import ConfigError, ModelConfig, RopeConfig

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
FP8_BLOCK = 128

# Settings that would change the result, with the values that mean "off".
OFF: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attn_logit_softcapping": (None, 0.0),
    "final_logit_softcapping": (None, 0.0),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "parallel_attn": (None, False),
    "attention_chunk_size": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
    "ep_size": (None, 1),
    "pretraining_tp": (None, 1, 0),
}
# Settings of training, of the Hugging Face library, or that say again what another one says.
WITHOUT_EFFECT = (
    "architectures model_type torch_dtype dtype transformers_version _name_or_path auto_map use_cache return_dict id2label label2id "
    "problem_type output_hidden_states output_attentions output_router_logits chunk_size_feed_forward initializer_range "
    "attention_dropout hidden_dropout router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux pad_token_id bos_token_id "
    "eos_token_id unk_token_id sep_token_id attn_implementation _attn_implementation max_window_layers qk_head_dim "
    "num_key_value_heads head_dim rope_interleave"
)


class HfConfig:
    """config.json of a checkpoint, remembering which keys were read."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where
        self.used: set[str] = set()

    @classmethod
    def read(cls, directory: Path, file: str = "config.json") -> HfConfig:
        path = directory / file
        if not path.is_file():
            raise ConfigError("model", f"{directory}: expected a checkpoint directory with a {file}, found none")
        try:
            values = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ConfigError("model", f"{path}: not readable as JSON ({error}); fetch the checkpoint again") from None
        if not isinstance(values, dict):
            raise ConfigError("model", f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls(values, str(path))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; an absent one and null both give the default."""
        self.used.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(key, "an integer >= 0", value)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", value)
        return bool(value)

    def only(self, key: str, allowed: Iterable[Any]) -> None:
        """Refuse every value of a key but these; absent is allowed."""
        self.used.add(key)
        allowed = tuple(allowed)
        if key in self.values and self.values[key] not in allowed:
            expected = " or ".join("null" if value is None else json.dumps(value) for value in allowed)
            self.refuse(key, f"{expected} (anything else is not supported for this architecture)", self.values[key])

    def refuse(self, key: str, expected: str, got: object) -> None:
        raise ConfigError("model", f"{self.where}: {key}: expected {expected}, got {json.dumps(got)}")

    def finish(self) -> None:
        """Check what no family reads: settings that would change the result must be off; unknown ones are reported."""
        for key, allowed in OFF.items():
            if key not in self.used:
                self.only(key, (*allowed, None))
        unknown = [key for key in self.values if key not in self.used and key not in WITHOUT_EFFECT.split()]
        if unknown:
            logger.warning("%s: settings not known here and not used: %s", self.where, ", ".join(sorted(unknown)))


def rope_config(hf: HfConfig, width: int, *, interleaved: bool = False) -> RopeConfig:
    """Rotary embedding in either spelling: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` before.

    width: the rotated elements of a head, before a partial factor.
    """
    scaling = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    if any(isinstance(value, dict) for value in scaling.values()):
        hf.refuse("rope_parameters", "one set for all layers", scaling)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "none"
    scaling.pop("type", None)
    kind = "none" if kind == "default" else kind
    if kind not in ("none", "linear", "llama3", "yarn"):
        hf.refuse("rope_scaling.rope_type", "default, linear, llama3 or yarn", kind)
    theta = float(scaling.pop("rope_theta", None) or hf.number("rope_theta", 10000.0))
    hf.used.add("rope_theta")
    partial = scaling.pop("partial_rotary_factor", None) or hf.number("partial_rotary_factor", 1.0)
    hf.used.add("partial_rotary_factor")
    if scaling.pop("truncate", True) is not True:
        hf.refuse("rope_scaling.truncate", "true", False)
    original = scaling.pop("original_max_position_embeddings", None) or hf.integer("max_position_embeddings")
    known = {f.name for f in fields(RopeConfig)}
    unknown = [key for key, value in scaling.items() if key not in known and value is not None]
    if unknown:
        hf.refuse("rope_scaling", f"keys of {kind} scaling", unknown)
    options = {key: float(value) for key, value in scaling.items() if value is not None}
    return RopeConfig(theta, int(width * partial), interleaved, kind, original_max_len=int(original), **options)


def fp8_block(hf: HfConfig) -> tuple[int, int] | None:
    """The block of an fp8 checkpoint as DeepSeek ships them, None for an unquantised one. Other schemes are refused."""
    found = hf.get("quantization_config")
    if found is None:
        return None
    expected = "fp8 with weight_block_size [128, 128] and dynamic activations, or an unquantised checkpoint"
    named = {
        key: found.get(key) for key in ("quant_method", "weight_block_size", "activation_scheme", "fmt", "bits") if key in found
    }
    block = found.get("weight_block_size")
    right = found.get("quant_method") == "fp8" and block == [FP8_BLOCK, FP8_BLOCK]
    if not right or found.get("activation_scheme", "dynamic") != "dynamic" or found.get("fmt", "e4m3") != "e4m3":
        hf.refuse("quantization_config", expected, named)
    return (block[0], block[1])


def unquantised(hf: HfConfig) -> tuple[str, ...]:
    """Modules that an fp8 checkpoint leaves in its own type."""
    return tuple((hf.get("quantization_config") or {}).get("modules_to_not_convert") or ())


def max_len(hf: HfConfig, rope: RopeConfig) -> int:
    """Positions the model may see. Some checkpoints state the length before scaling, then the scaled one counts."""
    stated = hf.integer("max_position_embeddings")
    if rope.kind in ("yarn", "linear"):
        return max(stated, int(rope.original_max_len * rope.factor))
    return stated


def token_ids(hf: HfConfig, key: str) -> tuple[int, ...]:
    """A token id, or a list of them."""
    value = hf.get(key)
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)


def common(hf: HfConfig, architecture: str, *, head_dim: int, rope: RopeConfig) -> dict[str, Any]:
    """The fields of ModelConfig that every family reads alike."""
    heads = hf.integer("num_attention_heads")
    kv_heads = hf.integer("num_key_value_heads", heads)
    if not heads or not kv_heads or heads % kv_heads:
        hf.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    if rope.width % 2 or rope.width > head_dim:
        hf.refuse("head_dim", f"an even rotary width of at most {head_dim}", rope.width)
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        hf.refuse("torch_dtype", ", ".join(DTYPES), dtype)
    bos = token_ids(hf, "bos_token_id")
    return {
        "architecture": architecture,
        "vocab_size": hf.integer("vocab_size"),
        "hidden": hf.integer("hidden_size"),
        "intermediate": hf.integer("intermediate_size"),
        "num_layers": hf.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_len": max_len(hf, rope),
        "rms_eps": hf.number("rms_norm_eps", 1e-6),
        "rope": rope,
        "tied": hf.flag("tie_word_embeddings", False),
        "fp8_block": fp8_block(hf),
        "unquantised": unquantised(hf),
        "dtype": dtype,
        "eos_ids": token_ids(hf, "eos_token_id"),
        "bos_id": bos[0] if bos else None,
    }


def head_dim(hf: HfConfig) -> int:
    """`head_dim`, or the hidden size split among the heads."""
    hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    given = hf.get("head_dim")
    if given is None and (not heads or hidden % heads):
        hf.refuse("num_attention_heads", f"a divisor of hidden_size = {hidden}, or a head_dim", heads)
    return int(given) if given else hidden // heads


def windowed_layers(hf: HfConfig, num_layers: int, *, by_default: bool) -> tuple[int, tuple[int, ...]]:
    """(sliding window, layers that have it). by_default: the window counts without `use_sliding_window`."""
    window = int(hf.get("sliding_window") or 0)
    kinds = hf.get("layer_types")
    if not window or not hf.flag("use_sliding_window", by_default):
        if kinds and any(kind != "full_attention" for kind in kinds):
            hf.refuse("layer_types", "full_attention everywhere where no sliding window is set", kinds)
        return 0, ()
    if kinds is None:
        first = 0 if by_default else hf.integer("max_window_layers", 0)
        return window, tuple(range(first, num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        hf.refuse("layer_types", f"{num_layers} times full_attention or sliding_attention", kinds)
    return window, tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def model_config(hf: HfConfig, values: dict[str, Any]) -> ModelConfig:
    """The finished translation; everything the family did not read is checked here."""
    hf.finish()
    return ModelConfig(**values)
