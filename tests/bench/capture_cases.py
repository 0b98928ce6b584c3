# SPDX-License-Identifier: Apache-2.0
"""What a captured graph asks of every Triton kernel: `launch()` makes no tensor, computes with none but in kernels, and reads none.

Run by test_isa.py in a process where Triton compiles.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.isa import compile_hook
from bench.shapes import Variant, variants
from rocm_infer import arch as archs
from rocm_infer.triton_kernels._compile import compiling

VIEWS = {
    "view",
    "as_strided",
    "alias",
    "detach",
    "select",
    "slice",
    "unsqueeze",
    "squeeze",
    "transpose",
    "t",
    "permute",
    "expand",
}
OPS = sorted({variant.op for variant in variants()})


class OnlyViews(TorchDispatchMode):
    """Refuses every operator of torch but those that look at the same memory in another way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            raise AssertionError(f"launch() calls torch's {func}")
        return func(*args, **(kwargs or {}))


def launch_captured(variant: Variant, launch: Callable[..., None], scratch: Callable[..., Any] | None) -> None:
    """Launch on tensors without data: reading one raises by itself."""
    op = variant.contract()
    arguments = variant.arguments(archs.of("gfx942"), device="meta")
    call, _backend, _reason = op.plan("triton", **arguments)
    made = op.empty_outputs(call)
    made += [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in (scratch(call) if scratch else ())]
    with OnlyViews():
        launch(*made, *(arguments.get(spec.name) for spec in op.tensors), **call.scalars)


@pytest.mark.parametrize("name", OPS)
def test_launches_can_be_captured(name: str) -> None:
    module = importlib.import_module(f"rocm_infer.triton_kernels.{name}")
    with compiling(archs.of("gfx942")), compile_hook(lambda **_: True):
        for variant in variants(name):
            launch_captured(variant, module.launch, getattr(module, "scratch", None))


@pytest.mark.parametrize("spoilt", [lambda x: torch.empty_like(x), lambda x: x.add_(1), lambda x: x.max().item()])
def test_a_launch_that_cannot_be_captured_is_caught(spoilt: Callable[[torch.Tensor], Any]) -> None:
    module = importlib.import_module("rocm_infer.triton_kernels.silu_mul")

    def launch(*tensors: torch.Tensor, **scalars: Any) -> None:
        spoilt(tensors[0])
        module.launch(*tensors, **scalars)

    with compiling(archs.of("gfx942")), compile_hook(lambda **_: True), pytest.raises((AssertionError, RuntimeError)):
        launch_captured(variants("silu_mul")[0], launch, None)
