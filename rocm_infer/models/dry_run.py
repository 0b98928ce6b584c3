# SPDX-License-Identifier: Apache-2.0
"""A model on a GPU that is not there: no weights, no data, only shapes. Tells which kernel serves each op and, through
`rocm_infer.triton_kernels._compile`, compiles those that Triton makes.

    with archs.played_by_meta(archs.of("gfx942")):
        run = DryRun(config, settings)          # config: ModelConfig of one rank
        run.step(StepSize(num_decodes=4, chunks=(), num_pages=8))
    for served in run.served(): ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rocm_infer import arch as archs
from rocm_infer.config import ConfigError, EngineConfig, ModelConfig
from rocm_infer.models import FAMILIES
from rocm_infer.models.builder import Builder
from rocm_infer.models.loader import Inventory
from rocm_infer.ops._op import Call, Op, Ops, registry

META = torch.device("meta")
LARGE_BYTES = 1 << 31  # from this size of a tensor on, Triton makes other addresses for AMD GPUs
SMALL_CACHE, LARGE_CACHE = "small", "large"


@dataclass(frozen=True)
class Served:
    """What serves an op, and why. `call`: one call of the kind, for its sizes. backend "": nothing does."""

    op: str
    backend: str
    reason: str
    call: Call | None


@dataclass(frozen=True)
class StepSize:
    """The sizes of one step: decodes of one token each, prompt chunks by their tokens, and the width of the page table."""

    num_decodes: int
    chunks: tuple[int, ...]
    num_pages: int


@dataclass(frozen=True)
class DryBatch:
    """What `rocm_infer.engine.batch.BatchBuilder` would make of a step, without data."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    num_decodes: int
    query_start: torch.Tensor
    kv_len: torch.Tensor
    page_table: torch.Tensor

    @classmethod
    def of(cls, size: StepSize) -> DryBatch:
        num_tokens, num_seqs = size.num_decodes + sum(size.chunks), size.num_decodes + len(size.chunks)
        long = functools.partial(torch.empty, dtype=torch.int64, device=META)
        short = functools.partial(torch.empty, dtype=torch.int32, device=META)
        made = long(num_tokens), long(num_tokens), long(num_tokens)
        return cls(*made, size.num_decodes, short(num_seqs + 1), short(num_seqs), short(num_seqs, size.num_pages))


class DryOps(Ops):
    """Ops whose outputs have shapes alone. Kernels of Triton are launched on them, so that a driver that compiles can see it."""

    def __init__(self, backend: str, *, launches: bool) -> None:
        self.backend = backend
        self.launches = launches
        self.found: dict[tuple[str, str, str], Served] = {}
        for name, op in registry().items():
            setattr(self, name, functools.partial(self._call, op))

    def _call(self, op: Op[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            call, backend, reason = op.plan(self.backend, *args, **kwargs)
        except NotImplementedError as error:
            self.found[op.name, "", str(error)] = Served(op.name, "", str(error), None)
            call = op.plan("reference", *args, **kwargs)[0]
            backend = ""
        else:
            self.found.setdefault((op.name, backend, reason), Served(op.name, backend, reason, call))
        if self.launches and backend == "triton":
            return op.using(backend)(*args, **kwargs)
        made = op.empty_outputs(call)
        return None if not made else made[0] if len(made) == 1 else tuple(made)


class _UpperBounds(TorchFunctionMode):
    """Sizes that depend on data become the largest they can be: a choice by a mask chooses all."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            rows, mask = args
            return rows.new_empty((mask.numel(), *rows.shape[mask.dim() :]))
        return func(*args, **(kwargs or {}))


class DryRun:
    """A rank's model and caches on the meta device, within `arch.played_by_meta`.

    launches: start Triton's kernels; False only plans. Only the first layer of each kind is built: the others are alike.
    """

    def __init__(self, config: ModelConfig, settings: EngineConfig, *, vocab_size: int | None = None, launches: bool = False):
        self.vocab_size = vocab_size or config.vocab_size
        self.page_size = settings.page_size
        self.ops = DryOps(settings.kernel_backend, launches=launches)
        self.dtype = getattr(torch, config.dtype if settings.dtype == "auto" else settings.dtype)
        self.cache_dtype = self.dtype if settings.kv_cache_dtype == "auto" else archs.fp8_dtype(META)
        self.max_len = settings.context_length or config.max_len
        builder = Builder(one_of_each_layer(config), Inventory(), self.ops, device=META, dtype=self.dtype, lanes=0)
        self.model = FAMILIES[config.architecture].build(builder, self.max_len)
        self._caches: dict[int, list[Any]] = {}

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_len // self.page_size)

    def cache_sizes(self, max_total_tokens: int | None) -> tuple[int, ...]:
        """Numbers of pages, one of each kind that Triton tells apart: how much the memory of the card will hold is not known."""
        if max_total_tokens is not None:
            return (-(-max_total_tokens // self.page_size),)
        row_bytes = self.cache_dtype.itemsize * min(layer.attention.cache_values_per_token() for layer in self.model.layers)
        large = 2 * LARGE_BYTES // (row_bytes * self.page_size) + 1
        return self.max_pages, max(large, self.max_pages)

    @torch.inference_mode()
    def step(self, size: StepSize, num_pages: int = 0) -> None:
        """One forward pass with a cache of num_pages, and the logits of all its sequences."""
        pages = max(num_pages, self.max_pages)
        if pages not in self._caches:
            self._caches[pages] = self.model.make_cache(pages, self.page_size, self.cache_dtype)
        with _UpperBounds():
            hidden = self.model.forward(DryBatch.of(size), self._caches[pages])
            self.model.logits(hidden.new_empty(size.num_decodes + len(size.chunks), hidden.shape[1]))

    @torch.inference_mode()
    def sample(self, num_rows: int, *, num_logprobs: int, is_penalised: bool, has_bias: bool, has_mask: bool) -> None:
        """One call of the op `sample`, as the engine's sampler makes it."""
        floats, ints = (functools.partial(torch.empty, device=META, dtype=dtype) for dtype in (torch.float32, torch.int64))
        narrow = functools.partial(torch.empty, device=META, dtype=torch.int32)
        vocab = self.vocab_size
        rows = [floats(num_rows), narrow(num_rows), floats(num_rows), floats(num_rows), ints(num_rows), ints(num_rows)]
        tables = [narrow(num_rows, vocab), torch.empty(num_rows, vocab, device=META, dtype=torch.uint8)]
        self.ops.sample(
            floats(num_rows, vocab),
            *rows,
            *(tables if is_penalised else (None, None)),
            *((floats(num_rows), floats(num_rows), floats(num_rows)) if is_penalised else (None, None, None)),
            floats(num_rows, vocab) if has_bias else None,
            narrow(num_rows, -(-vocab // 32)) if has_mask else None,
            num_logprobs=num_logprobs,
        )

    def served(self) -> list[Served]:
        """What served the calls so far, by op."""
        return sorted(self.ops.found.values(), key=lambda found: (found.op, found.backend, found.reason))


def one_of_each_layer(config: ModelConfig) -> ModelConfig:
    """The model with only the first layer of each kind, dense or of experts, with or without a window."""
    kinds: dict[tuple[bool, bool], int] = {}
    for index in range(config.num_layers):
        kinds.setdefault((index in config.moe_layers, index in config.windowed_layers), index)
    return dataclasses.replace(
        config,
        num_layers=len(kinds),
        moe_layers=tuple(place for place, (sparse, _) in enumerate(kinds) if sparse),
        windowed_layers=tuple(place for place, (_, windowed) in enumerate(kinds) if windowed),
    )


def shard(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """The sizes of one of num_ranks tensor-parallel ranks: heads, columns of MLPs and experts, and the vocabulary are divided.

    Raises ConfigError naming what cannot be divided.
    """
    if num_ranks == 1:
        return config
    moe = config.moe
    sizes = {"attention heads": config.num_heads, "intermediate size": config.intermediate if not config.moe_layers else 0}
    if moe is not None:
        sizes |= {"expert's intermediate size": moe.intermediate, "shared experts' size": moe.shared_intermediate}
    unit = config.fp8_block[0] if config.fp8_block else 1
    for what, size in sizes.items():
        each = 1 if what == "attention heads" else unit
        if size % (num_ranks * each):
            rest = f" in blocks of {each}" if each > 1 else ""
            raise ConfigError(
                "tensor_parallel_size", f"tensor_parallel_size: {num_ranks} do not divide the {what} {size}{rest}"
            )
    if config.num_kv_heads % num_ranks and num_ranks % config.num_kv_heads:
        message = (
            f"tensor_parallel_size: {num_ranks} and the number of kv heads, {config.num_kv_heads}, do not divide one another"
        )
        raise ConfigError("tensor_parallel_size", message)
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=max(1, config.num_kv_heads // num_ranks),
        intermediate=config.intermediate // num_ranks,
        vocab_size=-(-config.vocab_size // num_ranks),
        moe=moe
        and dataclasses.replace(
            moe, intermediate=moe.intermediate // num_ranks, shared_intermediate=moe.shared_intermediate // num_ranks
        ),
    )


def step_sizes(settings: EngineConfig, max_pages: int) -> Iterator[StepSize]:
    """Steps of every kind that kernels tell apart, for the largest batch and chunk of the settings.

    Triton compiles anew for a size of 1 and for one that 16 divides, for pointers that 16 bytes divide, and where a kernel's rules
    choose another tile. Rules look at the number of rows, closely where it is small, and at the width of the page table.
    """
    most, chunk = settings.max_running_requests, settings.chunked_prefill_size
    for num_decodes in _row_counts(most):
        yield StepSize(num_decodes, (), max_pages)
    for num_tokens in _row_counts(chunk):
        yield StepSize(0, (num_tokens,), max_pages)
    widths = sorted({min(width, max_pages) for width in (1, 2, 4, 16, 17, 32, 64, 128, 256)})
    for width in widths:
        for num_decodes in {1, min(2, most), min(16, most)}:
            yield StepSize(num_decodes, (), width)
    # Sequences of a prefill step are searched in a table of 2^n entries, two more than there are.
    counts = {1, 2} | {n for power in range(2, 12) for n in (2**power - 1, 2**power)}
    for num_chunks in sorted(n for n in counts if n <= min(most, chunk)):
        rest = num_chunks - 1
        for num_tokens in {num_chunks, -(-num_chunks // 16) * 16, min(-(-num_chunks // 16) * 16 + 2, chunk)}:
            if num_tokens > chunk:
                continue
            for width in widths[:4]:
                # The tensors of the chunks follow those of the decodes, at any multiple of their element's size.
                for num_decodes in (0, 1, 2, 4):
                    if num_chunks + num_decodes <= most:
                        yield StepSize(num_decodes, (num_tokens - rest, *(1,) * rest), width)


def _row_counts(most: int) -> list[int]:
    """Numbers of rows: all up to 64, then of each kind of divisibility between two borders of tiles."""
    coarse = [start + more for start in range(64, most, 16 if most <= 256 else 64) for more in (0, 1, 2, 4, 8, 16)]
    return sorted(n for n in {*range(1, 65), *coarse, most} if n <= most)
