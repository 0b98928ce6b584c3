# SPDX-License-Identifier: Apache-2.0
"""The engine benchmark runs; what it measures is not judged here."""

from __future__ import annotations

from bench.engine import time_decode, time_prompts


def test_decode_is_timed_at_any_size() -> None:
    for running in (1, 5):
        assert all(value > 0 for value in time_decode(running, 20).values())


def test_prompts_are_timed_with_and_without_hits() -> None:
    assert time_prompts(lambda number: [number % 100] * 1024, False) > 0
    assert time_prompts(lambda number: [7] * 1024, True) > 0
