# SPDX-License-Identifier: Apache-2.0
"""Calls of an op whose plan is known: they are checked like the first one, and no plan serves a call that it was not made for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rocm_infer import arch as archs
from rocm_infer.ops import _op
from rocm_infer.ops._op import Ops, registry
from rocm_infer.ops.add_rms_norm import add_rms_norm
from rocm_infer.ops.gemm_packed import gemm_packed
from rocm_infer.ops.rms_norm import rms_norm
from rocm_infer.ops.store_kv import store_kv

X, WEIGHT = torch.ones(3, 8), torch.ones(8)


@pytest.fixture(params=["auto", "reference"])
def planned(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """rms_norm on a backend, with a plan for X and WEIGHT."""
    run = rms_norm.using(request.param)
    run(X, WEIGHT, eps=1e-6)
    yield run
    assert torch.equal(run(X, WEIGHT, eps=1e-6), torch.full((3, 8), (1 / (1 + 1e-6)) ** 0.5)), "the plan is still good"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(7)), r"rms_norm: weight: expected size C = 8 \(from x\), got 7 in shape \(7,\)"),
        ((X[0], WEIGHT), r"rms_norm: x: expected 2 dimensions \[T, C\], got shape \(8,\)"),
        ((X.int(), WEIGHT), r"rms_norm: x: expected dtype bfloat16 or float16 or float32, got torch.int32"),
        ((X, WEIGHT.bfloat16()), r"rms_norm: weight: expected dtype float32, got torch.bfloat16"),
        ((X, WEIGHT.to("meta")), r"rms_norm: weight: expected device cpu, got meta"),
        ((X.tolist(), WEIGHT), r"rms_norm: x: expected a tensor, got list"),
        ((X.numpy(), WEIGHT), r"rms_norm: x: expected a tensor, got ndarray"),
        ((None, WEIGHT), r"rms_norm: x: expected a tensor, got NoneType"),
    ],
)
def test_wrong_tensors(planned: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            planned(*arguments, eps=1e-6)


def test_missing_and_unknown_arguments(planned: Callable[..., Any]) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=r"rms_norm: missing arguments \['eps'\], unknown arguments \[\]; signature: x\[T"):
            planned(X, WEIGHT)
        with pytest.raises(TypeError, match=r"rms_norm: missing arguments \['weight'\], unknown arguments \[\]"):
            planned(X, eps=1e-6)
        with pytest.raises(TypeError, match=r"rms_norm: missing arguments \[\], unknown arguments \['groups'\]"):
            planned(X, WEIGHT, eps=1e-6, groups=8)
        with pytest.raises(TypeError, match=r"rms_norm: missing arguments \['eps'\], unknown arguments \['epsilon'\]"):
            planned(X, WEIGHT, epsilon=1e-6)
        with pytest.raises(TypeError, match=r"rms_norm\(\) takes .* 2 positional arguments but 3 were given"):
            planned(X, WEIGHT, 1e-6)
        with pytest.raises(TypeError, match="multiple values for argument 'x'"):
            planned(X, WEIGHT, x=X, eps=1e-6)


def test_names_and_positions_are_the_same_call(planned: Callable[..., Any]) -> None:
    assert torch.equal(planned(weight=WEIGHT, eps=1e-6, x=X, group=0, out_dtype=None), planned(X, WEIGHT, eps=1e-6))


def test_checks_of_the_contract_come_again() -> None:
    cache, slots = torch.zeros(4, 1, 2, 8), torch.zeros(1, dtype=torch.int64)
    k = torch.zeros(1, 2, 8)
    store_kv(k, k, cache, cache.clone(), slots)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected all or none of them, got some"):
            store_kv(k, k, cache, cache.clone(), slots, k)


def test_absent_and_given_optional_tensors_have_plans_of_their_own() -> None:
    run = gemm_packed.using("reference")
    x, packed, bias = torch.ones(2, 8), torch.ones(2, 8, 4, 1), torch.ones(8)
    assert torch.equal(run(x, packed, columns=8), torch.full((2, 8), 8.0))
    assert torch.equal(run(x, packed, bias, columns=8), torch.full((2, 8), 9.0))
    with pytest.raises(ValueError, match=r"bias: expected size columns = 8, got 9"):
        run(x, packed, torch.ones(9), columns=8)


def test_another_scalar_is_another_plan() -> None:
    x = torch.full((2, 128), 2.0)
    plain = rms_norm(x, torch.ones(128), eps=0.0)
    codes, scale = rms_norm(x, torch.ones(128), eps=0.0, group=128, out_dtype=torch.float8_e4m3fn)
    assert torch.equal(plain, torch.ones(2, 128))
    assert (codes.dtype, scale.shape) == (torch.float8_e4m3fn, (2, 1))


def test_a_role_of_the_cpu_is_part_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made for the CPU does not serve while an emulator plays a GPU with it."""
    assert rms_norm.plan("cpu", X, WEIGHT, eps=1e-6)[1] in ("cpu", "reference")
    monkeypatch.setattr(archs.cpu_role, "plays", archs.of("gfx942"))
    with pytest.raises(NotImplementedError, match="expected a CPU"):
        rms_norm.plan("cpu", X, WEIGHT, eps=1e-6)


def test_plans_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = _op.Op._make_plan
    monkeypatch.setattr(_op.Op, "_make_plan", lambda self, *args: made.append(1) or make(self, *args))
    monkeypatch.setattr(_op, "MAX_PLANS", 3)
    monkeypatch.setattr(rms_norm, "_plans", {})
    monkeypatch.setattr(rms_norm, "_written", {})
    for _ in range(5):
        for rows in (1, 2):
            rms_norm(X[:rows], WEIGHT, eps=1e-6)
    assert len(made) == 2
    for rows in range(20):
        rms_norm(torch.ones(rows, 8), WEIGHT, eps=1e-6)
    assert len(rms_norm._plans["auto"]) <= 3


def test_outputs_are_new_in_every_call(planned: Callable[..., Any]) -> None:
    first = planned(X, WEIGHT, eps=1e-6)
    assert first.data_ptr() != planned(X, WEIGHT, eps=1e-6).data_ptr()


def test_an_op_without_outputs_returns_none_and_writes() -> None:
    cache, slots = torch.zeros(4, 1, 2, 8), torch.ones(1, dtype=torch.int64)
    k = torch.ones(1, 2, 8)
    assert store_kv(k, k, cache, cache.clone(), slots) is None
    assert cache.sum() == 16


@pytest.mark.parametrize("name", sorted(registry()))
def test_written_functions_have_the_arguments_of_the_contract(name: str) -> None:
    """In the contract's order, with its defaults, and none of them hides a name of the function itself."""
    import inspect

    op = registry()[name]
    given, wanted = inspect.signature(op.using("auto")).parameters, inspect.signature(op.fn).parameters
    assert list(given)[:-1] == list(wanted)
    for parameter in wanted.values():
        found = given[parameter.name]
        assert found.kind == parameter.kind
        assert found.default is (_op._MISSING if parameter.default is parameter.empty else parameter.default)
    assert not set(wanted) & {"key", "plan", "plans", "find", "made", "tensor", "unknown", "empty", "archs"}


def test_ops_offer_all_of_them() -> None:
    ops = Ops("reference")
    x, residual = torch.ones(2, 8), torch.ones(2, 8)
    assert torch.equal(ops.add_rms_norm(x, residual, WEIGHT, eps=0.0), add_rms_norm(x, torch.ones(2, 8), WEIGHT, eps=0.0))
    with pytest.raises(AttributeError, match="no op named 'flash'"):
        ops.flash()
