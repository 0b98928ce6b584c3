# SPDX-License-Identifier: Apache-2.0
"""What decoders are made of. A layer holds its weights and the ops it calls, and is a function of its arguments."""

from __future__ import annotations

from collections.abc import Callable
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

    positions: torch.Tensor  # [T] i64
    positions_column: torch.Tensor  # [T, 1] i64
    slots: torch.Tensor  # [T] i64
    page_table: torch.Tensor  # [B, W] i32
    kv_len: torch.Tensor  # [B] i32
    query_start: torch.Tensor  # [B + 1] i32, from 0

    def part(self, place: slice, query_start: torch.Tensor) -> Sequences:
        """Those of some sequences, where tokens and sequences are counted alike."""
        cut = (x[place] for x in (self.positions, self.positions_column, self.slots, self.page_table, self.kv_len))
        positions, column, slots, page_table, kv_len = cut
        return Sequences(positions, column, slots, page_table, kv_len, query_start)


@dataclass(frozen=True, slots=True)
class Step:
    """A batch cut into its decodes, which come first, and its prompt chunks, once for all layers."""

    every: Sequences
    num_decodes: int
    decodes: Sequences | None
    prefills: Sequences | None

    @classmethod
    def of(cls, batch: Batch) -> Step:
        starts, column = batch.query_start, batch.positions.unsqueeze(1)
        every = Sequences(batch.positions, column, batch.slots, batch.page_table, batch.kv_len, starts)
        count, total = batch.num_decodes, batch.kv_len.shape[0]
        if count == total:
            return cls(every, count, every, None)
        if count == 0:
            return cls(every, 0, None, every)
        decodes = every.part(slice(count), starts[: count + 1])
        prefills = every.part(slice(count, None), starts[count:] - count)
        return cls(every, count, decodes, prefills)

    def attend(
        self, decode: Callable[..., torch.Tensor], prefill: Callable[..., torch.Tensor], cache: Cache, *rows: torch.Tensor
    ) -> torch.Tensor:
        """decode(cache, sequences, *rows) of the decodes and prefill(...) of the prompt chunks, each with its part of the rows."""
        if self.prefills is None:
            return decode(cache, self.decodes, *rows)
        if self.decodes is None:
            return prefill(cache, self.prefills, *rows)
        count = self.num_decodes
        first = decode(cache, self.decodes, *(x[:count] for x in rows))
        return torch.cat([first, prefill(cache, self.prefills, *(x[count:] for x in rows))])


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
        num_slots, experts = ids.numel(), self.experts
        plan = self.ops.moe_align(ids, num_experts=config.num_experts, block=block_rows(num_slots, config.num_experts))
        inner = self._gemm(x, experts.gate_up, experts.gate_up_scale, plan, None, num_slots, config.top_k, True)
        outer = self._gemm(inner, experts.down, experts.down_scale, plan, weights.view(-1), num_slots, 1, False)
        addend = None if self.shared is None else self.shared(x)
        total: torch.Tensor = self.ops.moe_sum(outer.view(len(x), config.top_k, -1), addend)
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
        silu: bool,
    ) -> torch.Tensor:
        if self.experts.columns is not None:
            columns = self.experts.columns[0 if silu else 1]
            packed: torch.Tensor = self.ops.moe_gemm_packed(
                x, weight, *plan, slot_weights, columns=columns, num_slots=num_slots, slots_per_row=slots_per_row, silu=silu
            )
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
            num_slots=num_slots,
            slots_per_row=slots_per_row,
            silu=silu,
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
        q, k, v = (part.view(len(x), -1, self.head_dim) for part in self.qkv(x).split_with_sizes(self.sizes, -1))
        if self.qk_norm is not None:
            q_weight, k_weight, eps = self.qk_norm
            q, k = self._norm(q, q_weight, eps), self._norm(k, k_weight, eps)
        new = step.every
        self.ops.store_kv(k, v, *cache, new.slots, q, new.positions, self.table, interleaved=self.interleaved)
        return self.out(step.attend(self._decode, self._prefill, cache, q).flatten(1))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y: torch.Tensor = self.ops.rms_norm(x.reshape(-1, self.head_dim), weight, eps=eps)
        return y.view(x.shape)

    def _decode(self, cache: tuple[torch.Tensor, torch.Tensor], new: Sequences, q: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.ops.attn_decode(q, *cache, new.page_table, new.kv_len, scale=self.scale, window=self.window)
        return found

    def _prefill(self, cache: tuple[torch.Tensor, torch.Tensor], new: Sequences, q: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.ops.attn_prefill(
            q, *cache, new.page_table, new.query_start, new.kv_len, scale=self.scale, window=self.window
        )
        return found

    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_pages, page_size, self.sizes[1] // self.head_dim, self.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=self.table.device) for _ in range(2))
        return k, v

    def cache_values_per_token(self) -> int:
        return 2 * self.sizes[1]
