# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2, V3 and R1: multi-head latent attention, a few dense layers, then experts with a shared one.

Decoding attends in the latent space, with W_UK and W_UV multiplied onto the queries and the result ("absorbed"): the cache holds
one row [c | k_pe] per token for all heads. A prompt chunk has queries enough to pay for keys and values of every head
("expanded"). Sources: DeepSeek-V2 and DeepSeek-V3 technical reports, 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rocm_infer.config import MlaConfig, ModelConfig, MoeConfig, RopeConfig
from rocm_infer.models.builder import Builder
from rocm_infer.models.decoder import Decoder, Layer, build_decoder
from rocm_infer.models.hf_config import HfConfig, common, model_config, rope_config
from rocm_infer.models.layers import HeadLinear, Linear, Mlp, Moe, Sequences, Step
from rocm_infer.ops._op import Ops
from rocm_infer.ops.rope import mscale, rope_table

LORA_NORM_EPS = 1e-6  # of the norms between the two halves of a low-rank projection, whatever rms_norm_eps says


def translate_v2(hf: HfConfig) -> ModelConfig:
    hf.only("scoring_func", (None, "softmax"))
    hf.only("topk_method", (None, "greedy", "group_limited_greedy"))
    hf.only("norm_topk_prob", (None, False))
    grouped = hf.get("topk_method", "greedy") == "group_limited_greedy"
    return _translate(hf, "DeepseekV2ForCausalLM", grouped=grouped, score="softmax", renormalise=False)


def translate_v3(hf: HfConfig) -> ModelConfig:
    hf.only("scoring_func", (None, "sigmoid"))
    hf.only("topk_method", (None, "noaux_tc"))
    renormalise = hf.flag("norm_topk_prob", True)
    return _translate(hf, "DeepseekV3ForCausalLM", grouped=True, score="sigmoid", renormalise=renormalise)


def _translate(hf: HfConfig, architecture: str, *, grouped: bool, score: str, renormalise: bool) -> ModelConfig:
    hf.only("attention_bias", (None, False))
    hf.only("mlp_bias", (None, False))
    hf.only("moe_layer_freq", (None, 1))
    mla = MlaConfig(
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf.integer("kv_lora_rank"),
        nope_dim=hf.integer("qk_nope_head_dim"),
        rope_dim=hf.integer("qk_rope_head_dim"),
        v_dim=hf.integer("v_head_dim"),
    )
    rope = rope_config(hf, mla.rope_dim, interleaved=hf.flag("rope_interleave", True))
    values = common(hf, architecture, head_dim=mla.nope_dim + mla.rope_dim, rope=rope)
    num_layers, num_experts = values["num_layers"], hf.integer("n_routed_experts", 0)
    inner, num_shared = hf.integer("moe_intermediate_size", 0), hf.integer("n_shared_experts", 0)
    num_groups, top_groups, top_k = hf.integer("n_group", 1), hf.integer("topk_group", 1), hf.integer("num_experts_per_tok", 1)
    if not grouped:
        num_groups = top_groups = 1
    if not num_groups or num_experts % num_groups:
        hf.refuse("n_group", f"a divisor of n_routed_experts = {num_experts}", num_groups)
    if not 0 < top_groups <= num_groups:
        hf.refuse("topk_group", f"1 to n_group = {num_groups}", top_groups)
    if num_experts and not 0 < top_k <= num_experts // num_groups * top_groups:
        hf.refuse("num_experts_per_tok", f"1 to {num_experts // num_groups * top_groups}", top_k)
    moe = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate=inner,
        num_shared=num_shared,
        shared_intermediate=inner * num_shared,
        num_groups=num_groups,
        top_groups=top_groups,
        score=score,
        renormalise=renormalise,
        scale=hf.number("routed_scaling_factor", 1.0),
        has_bias=score == "sigmoid",
    )
    sparse = tuple(range(hf.integer("first_k_dense_replace", 0), num_layers)) if num_experts else ()
    return model_config(
        hf,
        {
            **values,
            "mla": mla,
            "moe": moe if num_experts else None,
            "moe_layers": sparse,
            "softmax_scale": softmax_scale(mla, rope),
            "num_mtp_layers": hf.integer("num_nextn_predict_layers", 0),
        },
    )


def softmax_scale(mla: MlaConfig, rope: RopeConfig) -> float:
    """(nope + rope)^-1/2, times the square of YaRN's mscale where the checkpoint sets `mscale_all_dim`."""
    scale = float(mla.nope_dim + mla.rope_dim) ** -0.5
    weight = mscale(rope.factor, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
    return float(scale * weight * weight)


def skipped(config: ModelConfig) -> tuple[str, ...]:
    """Names of the multi-token-prediction layers, which follow the last layer and are not used without speculation."""
    last = config.num_layers
    return tuple(rf"model\.layers\.{last + index}\..*" for index in range(config.num_mtp_layers))


@dataclass(frozen=True)
class Projections:
    """The linear maps of one latent attention.

    Without a low rank for q, `down` gives [q of all heads | c | k_pe] and `q_up` is absent; with it, [q latent | c | k_pe].
    kv_up [H * (nope + v), L]: per head the rows of W_UK, then those of W_UV; both once more for the absorbed form:
    key_up [H, L, nope] is W_UK^T, value_up [H, v, L] is W_UV.
    """

    down: Linear
    q_norm: torch.Tensor | None
    q_up: Linear | None
    kv_norm: torch.Tensor
    kv_up: Linear
    key_up: HeadLinear
    value_up: HeadLinear
    out: Linear


class LatentAttention:
    """Multi-head latent attention with rotary embedding over the paged latent cache [N, P, L + R]."""

    def __init__(
        self,
        ops: Ops,
        weights: Projections,
        table: torch.Tensor,
        mla: MlaConfig,
        num_heads: int,
        scale: float,
        interleaved: bool,
    ) -> None:
        self.ops = ops
        self.weights = weights
        self.table = table
        self.mla = mla
        self.num_heads = num_heads
        self.scale = scale
        self.interleaved = interleaved
        self.rank = mla.q_lora_rank or num_heads * (mla.nope_dim + mla.rope_dim)

    def __call__(self, x: torch.Tensor, step: Step, cache: torch.Tensor) -> torch.Tensor:
        return self.weights.out(step.attend(self._decode, self._prefill, cache, *self._project(x)))

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, H, nope + R], c [T, L] normalised, k_pe [T, R]; nothing rotated yet."""
        mla, weights = self.mla, self.weights
        q, c, k_pe = weights.down(x).split_with_sizes((self.rank, mla.kv_lora_rank, mla.rope_dim), -1)
        if weights.q_up is not None and weights.q_norm is not None:
            q = weights.q_up(self.ops.rms_norm(q, weights.q_norm, eps=LORA_NORM_EPS))
        c = self.ops.rms_norm(c, weights.kv_norm, eps=LORA_NORM_EPS)
        return q.view(len(x), self.num_heads, -1), c, k_pe

    def _decode(
        self, cache: torch.Tensor, new: Sequences, q: torch.Tensor, c: torch.Tensor, k_pe: torch.Tensor
    ) -> torch.Tensor:
        """One token per sequence, absorbed: [B, H * v]."""
        q_nope, q_pe = q.split_with_sizes((self.mla.nope_dim, self.mla.rope_dim), -1)
        found = self.ops.mla_decode(
            torch.cat([self.weights.key_up(q_nope), q_pe], -1).unsqueeze(1),
            torch.cat([c, k_pe], -1).unsqueeze(1),
            cache,
            new.page_table,
            new.kv_len,
            new.positions_column,
            self.table,
            scale=self.scale,
            latent=self.mla.kv_lora_rank,
            interleaved=self.interleaved,
        )
        return self.weights.value_up(found.squeeze(1)).flatten(1)

    def _prefill(
        self, cache: torch.Tensor, new: Sequences, q: torch.Tensor, c: torch.Tensor, k_pe: torch.Tensor
    ) -> torch.Tensor:
        """Prompt chunks, expanded: keys and values of every head, cached prefix included, as pages of their own. [T, H * v]."""
        q_pe = q[..., self.mla.nope_dim :]
        self.ops.store_mla(c, k_pe, cache, new.slots, q_pe, new.positions, self.table, interleaved=self.interleaved)
        pages, table = used_pages(new, cache.shape[1])
        rows = cache.index_select(0, pages).to(q.dtype)
        latent, rotated = torch.split(rows, [self.mla.kv_lora_rank, self.mla.rope_dim], -1)
        both = self.weights.kv_up(latent.flatten(0, 1))
        k_nope, v = torch.split(both.view(*rows.shape[:2], self.num_heads, -1), [self.mla.nope_dim, self.mla.v_dim], -1)
        k = torch.cat([k_nope, rotated[:, :, None].expand(-1, -1, self.num_heads, -1)], -1)
        found: torch.Tensor = self.ops.attn_prefill(q, k, v, table, new.query_start, new.kv_len, scale=self.scale)
        return found.flatten(1)

    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_pages, page_size, self.cache_values_per_token(), dtype=dtype, device=self.table.device)

    def cache_values_per_token(self) -> int:
        return self.mla.kv_lora_rank + self.mla.rope_dim


def used_pages(sequences: Sequences, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pages in use, sequence after sequence [n] i32, page table into that list [B, W] i32)."""
    needed = (sequences.kv_len + page_size - 1) // page_size
    column = torch.arange(sequences.page_table.shape[1], device=needed.device)
    pages = sequences.page_table[column < needed[:, None]]
    first = needed.cumsum(0) - needed
    table = (first[:, None] + column).clamp(max=max(pages.shape[0] - 1, 0))
    return pages, table.int()


def build(builder: Builder, max_len: int) -> Decoder:
    config = builder.config
    table = rope_table(config.rope, max_len).to(builder.device)
    layers = []
    for index in range(config.num_layers):
        name = f"model.layers.{index}"
        input_norm = builder.tensor(f"{name}.input_layernorm.weight", (config.hidden,))
        attention = build_attention(builder, f"{name}.self_attn", table)
        post_norm = builder.tensor(f"{name}.post_attention_layernorm.weight", (config.hidden,))
        layers.append(Layer(input_norm, attention, post_norm, build_mlp(builder, f"{name}.mlp", index)))
    return build_decoder(builder, layers)


def build_attention(builder: Builder, name: str, table: torch.Tensor) -> LatentAttention:
    config, mla = builder.config, builder.config.mla
    assert mla is not None
    q_width = config.num_heads * (mla.nope_dim + mla.rope_dim)
    latent = mla.kv_lora_rank + mla.rope_dim
    rank = mla.q_lora_rank
    first = f"{name}.q_proj" if rank is None else f"{name}.q_a_proj"
    kv_up = builder.plain(f"{name}.kv_b_proj", mla.kv_lora_rank, config.num_heads * (mla.nope_dim + mla.v_dim))
    w_uk, w_uv = kv_up.view(config.num_heads, -1, mla.kv_lora_rank).split([mla.nope_dim, mla.v_dim], 1)
    weights = Projections(
        down=builder.linear([first, f"{name}.kv_a_proj_with_mqa"], config.hidden, [rank or q_width, latent]),
        q_norm=None if rank is None else builder.tensor(f"{name}.q_a_layernorm.weight", (rank,)),
        q_up=None if rank is None else builder.linear(f"{name}.q_b_proj", rank, q_width),
        kv_norm=builder.tensor(f"{name}.kv_a_layernorm.weight", (mla.kv_lora_rank,)),
        kv_up=builder.dense(kv_up, kept=True),
        key_up=builder.per_head(w_uk.mT, kept=True),
        value_up=builder.per_head(w_uv, kept=True),
        out=builder.linear(f"{name}.o_proj", config.num_heads * mla.v_dim, config.hidden),
    )
    return LatentAttention(builder.ops, weights, table, mla, config.num_heads, config.softmax_scale, config.rope.interleaved)


def build_mlp(builder: Builder, name: str, index: int) -> Mlp | Moe:
    config, moe = builder.config, builder.config.moe
    if moe is None or index not in config.moe_layers:
        return builder.mlp(name, config.hidden, config.intermediate)
    # The router decides on small differences: fp32, as in the models' own code.
    router = builder.matrix(f"{name}.gate.weight", (moe.num_experts, config.hidden), torch.float32)
    bias = builder.tensor(f"{name}.gate.e_score_correction_bias", (moe.num_experts,), torch.float32) if moe.has_bias else None
    names = ("gate_proj", "up_proj", "down_proj")
    experts = builder.experts(f"{name}.experts", names, moe.num_experts, config.hidden, moe.intermediate)
    shared = builder.mlp(f"{name}.shared_experts", config.hidden, moe.shared_intermediate) if moe.num_shared else None
    return Moe(builder.ops, moe, router, bias, experts, shared)
