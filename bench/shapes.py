# SPDX-License-Identifier: Apache-2.0
"""The calls that serving real models makes: every op, at the sizes of one rank of each model, tensor parallel 1 and 8.

for variant in variants("mla_decode"):
    arguments = variant.arguments(arch)             # for `op(**arguments)`; device="meta" makes shapes without values
    floor = variant.cost()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rocm_infer.arch import Arch
from rocm_infer.models.layers import block_rows
from rocm_infer.ops import _op

TP_SIZES = (1, 8)
DECODE = (1, 16, 64)  # sequences of a decode step, a token each
PREFILL = (2048,)  # tokens of a step with prompts: the engine's default chunk
PROMPTS = 2  # sequences that a prefill step's tokens belong to
KV_LEN = 4096  # tokens that attention reads of each sequence
PAGE = 16  # the engine's default


@dataclass(frozen=True)
class Variant:
    """One call of an op. dims and options are those of the op's `inputs`, scalars are further scalar arguments.

    fp8: activations and weights, or the output of a norm, are fp8. fp8_cache: cached keys and values are.
    zeros: further tensor arguments, by shape and type. large_pool: the cache is larger than 2 GiB, where Triton makes other addresses for AMD GPUs.
    """

    op: str
    model: str
    tp: int
    what: str
    dims: Mapping[str, int]
    fp8: bool = False
    fp8_cache: bool = False
    large_pool: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    zeros: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        types = (
            ("fp8" if self.fp8 else "bf16")
            + (", fp8 cache" if self.fp8_cache else "")
            + (", large pool" if self.large_pool else "")
        )
        return f"{self.model} tp{self.tp} {self.what} {types}"

    def contract(self) -> _op.Op[..., Any]:
        return _op.registry()[self.op]

    def arguments(self, arch: Arch, *, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of the op, fp8 in the dialect of the architecture."""
        dialect = arch.fp8_dtype
        options = {**self.options, **({"dtype": dialect} if self.fp8 and self.op in FP8_INPUTS else {})}
        with torch.device(device):
            made = self.contract().inputs(self.dims, device=device, seed=seed, **options)
        made.update(self.scalars)
        made.update({name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in self.zeros.items()})
        if self.op == "quant_fp8" or "group" in self.scalars:
            made["out_dtype"] = dialect
        if self.fp8_cache:
            made.update({name: made[name].to(dialect) for name in CACHES if name in made})
        if self.large_pool:
            made.update({name: _grown(made[name]) for name in CACHES if name in made})
        return made

    def cost(self) -> _op.Cost:
        """Bytes and operations that this call needs at least."""
        known = {"silu": self.options.get("silu"), "group": self.scalars.get("group")}
        options: dict[str, Any] = {name: value for name, value in known.items() if value}
        if self.fp8 and self.op == "moe_gemm":
            options["itemsize"] = 1
        if self.fp8_cache:
            options["cache_itemsize"] = 1
        return self.contract().cost(self.dims, **options)

    def scaled(self, **dims: int) -> Variant:
        """The same call with some sizes replaced."""
        return dataclasses.replace(self, dims={**self.dims, **dims})


FP8_INPUTS = ("gemm_fp8", "moe_gemm")
CACHES = ("k_cache", "v_cache", "cache")
LARGE_BYTES = 1 << 31


def _grown(cache: torch.Tensor) -> torch.Tensor:
    """The same pages at the start of a pool of a little more than 2 GiB."""
    pages = LARGE_BYTES // (cache[0].numel() * cache.element_size()) + 1
    pool = cache.new_empty((pages, *cache.shape[1:]))
    pool[: cache.shape[0]] = cache
    return pool


@dataclass(frozen=True)
class Model:
    """Sizes as in the model's config.json. Heads, columns of MLPs and the vocabulary are divided among ranks."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the dense MLP; 0 if there is none
    vocab: int
    experts: int = 0
    top_k: int = 0
    expert_inner: int = 0
    qk_norm: bool = False
    shared: bool = False
    groups: tuple[int, int] = (1, 1)  # of experts, and how many of them a token may use
    latent: int = 0  # > 0: latent attention
    q_rank: int = 0
    nope: int = 0
    rope: int = 0


MODELS = (
    Model("llama-3.1-8b", 4096, 32, 8, 128, 14336, 128256),
    Model("llama-3.1-70b", 8192, 64, 8, 128, 28672, 128256),
    Model("qwen3-30b-a3b", 2048, 32, 4, 128, 0, 151936, experts=128, top_k=8, expert_inner=768, qk_norm=True),
    Model("mixtral-8x7b", 4096, 32, 8, 128, 0, 32000, experts=8, top_k=2, expert_inner=14336),
    Model(
        "deepseek-v3", 7168, 128, 128, 128, 18432, 129280, experts=256, top_k=8, expert_inner=2048, shared=True,
        groups=(8, 4), latent=512, q_rank=1536, nope=128, rope=64,
    ),
)  # fmt: skip


def variants(op: str | None = None) -> list[Variant]:
    """All calls, or those of one op."""
    return [variant for model in MODELS for tp in TP_SIZES for variant in _of_model(model, tp) if op in (None, variant.op)]


def _of_model(model: Model, tp: int) -> Iterator[Variant]:
    attention = _latent_attention if model.latent else _attention
    yield from _norms(model, tp)
    for fp8 in (False, True):
        yield from _linears(model, tp, fp8)
        yield from attention(model, tp, fp8)
        if model.experts:
            yield from _experts(model, tp, fp8)
    for rows in DECODE:
        dims = {"B": rows, "V": model.vocab}
        yield Variant("sample", model.name, tp, f"B{rows}", dims)
        yield Variant("sample", model.name, tp, f"B{rows} greedy", dims, options={"greedy": True})
    yield _shaped_sample(model, tp, DECODE[-1])


def _shaped_sample(model: Model, tp: int, rows: int) -> Variant:
    """With every penalty, a bias, a grammar's mask, and log-probabilities."""
    vocab = model.vocab
    zeros: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict.fromkeys(
        ("presence", "frequency", "repetition"), ((rows,), torch.float32)
    )
    zeros |= {"output_counts": ((rows, vocab), torch.int32), "prompt_seen": ((rows, vocab), torch.uint8)}
    zeros |= {"bias": ((rows, vocab), torch.float32), "mask": ((rows, -(-vocab // 32)), torch.int32)}
    dims = {"B": rows, "V": vocab}
    return Variant("sample", model.name, tp, f"B{rows} penalties", dims, scalars={"num_logprobs": 5}, zeros=zeros)


def _norms(model: Model, tp: int) -> Iterator[Variant]:
    for tokens in (*DECODE, *PREFILL):
        for op in ("rms_norm", "add_rms_norm"):
            dims = {"T": tokens, "C": model.hidden}
            yield Variant(op, model.name, tp, f"hidden T{tokens}", dims)
            yield Variant(op, model.name, tp, f"hidden T{tokens}", dims, fp8=True, scalars={"group": 128})
        inner = {"q_norm": (tokens, model.q_rank), "kv_norm": (tokens, model.latent)}
        if model.qk_norm:
            inner = {"q_norm": (tokens * model.heads // tp, model.head_dim), "k_norm": (tokens, model.head_dim)}
        for what, (rows, width) in inner.items():
            if width:
                yield Variant("rms_norm", model.name, tp, f"{what} T{tokens}", {"T": rows, "C": width})


def _kv_heads(model: Model, tp: int) -> int:
    return max(1, model.kv_heads // tp)


def _weights(model: Model, tp: int) -> dict[str, tuple[int, int]]:
    """[N, K] of one rank's linear maps by name, the vocabulary's and the router's left out."""
    heads, hidden = model.heads // tp, model.hidden
    if model.latent:
        found = {
            "q_a+kv_a": (model.q_rank + model.latent + model.rope, hidden),
            "q_b": (heads * (model.nope + model.rope), model.q_rank),
            "o": (hidden, heads * model.head_dim),
        }
    else:
        found = {
            "qkv": ((heads + 2 * _kv_heads(model, tp)) * model.head_dim, hidden),
            "o": (hidden, heads * model.head_dim),
        }
    mlps = {"": model.inner, "shared ": model.expert_inner if model.shared else 0}
    for what, width in mlps.items():
        if width:
            found |= {f"{what}gate_up": (2 * width // tp, hidden), f"{what}down": (hidden, width // tp)}
    return found


def _linears(model: Model, tp: int, fp8: bool) -> Iterator[Variant]:
    name, hidden = model.name, model.hidden
    weights = _weights(model, tp)
    bf16 = {"lm_head": (model.vocab // tp, hidden)} | ({"router": (model.experts, hidden)} if model.experts else {})
    if model.latent:
        bf16["kv_b"] = (model.heads // tp * (model.nope + model.head_dim), model.latent)
    for tokens in (*DECODE, *PREFILL):
        for what, (n, k) in (weights if fp8 else weights | bf16).items():
            if what == "lm_head" and tokens not in DECODE:
                continue  # only a sequence's last token meets it
            dims = {"M": tokens, "N": n, "K": k}
            yield Variant("gemm_fp8" if fp8 else "gemm", name, tp, f"{what} M{tokens}", dims, fp8=fp8)
            if fp8:
                yield Variant("quant_fp8", name, tp, f"{what} T{tokens}", {"T": tokens, "K": k}, fp8=True)
        for what, width in {"": model.inner, "shared ": model.expert_inner if model.shared else 0}.items():
            if width and not fp8:
                dims = {"T": tokens, "I": width // tp}
                yield Variant("silu_mul", name, tp, f"{what}T{tokens}", dims)
                yield Variant("silu_mul", name, tp, f"{what}T{tokens}", dims, fp8=True, scalars={"group": 128})


def _attention(model: Model, tp: int, fp8_cache: bool) -> Iterator[Variant]:
    sizes = {"H": model.heads // tp, "G": _kv_heads(model, tp), "D": model.head_dim}
    shared: dict[str, Any] = {"fp8_cache": fp8_cache}
    name, width = model.name, model.head_dim
    for tokens in (*DECODE, *PREFILL):
        if not fp8_cache:
            yield Variant("rope", name, tp, f"T{tokens}", {"T": tokens, **sizes, "R": width})
        yield Variant("store_kv", name, tp, f"T{tokens}", {"T": tokens, **sizes, "P": PAGE, "R": width}, **shared)
    for batch in DECODE:
        yield Variant("attn_decode", name, tp, f"B{batch}", {"B": batch, **sizes, "P": PAGE, "L": KV_LEN}, **shared)
    for tokens in PREFILL:
        dims = {"B": PROMPTS, "T": tokens, "L": KV_LEN, **sizes, "Dv": width, "P": PAGE}
        yield Variant("attn_prefill", name, tp, f"T{tokens}", dims, **shared)
        yield Variant("attn_prefill", name, tp, f"T{tokens}", dims, large_pool=True, **shared)
    dims = {"B": DECODE[-1], **sizes, "P": PAGE, "L": KV_LEN}
    yield Variant("attn_decode", name, tp, f"B{DECODE[-1]}", dims, large_pool=True, **shared)
    dims = {"T": DECODE[-1], **sizes, "P": PAGE, "R": width}
    yield Variant("store_kv", name, tp, f"T{DECODE[-1]}", dims, large_pool=True, **shared)


def _latent_attention(model: Model, tp: int, fp8_cache: bool) -> Iterator[Variant]:
    heads, name = model.heads // tp, model.name
    row = {"L": model.latent, "R": model.rope}
    for tokens in (*DECODE, *PREFILL):
        yield Variant("store_mla", name, tp, f"T{tokens}", {"T": tokens, "H": heads, **row, "P": PAGE}, fp8_cache=fp8_cache)
    # Pages as small and as large as users choose them; 2 and 4 tokens a step are speculation.
    for batch, new, page in [*((batch, 1, PAGE) for batch in DECODE), (16, 1, 1), (16, 1, 64), (16, 2, PAGE), (16, 4, PAGE)]:
        dims = {"B": batch, "S": new, "H": heads, "K": KV_LEN, **row, "P": page}
        yield Variant("mla_decode", name, tp, f"B{batch} S{new} P{page}", dims, fp8_cache=fp8_cache)
    dims = {"B": DECODE[-1], "S": 1, "H": heads, "K": KV_LEN, **row, "P": PAGE}
    yield Variant("mla_decode", name, tp, f"B{DECODE[-1]} S1 P{PAGE}", dims, fp8_cache=fp8_cache, large_pool=True)
    dims = {"T": DECODE[-1], "H": heads, **row, "P": PAGE}
    yield Variant("store_mla", name, tp, f"T{DECODE[-1]}", dims, fp8_cache=fp8_cache, large_pool=True)
    if not fp8_cache:  # prompts see keys and values of every head, expanded
        for tokens in PREFILL:
            expanded = {"H": heads, "G": heads, "D": model.nope + model.rope, "Dv": model.head_dim}
            dims = {"B": PROMPTS, "T": tokens, "L": KV_LEN, **expanded, "P": PAGE}
            yield Variant("attn_prefill", name, tp, f"T{tokens}", dims)


def _experts(model: Model, tp: int, fp8: bool) -> Iterator[Variant]:
    name, width, hidden = model.name, model.expert_inner // tp, model.hidden
    if fp8 and width % 128:
        return  # ranks cannot share a weight whose scales are in blocks of 128
    for tokens in (*DECODE, *PREFILL):
        slots = tokens * model.top_k
        block = block_rows(slots, model.experts)
        if not fp8:
            route = {"T": tokens, "E": model.experts, "top_k": model.top_k}
            groups = dict(zip(("num_groups", "top_groups"), model.groups))
            yield Variant("moe_route", name, tp, f"T{tokens}", route | groups)
            align = {"T": tokens, "E": model.experts, "K": model.top_k, "block": block}
            yield Variant("moe_align", name, tp, f"T{tokens}", align)
            yield Variant("moe_sum", name, tp, f"T{tokens}", {"T": tokens, "K": model.top_k, "C": hidden})
        shared = {"T": tokens, "E": model.experts, "top_k": model.top_k, "block": block}
        for what, silu, n, k in (("w13", True, 2 * width, hidden), ("w2", False, hidden, width)):
            dims = {**shared, "N": n, "K": k}
            yield Variant("moe_gemm", name, tp, f"{what} T{tokens}", dims, fp8=fp8, options={"silu": silu})
