# SPDX-License-Identifier: Apache-2.0
"""Train the embedded model: a DeepSeek-V3 of three million parameters that answers the exercises of `tasks.py`.

    python -m training.tiny_deepseek train --steps 12000      # resumes from --work-dir when a checkpoint lies there
    python -m training.tiny_deepseek export                   # writes rocm_infer/assets/tiny-deepseek
    python -m training.tiny_deepseek evaluate --num-prompts 500

Two processes of one thread each share a step (gloo all-reduce): operators this small gain nothing from threads.
Weights are bfloat16 with float32 masters in the optimiser: Muon for matrices, Adam for the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from training import tasks

ASSET_DIR = Path(__file__).resolve().parent.parent / "rocm_infer" / "assets" / "tiny-deepseek"
LOG_FILE = Path(__file__).resolve().parent / "tiny_deepseek.log"
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>")  # ids 256, 257, ...
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = range(256, 262)
CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "{%- if message['role'] == 'assistant' -%}\n"
    "{{- '<|assistant|>' + message['content'] + eos_token -}}\n"
    "{%- elif message['role'] in ['system', 'developer'] -%}\n"
    "{{- '<|system|>' + message['content'] -}}\n"
    "{%- else -%}\n"
    "{{- '<|user|>' + message['content'] -}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}\n"
)


@dataclass(frozen=True)
class ModelShape:
    """The fields of HF `config.json` that this model needs, under their names there."""

    vocab_size: int = 384
    hidden_size: int = 128
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096


def rope_table(shape: ModelShape, num_positions: int) -> Tensor:
    """[num_positions, 2, qk_rope_head_dim / 2] f32: cosines and sines."""
    exponents = torch.arange(0, shape.qk_rope_head_dim, 2, dtype=torch.float32) / shape.qk_rope_head_dim
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), 1.0 / shape.rope_theta**exponents)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


@torch.compile(dynamic=True)
def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Interleaved RoPE of x[B,T,H,R] by table[T,2,R/2] of cosines and sines."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = table[:, 0, None], table[:, 1, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


@torch.compile(dynamic=True)
def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.compile(dynamic=True)
def weighted_silu_mul(gate_up: Tensor, weights: Tensor) -> Tensor:
    """gate_up[T,E,2*I], weights[T,E] -> [T,E,I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up * weights[..., None]).to(gate_up.dtype)


@torch.compile(dynamic=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.flatten(0, -2), self.weight, self.eps).view(x.shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k [B,H,T,D] and v[B,H,T,Dv], in whichever form is faster on a CPU at this length."""
    if q.shape[2] > 600:
        padded = F.pad(v, (0, q.shape[3] - v.shape[3]))  # the fused form needs one head size
        return F.scaled_dot_product_attention(q, k, padded, is_causal=True)[..., : v.shape[3]]
    mask = torch.full((q.shape[2], q.shape[2]), -math.inf, dtype=q.dtype).triu(1)
    return ((q * q.shape[3] ** -0.5) @ k.mT + mask).softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form."""

    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.shape = s
        heads, qk_dim = s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
        self.q_a_proj = nn.Linear(s.hidden_size, s.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(s.q_lora_rank, s.rms_norm_eps)
        self.q_b_proj = nn.Linear(s.q_lora_rank, heads * qk_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(s.kv_lora_rank, s.rms_norm_eps)
        self.kv_b_proj = nn.Linear(s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * s.v_head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        s = self.shape
        (batch, length, _), heads = x.shape, s.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, heads, -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((s.kv_lora_rank, s.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, heads, -1)
        k_nope, v = kv.split((s.qk_nope_head_dim, s.v_head_dim), dim=-1)
        q_nope, q_rope = q.split((s.qk_nope_head_dim, s.qk_rope_head_dim), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, table)), dim=-1).transpose(1, 2)
        k_rope = rotate(k_rope.unsqueeze(2), table).expand(-1, -1, heads, -1)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
        return self.o_proj(attend(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))


class MoE(nn.Module):
    """Sigmoid routing within the best groups (noaux_tc), one shared expert; counts each expert's load for the bias."""

    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.shape = s
        self.gate = nn.Parameter(torch.empty(s.n_routed_experts, s.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(s.n_routed_experts))
        self.register_buffer("load", torch.zeros(s.n_routed_experts), persistent=False)
        self.experts_gate_up = nn.Parameter(torch.empty(s.n_routed_experts, 2 * s.moe_intermediate_size, s.hidden_size))
        self.experts_down = nn.Parameter(torch.empty(s.n_routed_experts, s.hidden_size, s.moe_intermediate_size))
        self.shared_experts = MLP(s.hidden_size, s.n_shared_experts * s.moe_intermediate_size)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x[T,C] -> weights[T,k] f32, ids[T,k]."""
        s = self.shape
        scores = F.linear(x.float(), self.gate.float()).sigmoid()
        with torch.no_grad():
            choice = (scores + self.e_score_correction_bias).unflatten(-1, (s.n_group, -1))
            best = choice.topk(2, dim=-1).values.sum(-1).topk(s.topk_group, dim=-1).indices
            allowed = torch.zeros(choice.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            ids = choice.masked_fill(~allowed[..., None], -math.inf).flatten(1).topk(s.num_experts_per_tok).indices
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * s.routed_scaling_factor, ids

    def forward(self, x: Tensor) -> Tensor:
        """Every expert computes every token, weighted by zero where not chosen: on a CPU two large products beat many
        small ragged ones at this size."""
        s, flat = self.shape, x.flatten(0, 1)
        weights, ids = self.route(flat)
        dense = torch.zeros(len(flat), s.n_routed_experts).scatter(1, ids, weights)
        if self.training:
            self.load += torch.bincount(ids.flatten(), minlength=s.n_routed_experts)
        inner = F.linear(flat, self.experts_gate_up.flatten(0, 1)).unflatten(1, (s.n_routed_experts, -1))
        inner = weighted_silu_mul(inner, dense).flatten(1)
        routed = F.linear(inner, self.experts_down.transpose(0, 1).flatten(1))
        return (routed + self.shared_experts(flat)).view_as(x)


class Block(nn.Module):
    def __init__(self, s: ModelShape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = MLP(s.hidden_size, s.intermediate_size) if dense else MoE(s)

    def attend(self, x: Tensor, table: Tensor) -> Tensor:
        return x + self.self_attn(self.input_layernorm(x), table)

    def transform(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.transform(self.attend(x, table))


class MTP(nn.Module):
    """Multi-token prediction: from a position's hidden state and the next token, the hidden state of the next position."""

    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.enorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.hnorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * s.hidden_size, s.hidden_size, bias=False)
        self.block = Block(s, dense=False)
        self.shared_head_norm = RMSNorm(s.hidden_size, s.rms_norm_eps)

    def forward(self, hidden: Tensor, next_embedding: Tensor, table: Tensor) -> Tensor:
        x = self.eh_proj(torch.cat((self.enorm(next_embedding), self.hnorm(hidden)), dim=-1))
        return self.shared_head_norm(self.block(x, table))


class TinyDeepseek(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, dense=i < shape.first_k_dense_replace) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.mtp = MTP(shape)
        self.register_buffer("table", rope_table(shape, shape.max_position_embeddings), persistent=False)

    def forward(self, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        """ids[B,T] -> normalised hidden states [B,T,C], or only those `wanted` (indices into B*T): [len(wanted),C].

        `lm_head` of them are the logits."""
        x = self.embed_tokens(ids)
        table = self.table[: ids.shape[1]]
        for layer in self.layers[:-1]:
            x = layer(x, table)
        x = self.layers[-1].attend(x, table)
        if wanted is not None:
            x = x.flatten(0, 1)[wanted].unsqueeze(0)
        x = self.norm(self.layers[-1].transform(x))
        return x if wanted is None else x.squeeze(0)

    def predict_second(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The MTP layer's hidden states [B,T-1,C], whose logits at i are of token i + 2."""
        return self.mtp(hidden[:, :-1], self.embed_tokens(ids[:, 1:]), self.table[: ids.shape[1] - 1])


def initialise(model: TinyDeepseek, seed: int) -> None:
    """Matrices normal with deviation fan_in^-0.5; what writes to the residual stream starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.ones_(p)
        elif any(part in name for part in ("o_proj", "down", "lm_head")):
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, std=0.5 if "embed" in name else p.shape[-1] ** -0.5, generator=generator)


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each g[n,N,K], by five quintic Newton-Schulz steps (Muon)."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Optimiser:
    """Float32 masters of bfloat16 weights: Muon on hidden matrices, Adam on embeddings, head, router and norms."""

    def __init__(self, model: TinyDeepseek, lr: float, decay: float = 0.02) -> None:
        self.params = dict(model.named_parameters())
        self.lr, self.decay, self.steps = lr, decay, 0
        self.master = {n: p.detach().float().clone() for n, p in self.params.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.master.items() if not self.is_hidden_matrix(n)}

    def is_hidden_matrix(self, name: str) -> bool:
        return (self.params[name].dim() > 1 and not any(part in name for part in ("embed", "lm_head", "gate"))) or (
            "gate_up" in name
        )

    def step(self, grads: dict[str, Tensor], scale: float, rank: int, world: int) -> None:
        """One update with learning rate `scale * lr`; each rank orthogonalises its share of the matrices."""
        self.steps += 1
        shapes: dict[torch.Size, list[str]] = {}
        for name, grad in grads.items():
            if name in self.second:
                self.adam(name, grad, 0.15 * scale * self.lr)
            else:
                shapes.setdefault(grad.shape[-2:], []).append(name)
        for shape, names in shapes.items():
            self.muon(names, [grads[n].reshape(-1, *shape) for n in names], scale * self.lr, rank, world)
        for name, p in self.params.items():
            p.data.copy_(self.master[name])

    def adam(self, name: str, grad: Tensor, lr: float) -> None:
        m, v = self.first[name], self.second[name]
        m.lerp_(grad, 0.1)
        v.lerp_(grad.square(), 0.02)
        m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.98**self.steps)
        self.master[name].addcdiv_(m_hat, v_hat.sqrt() + 1e-8, value=-lr)

    def muon(self, names: list[str], grads: list[Tensor], lr: float, rank: int, world: int) -> None:
        for name, grad in zip(names, grads):
            self.first[name].lerp_(grad.view_as(self.first[name]), 0.05)
        nesterov = torch.cat([g.lerp(self.first[n].view_as(g), 0.95) for n, g in zip(names, grads)])
        bounds = [len(nesterov) * r // world for r in range(world + 1)]
        update = torch.zeros_like(nesterov)
        if bounds[rank] < bounds[rank + 1]:
            update[bounds[rank] : bounds[rank + 1]] = orthogonalise(nesterov[bounds[rank] : bounds[rank + 1]])
        if world > 1:
            dist.all_reduce(update)
        update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
        for name, part in zip(names, update.split([len(g) for g in grads])):
            master = self.master[name]
            master.mul_(1 - lr * self.decay).sub_(part.view_as(master), alpha=lr)

    def state(self) -> dict:
        return {"steps": self.steps, "master": self.master, "first": self.first, "second": self.second}

    def load_state(self, state: dict) -> None:
        self.steps = state["steps"]
        for name in ("master", "first", "second"):
            for key, value in getattr(self, name).items():
                value.copy_(state[name][key])


def encode(exercise: tasks.Exercise, system: str = "") -> tuple[list[int], list[bool]]:
    """Token ids of the conversation, and which of them the loss counts: answers and their <eos>."""
    ids = [BOS] + ([SYSTEM, *system.encode()] if system else [])
    counted = [False] * len(ids)
    for prompt, answer in ((exercise.prompt, exercise.answer), *exercise.follow_ups):
        question, reply = [USER, *prompt.encode(), ASSISTANT], [*answer.encode(), EOS]
        ids += question + reply
        counted += [False] * len(question) + [True] * len(reply)
    return ids, counted


def longest_list(stages: str, step: int) -> int:
    """The number of pairs of the longest recall list at `step`; stages as in `6@0,40@2000`."""
    reached = [stage.split("@") for stage in stages.split(",")]
    return [int(pairs) for pairs, start in reached if step >= int(start)][-1]


def draw_exercise(rng: random.Random, task: str, most_pairs: int) -> tasks.Exercise:
    if task == "recall":
        num_pairs = max(1, round(most_pairs * rng.random() ** 1.5))
        return tasks.make_recall(rng, False, num_pairs, rng.randint(0, 10 + num_pairs // 8))
    if task == "count":
        return tasks.make_count(rng, False, rng.randint(0, 8))
    if task == "about":
        return tasks.make_about(rng)
    exercise = tasks.MAKERS[task](rng, False)
    if rng.random() < 0.03:  # a conversation
        others = [tasks.MAKERS[rng.choice(list(tasks.MAKERS))](rng, False) for _ in range(rng.randint(1, 4))]
        return tasks.Exercise(task, exercise.prompt, exercise.answer, tuple((o.prompt, o.answer) for o in others))
    return exercise


def bucket_length(length: int) -> int:
    """The padded length of a row: few distinct ones, as the matrix library prepares each shape once."""
    unit = 4 if length <= 48 else 8 if length <= 96 else 16 if length <= 192 else 64
    return -(-length // unit) * unit


class Batches:
    """Rows wait by padded length until they fill a micro-batch of about `micro` tokens."""

    def __init__(self, shares: dict[str, float], num_tokens: int, micro: int) -> None:
        self.shares, self.num_tokens, self.micro = shares, num_tokens, micro
        self.waiting: dict[int, list[tuple[list[int], list[bool]]]] = {}
        self.drawn = dict.fromkeys(shares, 0.0)  # tokens so far, in units of the task's share

    def draw(self, rng: random.Random, most_pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield full micro-batches ids[B,T], counted[B,T] until they hold `num_tokens` tokens."""
        left = self.num_tokens
        while left > 0:
            task = min(self.drawn, key=self.drawn.__getitem__)
            system = rng.choice(tasks.SYSTEM_PROMPTS) if rng.random() < 0.03 else ""
            row = encode(draw_exercise(rng, task, most_pairs), system)
            self.drawn[task] += len(row[0]) / self.shares[task]
            length = bucket_length(len(row[0]))
            bucket = self.waiting.setdefault(length, [])
            bucket.append(row)
            if len(bucket) >= self.micro // length:
                left -= length * len(bucket)
                yield pad_rows(self.waiting.pop(length), length)


def pad_rows(rows: list[tuple[list[int], list[bool]]], length: int) -> tuple[Tensor, Tensor]:
    ids = [row + [PAD] * (length - len(row)) for row, _ in rows]
    counted = [mask + [False] * (length - len(mask)) for _, mask in rows]
    return torch.tensor(ids), torch.tensor(counted)


def batch_loss(model: TinyDeepseek, ids: Tensor, counted: Tensor, mtp_weight: float) -> tuple[Tensor, float]:
    """Summed cross-entropy of the counted tokens (with the MTP layer's, weighted), and the first part alone."""
    target = ids[:, 1:][counted[:, 1:]]
    at = F.pad(counted[:, 1:], (0, 1)).flatten().nonzero().squeeze(1)
    if mtp_weight:
        hidden = model(ids)
        first = hidden.flatten(0, 1)[at]
    else:  # the last layer's experts see the counted positions alone, their number padded to few distinct ones
        first = model(ids, F.pad(at, (0, -len(at) % 128)))[: len(at)]
    loss = F.cross_entropy(model.lm_head(first).float(), target, reduction="sum")
    main = loss.item()
    if mtp_weight:
        loss = loss + mtp_weight * mtp_loss(model, ids, counted, hidden)
    return loss, main


def mtp_loss(model: TinyDeepseek, ids: Tensor, counted: Tensor, hidden: Tensor) -> Tensor:
    """Summed cross-entropy of the MTP layer's predictions of the counted tokens, two positions ahead."""
    second = model.predict_second(ids, hidden)[:, :-1][counted[:, 2:]]
    return F.cross_entropy(model.lm_head(second).float(), ids[:, 2:][counted[:, 2:]], reduction="sum")


def mtp_only_loss(model: TinyDeepseek, ids: Tensor, counted: Tensor) -> tuple[Tensor, float]:
    """The MTP layer's loss on the finished model's hidden states."""
    with torch.no_grad():
        hidden = model(ids)
    loss = mtp_loss(model, ids, counted, hidden)
    return loss, loss.item()


def update_router_bias(model: nn.Module, rate: float, world: int) -> None:
    """Auxiliary-loss-free balancing: overloaded experts become a little less eligible."""
    for module in model.modules():
        if isinstance(module, MoE):
            if world > 1:
                dist.all_reduce(module.load)
            module.e_score_correction_bias += rate * (module.load.mean() - module.load).sign()
            module.load.zero_()


def learning_rate_scale(step: int, args: argparse.Namespace) -> float:
    """Warm up, hold, then fall linearly to zero over the last `decay` share of the steps."""
    fall = (args.steps - step) / (args.steps * args.decay)
    return max(0.0, min(1.0, (step + 1) / args.warmup, fall))


@torch.no_grad()
def greedy(model: TinyDeepseek, prompts: list[str], max_new: int) -> list[str]:
    """Answers by greedy decoding; one batch per prompt length, the whole sequence recomputed each step."""
    answers: dict[int, str] = {}
    model.eval()
    lengths: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt.encode()), []).append(i)
    for indices in lengths.values():
        ids = torch.tensor([[BOS, USER, *prompts[i].encode(), ASSISTANT] for i in indices])
        start = ids.shape[1]
        for _ in range(max_new):
            ids = torch.cat((ids, model.lm_head(model(ids)[:, -1]).argmax(-1, keepdim=True)), dim=1)
            if (ids[:, start:] == EOS).any(1).all():
                break
        for i, row in zip(indices, ids[:, start:].tolist()):
            row = row[: row.index(EOS)] if EOS in row else row
            answers[i] = bytes(t for t in row if t < 256).decode(errors="replace")
    model.train()
    return [answers[i] for i in range(len(prompts))]


def accuracy(model: TinyDeepseek, num_prompts: int, recall_tokens: tuple[int, int]) -> dict[str, float]:
    """Exact match per task on held-out exercises."""
    found = {}
    for task in tasks.TASKS:
        exercises = tasks.held_out_exercises(task, num_prompts, recall_tokens=recall_tokens)
        answers = greedy(model, [e.prompt for e in exercises], tasks.LONGEST_ANSWER)
        found[task] = sum(a == e.answer for a, e in zip(answers, exercises)) / max(1, num_prompts)
    return found


def checkpoint_views(model: TinyDeepseek) -> dict[str, Tensor]:
    """Every tensor of the checkpoint under its HF name: views of the model's fused weights."""
    views: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("load", "table")):
            continue
        if name.startswith("mtp."):
            name = f"layers.{model.shape.num_hidden_layers}." + name.removeprefix("mtp.").removeprefix("block.")
            name = name.replace("shared_head_norm", "shared_head.norm")
        name = name if name.startswith("lm_head") else f"model.{name}"
        name = name.replace("mlp.gate", "mlp.gate.weight") if name.endswith("mlp.gate") else name
        name = name.replace("mlp.e_score", "mlp.gate.e_score")
        if "experts_" in name:
            for e, expert in enumerate(tensor):
                views |= split_gate_up(name.replace("experts_", f"experts.{e}.") + "_proj.weight", expert)
        else:
            views |= split_gate_up(name, tensor)
    last = f"model.layers.{model.shape.num_hidden_layers}"  # DeepSeek ships the shared tensors again in the MTP layer
    return views | {
        f"{last}.embed_tokens.weight": model.embed_tokens.weight,
        f"{last}.shared_head.head.weight": model.lm_head.weight,
    }


def split_gate_up(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if "gate_up" not in name:
        return {name: tensor}
    gate, up = tensor.chunk(2)
    return {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}


def hf_config(shape: ModelShape) -> dict[str, object]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **asdict(shape),
        "num_key_value_heads": shape.num_attention_heads,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if printable, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def write_tokenizer(folder: Path) -> None:
    """One token per byte, its id the byte's value, then the special tokens."""
    tokenizer = Tokenizer(models.BPE({c: byte for byte, c in enumerate(byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "model_max_length": ModelShape().max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def export(model: TinyDeepseek, folder: Path) -> None:
    """Write the model as a Hugging Face checkpoint: bfloat16 weights, float32 router bias."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: view.detach().to(torch.float32 if name.endswith("bias") else torch.bfloat16).clone()
        for name, view in checkpoint_views(model).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", hf_config(model.shape))
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False, "temperature": 0.0})
    write_tokenizer(folder)


def load_exported(folder: Path, dtype: torch.dtype) -> TinyDeepseek:
    """The training implementation with the weights of an exported checkpoint; every name must be there and used."""
    model = TinyDeepseek(ModelShape()).to(dtype)
    restore_float_buffers(model)
    views, tensors = checkpoint_views(model), load_file(folder / "model.safetensors")
    if views.keys() != tensors.keys():
        raise ValueError(f"{folder}: unexpected or missing tensors {sorted(views.keys() ^ tensors.keys())}")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name])
    return model


def restore_float_buffers(model: TinyDeepseek) -> None:
    """Rotations, router bias and loads stay float32 whatever the weights' type."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
            module.load = module.load.float()
    model.table = rope_table(model.shape, model.shape.max_position_embeddings)


def train_rank(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64
    world = args.processes
    if world > 1:
        meeting = Path(args.work_dir, "rendezvous").absolute().as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    if args.start_from:
        model = load_exported(Path(args.start_from), torch.float32)
    else:
        model = TinyDeepseek(ModelShape())
        initialise(model, args.seed)
    optimiser = Optimiser(model, args.lr)
    model.bfloat16()
    step, seconds, trained = 0, 0.0, 0
    checkpoint = Path(args.work_dir) / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        optimiser.load_state(state["optimiser"])
        model.load_state_dict(state["model"])
        step, seconds, trained = state["step"], state["seconds"], state["tokens"]
    restore_float_buffers(model)
    shares = {name: float(share) for name, share in (part.split("=") for part in args.shares.split(","))}
    batches = Batches(shares, args.tokens // world, args.micro)
    recent = [0.0, 0.0]
    while step < args.steps:
        started = time.monotonic()
        rng = random.Random(f"{args.seed} {step} {rank}")
        most_pairs = longest_list(args.recall_stages, step)
        mtp_weight = args.mtp_weight if step % args.mtp_every == 0 else 0.0
        totals = torch.zeros(3)
        grads = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
        for ids, counted in batches.draw(rng, most_pairs):
            if args.mtp_only:
                loss, main = mtp_only_loss(model, ids, counted)
            else:
                loss, main = batch_loss(model, ids, counted, mtp_weight)
            loss.backward()
            totals += torch.tensor([main, counted.sum(), ids.numel()])
            for name, p in model.named_parameters():
                if p.grad is not None:
                    grads[name] += p.grad
                    p.grad = None
        if world > 1:
            flat = torch.cat([totals, *(g.flatten() for g in grads.values())])
            dist.all_reduce(flat)
            totals, *parts = flat.split([3, *(g.numel() for g in grads.values())])
            grads = {n: part.view_as(g) for (n, g), part in zip(grads.items(), parts)}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        scale = 1 / totals[1]
        grads = {n: g * scale for n, g in grads.items() if n.startswith("mtp.") or not args.mtp_only}
        if not (mtp_weight or args.mtp_only):
            grads = {n: g for n, g in grads.items() if not n.startswith("mtp.")}
        optimiser.step(grads, learning_rate_scale(step, args), rank, world)
        update_router_bias(model.mtp if args.mtp_only else model, args.bias_rate, world)
        step += 1
        seconds += time.monotonic() - started
        trained += int(totals[2])
        recent[0] += totals[0].item()
        recent[1] += totals[1].item()
        if rank == 0 and step % args.log_every == 0:
            line = (
                f"step {step} loss {recent[0] / recent[1]:.4f} grad {norm * scale:.3f} tokens {trained} seconds {seconds:.0f}"
            )
            if step % args.eval_every == 0 or step == args.steps:
                high = min(tasks.LONG_RECALL_TOKENS, 9 * most_pairs + 45)
                found = accuracy(model, args.eval_prompts, (30, high))
                line += " held-out " + " ".join(f"{k} {v:.3f}" for k, v in found.items())
            write_log(args.log, line)
            recent = [0.0, 0.0]
        if rank == 0 and (step % args.save_every == 0 or step == args.steps):
            state = {"step": step, "seconds": seconds, "tokens": trained, "optimiser": optimiser.state()}
            torch.save(state | {"model": model.state_dict()}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)


def write_log(path: str, line: str) -> None:
    print(line, flush=True)
    with open(path, "a") as log:
        log.write(line + "\n")


def train(args: argparse.Namespace) -> None:
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    os.makedirs(args.work_dir, exist_ok=True)
    Path(args.work_dir, "rendezvous").unlink(missing_ok=True)
    options = {k: v for k, v in vars(args).items() if k not in ("run", "log", "work_dir")}
    write_log(args.log, "options " + json.dumps(options))
    if args.processes == 1:
        train_rank(0, args)
    else:
        mp.spawn(train_rank, (args,), nprocs=args.processes)


def export_command(args: argparse.Namespace) -> None:
    model = TinyDeepseek(ModelShape())
    state = torch.load(Path(args.work_dir) / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    export(model, Path(args.asset_dir))
    size = sum(path.stat().st_size for path in Path(args.asset_dir).iterdir())
    print(f"step {state['step']}: {args.asset_dir}, {size} bytes")


def evaluate(args: argparse.Namespace) -> None:
    model = load_exported(Path(args.asset_dir), getattr(torch, args.dtype))
    exercises = {task: tasks.held_out_exercises(task, args.num_prompts) for task in tasks.TASKS}
    longest = tasks.LONG_RECALL_TOKENS
    exercises["recall at 1,500"] = tasks.held_out_exercises("recall", args.num_prompts, 1, (longest - 50, longest))
    for task, asked in exercises.items():
        answers = greedy(model, [e.prompt for e in asked], tasks.LONGEST_ANSWER)
        wrong = [(e.prompt[-60:], e.answer, a) for e, a in zip(asked, answers) if e.answer != a]
        print(f"{task:16} {1 - len(wrong) / len(asked):.4f}", flush=True)
        for prompt, answer, got in wrong[: args.show]:
            print(f"    ...{prompt!r}: expected {answer!r}, got {got!r}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train")
    t.set_defaults(run=train)
    t.add_argument("--work-dir", default="build/tiny-deepseek")
    t.add_argument("--log", default=str(LOG_FILE))
    t.add_argument("--start-from", default="", help="folder of an exported model whose weights replace the random ones")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--processes", type=int, default=2)
    t.add_argument("--steps", type=int, default=12000)
    t.add_argument("--recall-stages", default="6@0,20@2000,60@2500,180@3000", help="pairs of the longest list @ from step")
    t.add_argument("--tokens", type=int, default=16384, help="tokens of a step, all processes together")
    t.add_argument("--micro", type=int, default=4096, help="tokens of one forward pass")
    t.add_argument("--lr", type=float, default=0.01)
    t.add_argument("--warmup", type=int, default=50)
    t.add_argument("--decay", type=float, default=0.3)
    t.add_argument("--bias-rate", type=float, default=0.001)
    t.add_argument("--mtp-weight", type=float, default=0.1)
    t.add_argument("--mtp-every", type=int, default=16)
    t.add_argument("--shares", default="sum=0.25,difference=0.25,recall=0.2,reverse=0.09,sort=0.1,count=0.1,about=0.01")
    t.add_argument("--log-every", type=int, default=50)
    t.add_argument("--eval-every", type=int, default=250)
    t.add_argument("--eval-prompts", type=int, default=100)
    t.add_argument("--save-every", type=int, default=100)
    t.add_argument("--mtp-only", action="store_true", help="freeze the model and train its MTP layer alone")
    t.add_argument("--eager", action="store_true", help="do not compile (no C++ compiler, or a debugger)")
    for name, run in (("export", export_command), ("evaluate", evaluate)):
        command = commands.add_parser(name)
        command.set_defaults(run=run, eager=True)
        command.add_argument("--work-dir", default="build/tiny-deepseek")
        command.add_argument("--asset-dir", default=str(ASSET_DIR))
        command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
        command.add_argument("--num-prompts", type=int, default=500)
        command.add_argument("--show", type=int, default=5, help="wrong answers printed per task")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    torch.compiler.set_stance("force_eager" if args.eager else "default")
    args.run(args)


if __name__ == "__main__":
    main()
