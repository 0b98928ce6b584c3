# SPDX-License-Identifier: Apache-2.0
"""Turns named weights into layers: fuses, converts, stacks, dequantises and packs them, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rocm_infer import arch as archs
from rocm_infer.config import ModelConfig
from rocm_infer.models.layers import Experts, HeadLinear, Linear, Mlp
from rocm_infer.models.loader import Source
from rocm_infer.ops._op import Ops
from rocm_infer.ops.gemm_packed import pack
from rocm_infer.ops.moe_gemm_packed import pack_experts
from rocm_infer.ops.quant_fp8 import BLOCK, dequantise_blocks, to_fnuz

FP8 = torch.float8_e4m3fn
NEVER_QUANTISED = ("lm_head", "mlp.gate", "block_sparse_moe.gate")


class Builder:
    """Takes weights from a source and hands out layers on a device, in `dtype`.

    fp8 checkpoints stay fp8 on a GPU. A CPU has no fp8 arithmetic, so their weights become `dtype` there.
    lanes: > 0: weights of linear layers are packed for vectors of that many floats, as the CPU's kernels read them.
    """

    def __init__(
        self, config: ModelConfig, source: Source, ops: Ops, *, device: torch.device, dtype: torch.dtype, lanes: int
    ) -> None:
        self.config = config
        self.source = source
        self.ops = ops
        self.device = device
        self.dtype = dtype
        self.lanes = lanes
        self.fnuz = archs.fp8_dtype(device) == torch.float8_e4m3fnuz
        self.weight_bytes = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """One weight as it is, in `dtype` or the model's."""
        return self._keep(self.source.take(name, shape).to(dtype or self.dtype, copy=True))

    def linear(self, modules: str | Sequence[str], width: int, outs: int | Sequence[int], *, bias: bool = False) -> Linear:
        """One product for modules that read the same [*, width] input; `outs` are their output widths."""
        modules = [modules] if isinstance(modules, str) else list(modules)
        outs = [outs] if isinstance(outs, int) else list(outs)
        parts = [self._matrix(module, out, width) for module, out in zip(modules, outs)]
        offset = _stack([self.source.take(f"{m}.bias", (n,)).to(self.dtype) for m, n in zip(modules, outs)]) if bias else None
        weight, scale = self._fused(parts)
        offset = None if offset is None else self._keep(offset)
        return self.dense(weight, offset) if scale is None else Linear(self.ops, self._keep(weight), offset, self._keep(scale))

    def matrix(self, name: str, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Linear:
        """A linear layer from one weight as it is, in `dtype` or the model's."""
        return self.dense(self.source.take(name, shape).to(dtype or self.dtype, copy=True))

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, kept: bool = False) -> Linear:
        """A linear layer of a weight [N, K] that is not quantised. kept: others hold the weight too; it is counted already."""
        packed, columns = self._packed(weight, kept)
        return Linear(self.ops, packed, bias, columns=columns)

    def per_head(self, weight: torch.Tensor, *, kept: bool = False) -> HeadLinear:
        """One product per head, with weights [H, N, K]."""
        packed, columns = self._packed(weight, kept)
        return HeadLinear(self.ops, packed, columns)

    def plain(self, module: str, width: int, out: int) -> torch.Tensor:
        """The matrix [out, width] of a module in the model's type, dequantised, to make several layers from."""
        weight = self._plain(*self._matrix(module, out, width))
        return weight if self.lanes else self._keep(weight)

    def mlp(self, module: str, width: int, inner: int, *, bias: bool = False) -> Mlp:
        gate_up = self.linear([f"{module}.gate_proj", f"{module}.up_proj"], width, [inner, inner], bias=bias)
        return Mlp(self.ops, gate_up, self.linear(f"{module}.down_proj", inner, width, bias=bias))

    def experts(self, module: str, names: tuple[str, str, str], num: int, width: int, inner: int) -> Experts:
        """Stacks of `module`.{e}.{gate, up, down}, whose names differ between families."""
        gate, up, down = names
        first = self._stacked(num, True, lambda e: [self._matrix(f"{module}.{e}.{name}", inner, width) for name in (gate, up)])
        second = self._stacked(num, False, lambda e: [self._matrix(f"{module}.{e}.{down}", width, inner)])
        return Experts(*first, *second, columns=(inner, width) if self.lanes else None)

    def _stacked(
        self, num: int, silu: bool, matrices: Callable[[int], list[tuple[torch.Tensor, torch.Tensor | None]]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The fused matrices of experts 0 to num, one after the other, packed or with block scales if they stay fp8."""

        def expert_weight(expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            weight, scale = self._fused(matrices(expert))
            return (pack_experts(weight, self.lanes, silu), None) if self.lanes else (weight, scale)

        weight, scale = expert_weight(0)
        weights = weight.new_empty((num, *weight.shape))
        scales = None if scale is None else scale.new_empty((num, *scale.shape))
        for expert in range(num):
            if expert:
                weight, scale = expert_weight(expert)
            weights[expert] = weight
            if scales is not None and scale is not None:
                scales[expert] = scale
        return self._keep(weights), None if scales is None else self._keep(scales)

    def _matrix(self, module: str, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight, block scale or None) of a module as the checkpoint has it."""
        if not self._quantised(module):
            return self.source.take(f"{module}.weight", (out, width)), None
        blocks = (-(-out // BLOCK), -(-width // BLOCK))
        return self.source.take(f"{module}.weight", (out, width), FP8), self.source.take(f"{module}.weight_scale_inv", blocks)

    def _quantised(self, module: str) -> bool:
        skipped = (*NEVER_QUANTISED, *self.config.unquantised)
        return self.config.fp8_block is not None and not any(
            module == name or module.endswith("." + name) or module.startswith(name + ".") for name in skipped
        )

    def _fused(self, parts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Matrices on top of each other. fp8 stays fp8 on a GPU where every border between them is one of blocks."""
        scales = [scale for _, scale in parts if scale is not None]
        aligned = all(weight.shape[0] % BLOCK == 0 for weight, _ in parts[:-1])
        if len(scales) == len(parts) and aligned and archs.runs_gpu_kernels(self.device):
            weight, scale = _stack([weight for weight, _ in parts]), _stack([scale.float() for scale in scales])
            return to_fnuz(weight, scale) if self.fnuz else (weight, scale)
        plain = [self._plain(*part) for part in parts]
        return (plain[0] if len(plain) == 1 else _stack(plain)), None

    def _plain(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        # A copy even if the type is right: the source is a mapped file, which may change or lie at an odd address.
        return weight.to(self.dtype, copy=True) if scale is None else dequantise_blocks(weight, scale).to(self.dtype)

    def _packed(self, weight: torch.Tensor, kept: bool = False) -> tuple[torch.Tensor, int]:
        """(weight as the products read it, its columns if that is packed, else 0)."""
        if not self.lanes:
            return weight if kept else self._keep(weight), 0
        return self._keep(pack(weight, self.lanes)), weight.shape[-2]

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        self.weight_bytes += tensor.nbytes
        return tensor.to(self.device).contiguous()


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """torch.cat. On the meta device only the shape: torch's own cat there imports its whole compiler, which takes seconds."""
    if not parts[0].is_meta:
        return torch.cat(parts)
    return parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
