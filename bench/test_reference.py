# SPDX-License-Identifier: Apache-2.0
"""The contracts' reference bodies and CPU forms, timed by pytest-benchmark: pytest bench/test_reference.py"""

from __future__ import annotations

import pytest
import torch

from bench.shapes import DECODE, Variant, variants
from rocm_infer import arch as archs
from rocm_infer.ops import _op
from rocm_infer.tools.explain import backends

SMALLER = {
    "E": 8,
    "V": 32000,
    "L": 256,
    "K": 256,
}  # experts, vocabulary, and tokens of attention; other ops' K and L are widths


def smaller(variant: Variant) -> Variant:
    """A decode step of a real model with what a CPU would take seconds for cut down."""
    names = {"E", "V"} | ({"attn_decode": {"L"}, "attn_prefill": {"L"}, "mla_decode": {"K"}}.get(variant.op, set()))
    sizes = {name: SMALLER[name] for name in names if name in variant.dims}
    return variant.scaled(**sizes, **({"T": 128} if variant.op == "attn_prefill" else {}))


def first_variants() -> list[Variant]:
    """One call per op: of 16 rows where the op is of decoding."""
    found: dict[str, Variant] = {}
    for variant in variants():
        if variant.dims.get("B", variant.dims.get("T", variant.dims.get("M"))) in (DECODE[1], 2) and variant.tp == 8:
            found.setdefault(variant.op, smaller(variant))
    return list(found.values())


@pytest.mark.parametrize("variant", first_variants(), ids=lambda variant: f"{variant.op} {variant.name}")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_reference(benchmark, backend, variant):
    op: _op.Op = variant.contract()
    if backend not in backends(op):
        pytest.skip("the reference is fast enough, or the op has no other form")
    arguments = variant.arguments(archs.current(torch.device("cpu")))
    benchmark.pedantic(op.using(backend), kwargs=arguments, rounds=5, warmup_rounds=1)
