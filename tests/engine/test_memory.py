# SPDX-License-Identifier: Apache-2.0
"""The memory plan adds up, respects what was asked for, and refuses with numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.config import ConfigError, EngineConfig
from rocm_infer.engine.memory import CPU_LIMIT, CPU_SHARE, MemoryPlan, available_bytes, plan_memory
from tests.engine.toy import toy_config

GIB = 1 << 30


def plan(available: int, *, device: str = "cpu", weights: int = 0, per_token: int = 1000, **settings: Any) -> MemoryPlan:
    return plan_memory(
        EngineConfig(**settings),
        toy_config(4096),
        torch.device(device),
        weight_bytes=weights,
        bytes_per_token=per_token,
        itemsize=2,
        available=available,
    )


@given(
    available=st.integers(64 << 20, 1 << 40),
    per_token=st.integers(1, 1 << 20),
    page_size=st.sampled_from([1, 16, 64]),
    weights=st.integers(0, 1 << 38),
    share=st.none() | st.floats(0.01, 1.0),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_plan_fits(available: int, per_token: int, page_size: int, weights: int, share: float | None, device: str) -> None:
    try:
        made = plan(
            available, device=device, weights=weights, per_token=per_token, page_size=page_size, mem_fraction_static=share
        )
    except ConfigError:
        return  # the tests below are about refusals
    assert made.num_pages >= 1
    assert made.cache_bytes == made.num_pages * page_size * per_token
    assert made.cache_bytes + made.workspace_bytes <= available
    assert made.max_total_tokens <= 256 * (4096 + page_size)
    if device == "cpu" and share is None:
        assert made.cache_bytes <= min(CPU_SHARE * available, CPU_LIMIT)
    elif share is not None:
        assert made.cache_bytes + weights <= share * (available + weights) + 1


def test_asked_size_wins() -> None:
    assert plan(8 * GIB, max_total_tokens=1000).max_total_tokens == 1008
    assert plan(8 * GIB, max_total_tokens=1).num_pages == 1


def test_small_need_takes_no_more_than_it_can_use() -> None:
    assert plan(64 * GIB, per_token=1, max_running_requests=2).max_total_tokens == 2 * 4096


def test_too_little_memory_is_told_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"1024 MiB are free on cpu .* takes 9766 MiB") as error:
        plan(GIB, max_total_tokens=10_240_000)
    assert error.value.param == "max_total_tokens"
    with pytest.raises(ConfigError, match="Lower max_total_tokens"):
        plan(GIB, device="cuda", weights=20 * GIB, mem_fraction_static=0.5)


def test_table_names_every_part() -> None:
    table = plan(8 * GIB, weights=3 << 20).table()
    for word in ("weights", "3.0 MiB", "KV cache", "workspace", "left", "8192 MiB free on cpu"):
        assert word in table


def test_available_memory_is_known() -> None:
    assert available_bytes(torch.device("cpu")) > 0
