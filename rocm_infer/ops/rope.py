# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: the op that turns queries and keys, and the table of angles it reads."""

from __future__ import annotations

import math
from typing import Any

import torch

from rocm_infer.config import RopeConfig
from rocm_infer.ops._op import Call, Cost, op
from rocm_infer.ops._paged import rotate


def _llama3(config: RopeConfig, frequency: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended by wavelength."""
    turns = config.original_max_len * frequency / (2 * math.pi)  # of one pair over the original context
    kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequency / config.factor + kept * frequency


def _yarn(config: RopeConfig, frequency: torch.Tensor) -> torch.Tensor:
    """Pairs that turn often over the original context keep their frequency, slow ones are divided by `factor`."""

    def pair_that_turns(turns: float) -> float:
        return config.width * math.log(config.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), config.width - 1)
    slowed = (torch.arange(config.width // 2) - low) / (high - low if high != low else 0.001)
    slowed = slowed.clamp(0, 1)
    return (1 - slowed) * frequency + slowed * frequency / config.factor


def mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature: 0.1 * weight * ln(factor) + 1. DeepSeek squares it into the softmax scale."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _amplitude(config: RopeConfig) -> float:
    """What cos and sin are multiplied by."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.factor, config.mscale) / mscale(config.factor, config.mscale_all_dim)
    return mscale(config.factor, 1.0)


def rope_frequencies(config: RopeConfig) -> torch.Tensor:
    """Radians per position of each of the R/2 pairs, fp32."""
    frequency = 1.0 / config.theta ** (torch.arange(0, config.width, 2).float() / config.width)
    if config.kind == "none":
        return frequency
    if config.kind == "linear":
        return frequency / config.factor
    if config.kind == "llama3":
        return _llama3(config, frequency)
    if config.kind == "yarn":
        return _yarn(config, frequency)
    raise ValueError(f"rope: kind: expected none, linear, llama3 or yarn, got {config.kind!r}")


def rope_table(config: RopeConfig, max_len: int) -> torch.Tensor:
    """Angles of every position: cos(R/2) | sin(R/2), [max_len, R] fp32, YaRN's amplitude included.

    Numerics: frequency and angle are fp32, as the models were trained with; at position 100,000 a float64 angle differs
        by 0.005 radians.
    Source: Su et al. 2021; Llama 3.1 and YaRN (Peng et al. 2023) as in Hugging Face transformers.
    """
    angle = torch.arange(max_len).float()[:, None] * rope_frequencies(config)
    return torch.cat([angle.cos(), angle.sin()], -1) * _amplitude(config)


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """dims: T, H, G, D, R."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(dims["T"], heads, dims["D"], generator=generator) for heads in (dims["H"], dims["G"]))
    return {
        "q": q.to(device, dtype),
        "k": k.to(device, dtype),
        "positions": torch.randint(0, 4096, (dims["T"],), generator=generator).to(device),
        "table": rope_table(RopeConfig(theta=10000.0, width=dims["R"]), 4096).to(device),
    }


def _cost(dims: dict[str, int], *, itemsize: int = 2) -> Cost:
    turned = dims["T"] * (dims["H"] + dims["G"]) * dims["R"]
    return Cost(bytes=2 * turned * itemsize + dims["T"] * (8 + 4 * dims["R"]), flops=3 * turned)


def _check(call: Call) -> str | None:
    width, head = call.dims["R"], call.dims["D"]
    return f"table: expected an even width R of at most D = {head}, got {width}" if width % 2 or width > head else None


@op(
    "q![T, H, D]:bf16|f16|f32, k![T, G, D]:q, positions[T]:i64, table[L, R]:f32 -> ()",
    inputs=_inputs,
    cost=_cost,
    check=_check,
)
def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, *, interleaved: bool = False) -> None:
    """Turn pair i of the first R elements of every head: (a, b) -> (a cos - b sin, b cos + a sin), angle table[position].

    table: cos(R/2) | sin(R/2) per position, made by `rope_table`. Elements from R on stay as they are.
    interleaved: pair i is elements (2i, 2i + 1); otherwise (i, i + R/2), the NeoX layout.
    Numerics: fp32 inside, one rounding at the end.
    Edges: T = 0 does nothing. positions must lie in [0, L).
    Writes: q and k.
    Errors: ValueError if R is odd or larger than D.
    Source: Su et al. 2021.
    """
    q.copy_(rotate(q, positions, table, interleaved))
    k.copy_(rotate(k, positions, table, interleaved))
