# SPDX-License-Identifier: Apache-2.0
"""What decoders are made of. A layer holds its weights and the ops it calls, and is a function of its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rocm_infer.config import MoeConfig
from rocm_infer.ops._op import Ops

Cache = Any  # the cache tensors of one layer; what they are is up to its attention


class Batch(Protocol):
    """What a forward pass reads of a step (`rocm_infer.engine.batch.Batch` builds it)."""

    @property
    def token_ids(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def slots(self) -> torch.Tensor: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def query_start(self) -> torch.Tensor: ...
    @property
    def kv_len(self) -> torch.Tensor: ...
    @property
    def page_table(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of one kind, decoding or in prefill, as attention wants them."""

    page_table: torch.Tensor  # [B, W] i32
    kv_len: torch.Tensor  # [B] i32
    query_start: torch.Tensor  # [B + 1] i32, from 0


@dataclass(frozen=True, slots=True)
class Step:
    """A batch cut into its decodes and its prompt chunks, once for all layers."""

    positions: torch.Tensor  # [T] i64
    slots: torch.Tensor  # [T] i64
    num_decodes: int
    decodes: Sequences | None
    prefills: Sequences | None

    @classmethod
    def of(cls, batch: Batch) -> Step:
        count, total = batch.num_decodes, batch.kv_len.shape[0]
        starts = batch.query_start
        decodes = Sequences(batch.page_table[:count], batch.kv_len[:count], starts[: count + 1]) if count else None
        prefills = Sequences(batch.page_table[count:], batch.kv_len[count:], starts[count:] - count) if total > count else None
        return cls(batch.positions, batch.slots, count, decodes, prefills)


class Linear:
    """y = x W^T + b. With `scale`, W is fp8 in blocks of 128 x 128 and x is quantised in groups of 128.

    columns: > 0: the weight is W as `ops.gemm_packed.pack` lays it out, and has that many rows.
    """

    def __init__(
        self,
        ops: Ops,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        columns: int = 0,
    ) -> None:
        self.ops = ops
        self.weight = weight
        self.bias = bias
        self.scale = scale
        self.columns = columns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns:
            packed: torch.Tensor = self.ops.gemm_packed(x, self.weight, self.bias, columns=self.columns)
            return packed
        if self.scale is None:
            y: torch.Tensor = self.ops.gemm(x, self.weight, self.bias)
            return y
        codes, x_scale = self.ops.quant_fp8(x, out_dtype=self.weight.dtype)
        y = self.ops.gemm_fp8(codes, x_scale, self.weight, self.scale, out_dtype=x.dtype)
        return y if self.bias is None else y + self.bias


class HeadLinear:
    """y[:, h] = x[:, h] W[h]^T for every head, x [T, H, K] and W [H, N, K]. columns: > 0: W is packed and has that N."""

    def __init__(self, ops: Ops, weight: torch.Tensor, columns: int = 0) -> None:
        self.ops = ops
        self.weight = weight
        self.columns = columns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns:
            packed: torch.Tensor = self.ops.bmm_packed(x, self.weight, columns=self.columns)
            return packed
        return torch.bmm(x.transpose(0, 1), self.weight.mT).transpose(0, 1)


class Mlp:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, ops: Ops, gate_up: Linear, down: Linear) -> None:
        self.ops = ops
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x)))


@dataclass(frozen=True)
class Experts:
    """The stacked weights of all experts: gate_up [E, 2 * I, C] and down [E, C, I], with block scales if they are fp8.

    columns: of the two products, (I, C), where the weights are laid out by `ops.moe_gemm_packed.pack_experts`.
    """

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down: torch.Tensor
    down_scale: torch.Tensor | None
    columns: tuple[int, int] | None = None


class Moe:
    """A router, the chosen experts, and a shared MLP that every token passes."""

    def __init__(
        self, ops: Ops, config: MoeConfig, router: Linear, bias: torch.Tensor | None, experts: Experts, shared: Mlp | None
    ) -> None:
        self.ops = ops
        self.config = config
        self.router = router
        self.bias = bias
        self.experts = experts
        self.shared = shared

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        logits = self.router(x.to(self.router.weight.dtype))
        weights, ids = self.ops.moe_route(
            logits,
            self.bias,
            top_k=config.top_k,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            score=config.score,
            renormalise=config.renormalise,
            scale=config.scale,
        )
        block = block_rows(ids.numel(), config.num_experts)
        plan = self.ops.moe_align(ids, num_experts=config.num_experts, block=block)
        inner = self._gemm(
            x, self.experts.gate_up, self.experts.gate_up_scale, plan, None, ids.numel(), config.top_k, silu=True
        )
        outer = self._gemm(
            inner, self.experts.down, self.experts.down_scale, plan, weights.view(-1), ids.numel(), 1, silu=False
        )
        addend = None if self.shared is None else self.shared(x)
        total: torch.Tensor = self.ops.moe_sum(outer.view(x.shape[0], config.top_k, -1), addend)
        return total

    def _gemm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slot_weights: torch.Tensor | None,
        num_slots: int,
        slots_per_row: int,
        *,
        silu: bool,
    ) -> torch.Tensor:
        slots = {"num_slots": num_slots, "slots_per_row": slots_per_row, "silu": silu}
        if self.experts.columns is not None:
            columns = self.experts.columns[0 if silu else 1]
            packed: torch.Tensor = self.ops.moe_gemm_packed(x, weight, *plan, slot_weights, columns=columns, **slots)
            return packed
        dtype, x_scale = x.dtype, None
        if scale is not None:
            x, x_scale = self.ops.quant_fp8(x, out_dtype=weight.dtype)
        y: torch.Tensor = self.ops.moe_gemm(
            x,
            weight,
            *plan,
            slot_weights,
            x_scale,
            scale,
            out_dtype=dtype,
            **slots,
        )
        return y


def block_rows(num_slots: int, num_experts: int) -> int:
    """Rows of one tile of the grouped product: small while experts get few tokens, so that little of a tile is padding."""
    return 64 if num_slots >= 64 * num_experts else 16


class Attention:
    """Grouped-query attention over paged keys and values, with rotary embedding and optional norms of q and k."""

    def __init__(
        self,
        ops: Ops,
        qkv: Linear,
        out: Linear,
        table: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        interleaved: bool,
        qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None,
    ) -> None:
        self.ops = ops
        self.qkv = qkv
        self.out = out
        self.table = table
        self.sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.window = window
        self.interleaved = interleaved
        self.qk_norm = qk_norm

    def __call__(self, x: torch.Tensor, step: Step, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q, k, v = (part.view(len(x), -1, self.head_dim) for part in torch.split(self.qkv(x), self.sizes, -1))
        if self.qk_norm is not None:
            q_weight, k_weight, eps = self.qk_norm
            q, k = self._norm(q, q_weight, eps), self._norm(k, k_weight, eps)
        self.ops.store_kv(k, v, *cache, step.slots, q, step.positions, self.table, interleaved=self.interleaved)
        return self.out(self._attend(q, step, cache).flatten(1))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y: torch.Tensor = self.ops.rms_norm(x.reshape(-1, self.head_dim), weight, eps=eps)
        return y.view(x.shape)

    def _attend(self, q: torch.Tensor, step: Step, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        parts = []
        count = step.num_decodes
        if (part := step.decodes) is not None:
            parts.append(
                self.ops.attn_decode(q[:count], *cache, part.page_table, part.kv_len, scale=self.scale, window=self.window)
            )
        if (part := step.prefills) is not None:
            parts.append(
                self.ops.attn_prefill(
                    q[count:], *cache, part.page_table, part.query_start, part.kv_len, scale=self.scale, window=self.window
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_pages, page_size, self.sizes[1] // self.head_dim, self.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=self.table.device) for _ in range(2))
        return k, v

    def cache_values_per_token(self) -> int:
        return 2 * self.sizes[1]
