# SPDX-License-Identifier: Apache-2.0
"""Choice of experts per token: softmax top-k, and DeepSeek's grouped sigmoid with bias ("noaux_tc")."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Call, Cost, op

SCORES = ("softmax", "sigmoid")


def _inputs(dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """dims: T, E, top_k; with num_groups, top_groups and num_shared as DeepSeek-V3 routes, else softmax."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {
        "logits": torch.randn(dims["T"], dims["E"], generator=generator).to(device, dtype),
        "top_k": dims["top_k"],
        "renormalise": True,
    }
    if dims.get("num_groups", 1) > 1:
        made["bias"] = (0.1 * torch.randn(dims["E"], generator=generator)).to(device)
        made.update(num_groups=dims["num_groups"], top_groups=dims["top_groups"], score="sigmoid", scale=2.5)
        made["num_shared"] = dims.get("num_shared", 0)
    return made


def _cost(dims: dict[str, int], *, itemsize: int = 4) -> Cost:
    chosen = dims["top_k"] + dims.get("num_shared", 0)
    return Cost(bytes=dims["T"] * (dims["E"] * itemsize + 8 * chosen), flops=dims["T"] * dims["E"] * (8 + chosen))


def highest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest of each row, in falling order, equal ones by index."""
    order: torch.Tensor = x.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count]


def _keep_best_groups(choice: torch.Tensor, num_groups: int, top_groups: int, best_of: int) -> torch.Tensor:
    """`choice` [T, E] with -inf in all but the `top_groups` groups whose `best_of` largest add up highest."""
    grouped = choice.view(choice.shape[0], num_groups, choice.shape[1] // num_groups)
    value = grouped.sort(dim=-1, descending=True).values[..., :best_of].sum(-1)
    kept = torch.zeros_like(value, dtype=torch.bool).scatter_(-1, highest(value, top_groups), True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).view(choice.shape)


def _check(call: Call) -> str | None:
    num_experts, top_k, score = call.dims["E"], call.scalars["top_k"], call.scalars["score"]
    num_groups, top_groups = call.scalars["num_groups"], call.scalars["top_groups"]
    if score not in SCORES:
        return f"score: expected {' or '.join(SCORES)}, got {score!r}"
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
        expected = f"groups that divide {num_experts} experts and at least one of them kept"
        return f"num_groups, top_groups: expected {expected}, got {num_groups}, {top_groups}"
    available = num_experts // num_groups * top_groups
    if not 1 <= top_k <= available:
        return f"top_k: expected 1 to the {available} experts of the kept groups, got {top_k}"
    return None


@op(
    "logits[T, E]:bf16|f16|f32, bias?[E]:f32 -> weights[T, top_k + num_shared]:f32, ids[T, top_k + num_shared]:i32",
    inputs=_inputs,
    cost=_cost,
    check=_check,
)
def moe_route(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    score: str = "softmax",
    renormalise: bool,
    scale: float = 1.0,
    num_shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids = the top_k experts by choice, in falling order; weights = their scores * scale.

    score: softmax over the experts, or sigmoid of each. bias: choice = score + bias, weights stay without it. Without a
        bias choice is the logit itself, which orders alike and has no rounding that could tie.
    num_groups, top_groups: only the experts of the best top_groups groups of E / num_groups neighbours may be chosen; a group
        is as good as the sum of its two largest choices with a bias, as its largest without.
    renormalise: weights are divided by their sum + 1e-20 before `scale`.
    num_shared: experts every token goes to; they follow as columns with ids E, E + 1, ... and weight 1.
    Numerics: fp32.
    Edges: T = 0 gives empty outputs. Ties, of groups too, go to the lowest id. NaN ranks below everything, so ids stay in
        range; a chosen NaN has weight NaN, and makes its own token NaN and no other.
    Errors: ValueError if the groups do not divide the experts or cannot supply top_k, or for an unknown score.
    Source: Mixtral, Qwen3-MoE (softmax); DeepSeek-V2 and V3 reports (groups, "noaux_tc").
    """
    num_experts = logits.shape[1]
    wide = logits.float()
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    choice = wide if bias is None else scores + bias
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    if num_groups > 1:
        choice = _keep_best_groups(choice, num_groups, top_groups, 1 if bias is None else 2)
    ids = highest(choice, top_k)
    weights = scores.gather(-1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    shared = torch.arange(num_experts, num_experts + num_shared, device=ids.device).expand(len(ids), -1)
    return torch.cat([weights * scale, torch.ones_like(shared, dtype=torch.float32)], -1), torch.cat([ids, shared], -1).int()
