# SPDX-License-Identifier: Apache-2.0
"""Traces: written where asked, for as many steps as asked, and refused in one sentence otherwise."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rocm_infer.engine import profiler
from rocm_infer.engine.messages import StartProfile
from rocm_infer.engine.profiler import Profiler
from tests.engine.test_worker import collect, make_client, run_async
from tests.engine.toy import request


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def test_a_worker_traces_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = make_client(monkeypatch, tmp_path)
    path = tmp_path / "new" / "trace.json.gz"

    async def body() -> None:
        await client.start()
        started = await client.start_profile(path, 3, ("CPU", "GPU"), with_stack=False, record_shapes=True)
        assert (started.path, started.error) == (str(path), None)
        again = await client.start_profile(tmp_path / "other.json.gz", 1, ("CPU",))
        assert again.error is not None
        assert "running already" in again.error
        outputs = await collect(client.add(request("a", [1, 2, 3], max_tokens=8, ignore_eos=True)))
        assert outputs[-1].finish_reason == "length"
        stopped = await client.stop_profile()
        assert stopped.error == f"no profile is running; the last one is in {path}"
        await client.start_profile(tmp_path / "second.json.gz", 0, ("CPU",))
        await collect(client.add(request("b", [1, 2, 3], max_tokens=2)))
        assert (await client.stop_profile()).path == str(tmp_path / "second.json.gz")
        await client.shutdown()

    run_async(body)
    operations = [event for event in events(path) if str(event.get("name")).startswith("aten::")]
    assert operations
    assert any("Input Dims" in event.get("args", {}) for event in operations)
    assert events(tmp_path / "second.json.gz")


def test_the_limit_of_steps_ends_a_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiler, "MAX_STEPS", 2)
    made = Profiler()
    path = tmp_path / "trace.json"
    assert made.start(StartProfile(1, str(path), activities=("CPU",))).error is None
    made.count_step()
    assert path.read_text() == ""
    made.count_step()
    assert json.loads(path.read_text())["traceEvents"]


def test_what_cannot_be_traced(tmp_path: Path) -> None:
    made = Profiler()
    assert made.stop(1).error == "no profile is running"
    assert "no GPU" in str(made.start(StartProfile(1, str(tmp_path / "a"), activities=())).error)
    (tmp_path / "taken").write_text("kept")
    assert "exists" in str(made.start(StartProfile(1, str(tmp_path / "taken"))).error)
    assert (tmp_path / "taken").read_text() == "kept"
    assert "cannot be written" in str(made.start(StartProfile(1, str(tmp_path / "taken" / "below"))).error)
