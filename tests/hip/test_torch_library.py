# SPDX-License-Identifier: Apache-2.0
"""The ops inside torch.compile."""

from __future__ import annotations

import pytest
import torch

from rocm_infer.ops._op import registry
from rocm_infer.ops._torch_library import register, schema
from rocm_infer.ops.rms_norm import rms_norm
from rocm_infer.ops.store_kv import store_kv


@pytest.fixture(scope="module", autouse=True)
def registered():
    return register()


def test_schemas_say_what_is_written():
    assert schema(rms_norm) == (
        "rms_norm(Tensor x, Tensor weight, *, float eps, int group=0, ScalarType? out_dtype=None) -> Tensor[]"
    )
    assert "Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor slots, Tensor(f!)? q=None" in schema(store_kv)


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_op_is_there(name):
    assert hasattr(torch.ops.rocm_infer, name)


def test_sizes_without_data_are_those_with_data():
    x, weight = torch.randn(3, 200, dtype=torch.bfloat16), torch.ones(200, dtype=torch.bfloat16)
    options = {"eps": 1e-6, "group": 128, "out_dtype": torch.float8_e4m3fn}
    real = torch.ops.rocm_infer.rms_norm(x, weight, **options)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.rocm_infer.rms_norm(mode.from_tensor(x), mode.from_tensor(weight), **options)
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


def test_a_compiled_graph_holds_ops_and_their_writes():
    def step(x, weight, cache, slots):
        (y,) = torch.ops.rocm_infer.rms_norm(x, weight, eps=1e-6)
        rows = y.view(4, 2, 8)
        torch.ops.rocm_infer.store_kv(rows, rows, cache, cache, slots)
        return y + 1

    x, weight, slots = torch.randn(4, 16), torch.ones(16), torch.tensor([3, 0, -1, 5])
    caches = [torch.zeros(2, 4, 2, 8) for _ in range(2)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, caches[0], slots), step(x, weight, caches[1], slots))
    assert torch.equal(caches[0], caches[1])
    assert caches[0].any()
