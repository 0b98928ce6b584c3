# SPDX-License-Identifier: Apache-2.0
"""The flight recorder, the capsule a dead worker leaves, and its replay."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import time
from pathlib import Path

import msgspec
import pytest

from rocm_infer import cli
from rocm_infer.config import EngineConfig
from rocm_infer.engine import recorder
from rocm_infer.engine.capsule import (
    MAX_CAPSULES,
    Capsule,
    CapsuleError,
    History,
    default_folder,
    make_capsule,
    read_capsule,
    write_capsule,
)
from rocm_infer.engine.client import EngineClient
from rocm_infer.engine.messages import RequestOutput
from rocm_infer.engine.recorder import FILE_NAME, Recorder, Recording, StepRecord
from rocm_infer.tools.replay import Replay, replay
from tests.engine.test_worker import collect, make_client, run_async
from tests.engine.toy import FAIL_TOKEN, VOCAB, request, toy_engine
from tests.engine.toy_worker import CRASH_TOKEN, SLEEP_TOKEN, make_engine


def recorded(tmp_path: Path, num_steps: int, **settings: int) -> tuple[list[StepRecord], History]:
    """A toy engine's last steps over mixed requests, stopped in the middle of its work."""
    engine = toy_engine(chunked_prefill_size=16, max_running_requests=5, **settings)
    recording = Recording(tmp_path / FILE_NAME)
    engine.recorder = Recorder(tmp_path / FILE_NAME)
    history, rng = History(), random.Random(5)
    shared = [rng.randrange(2, 50) for _ in range(13)]
    for i in range(9):
        prompt = shared + [rng.randrange(2, 50) for _ in range(i * 3 + 1)]
        params = {"temperature": i % 2, "max_tokens": 30, "ignore_eos": True, "presence_penalty": float(i % 3 == 0)}
        added = request(f"r{i}", prompt, **params)
        engine.add(added)
        history.add(added)
    for _ in range(num_steps):
        for output in engine.step():
            history.note(output)
    steps = recording.steps()
    recording.close()
    return steps, history


def capsule_of(steps: list[StepRecord], history: History, with_token_ids: bool = True) -> Capsule:
    config = EngineConfig(model="toy", page_size=4, max_total_tokens=2048, num_threads=1, chunked_prefill_size=16)
    return make_capsule(
        reason="it broke",
        config=config,
        info={"max_total_tokens": 2048},
        steps=steps,
        requests=history.entries(),
        stacks="",
        with_token_ids=with_token_ids,
    )


def toy_for(config: EngineConfig) -> object:
    return toy_engine(
        chunked_prefill_size=config.chunked_prefill_size,
        max_total_tokens=config.max_total_tokens,
        max_running_requests=config.max_running_requests,
    )


@pytest.mark.parametrize("num_steps", [1, 31, 32, 33, 60])
def test_the_last_steps_are_kept(tmp_path: Path, num_steps: int) -> None:
    steps, _ = recorded(tmp_path, num_steps)
    assert [step.number for step in steps] == list(range(max(1, num_steps - recorder.NUM_SLOTS + 1), num_steps + 1))
    assert all(step.sampled is not None and len(step.sampled) == sum(part.samples for part in step.parts) for step in steps)


def test_torn_records_are_left_out(tmp_path: Path) -> None:
    """Whatever bytes a dying worker leaves, what is read is whole, and reading does not fail."""
    recorded(tmp_path, 40)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 40)):
            slot = recorder.HEADER_SIZE + rng.randrange(recorder.NUM_SLOTS) * recorder.SLOT_SIZE
            damaged[slot + rng.randrange(0, 200)] = rng.randrange(256)
        path.unlink()
        reading = Recording(path)
        _overwrite(path, bytes(damaged))
        assert all(isinstance(step.number, int) for step in reading.steps())
        reading.close()
    path.unlink()
    reading = Recording(path)
    torn = bytearray(whole)
    slot = recorder.HEADER_SIZE + 40 % recorder.NUM_SLOTS * recorder.SLOT_SIZE
    struct.pack_into("<Q", torn, slot, 0)  # as `begin` leaves it until the composition is written
    _overwrite(path, bytes(torn))
    assert [step.number for step in reading.steps()] == list(range(9, 40))
    reading.close()


def _overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def test_long_ids_and_large_batches_fit_or_are_counted(tmp_path: Path) -> None:
    engine = toy_engine(max_running_requests=300, max_total_tokens=4096)
    recording = Recording(tmp_path / FILE_NAME)
    engine.recorder = Recorder(tmp_path / FILE_NAME)
    for i in range(300):
        engine.add(request(f"{i:0170}", [2 + i % 40], max_tokens=3, ignore_eos=True))
    engine.step()
    (step,) = recording.steps()
    assert (len(step.parts), step.num_omitted) == (recorder.MAX_ENTRIES, 300 - recorder.MAX_ENTRIES)
    assert step.sampled is not None
    assert len(step.sampled) == 300


@pytest.mark.parametrize("num_steps", [3, 20, 60])
def test_replay_gives_the_same_tokens(tmp_path: Path, num_steps: int) -> None:
    steps, history = recorded(tmp_path, num_steps)
    path = write_capsule(capsule_of(steps, history), tmp_path / "capsules")
    said: list[str] = []
    assert replay(path, said.append, toy_for) == 0  # type: ignore[arg-type]
    num_tokens = sum(len(step.sampled or []) for step in steps)
    assert num_tokens > 0
    assert said[-1] == f"{num_tokens} recorded tokens, 0 differ"


def test_replay_names_the_first_divergence(tmp_path: Path) -> None:
    steps, history = recorded(tmp_path, 40)
    position = next(i for i, step in enumerate(steps) if i > 4 and step.sampled)
    wrong = [(token + 1) % VOCAB for token in steps[position].sampled or []]
    steps[position] = msgspec.structs.replace(steps[position], sampled=wrong)
    path = write_capsule(capsule_of(steps, history), tmp_path / "capsules")
    said: list[str] = []
    assert replay(path, said.append, toy_for) == 1  # type: ignore[arg-type]
    assert f"first divergence: step {steps[position].number}, request r" in said[1]


def test_what_cannot_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, history = recorded(tmp_path, 5)
    path = write_capsule(capsule_of(steps, history, with_token_ids=False), tmp_path)
    assert cli.main(["replay", str(path)]) == 1
    assert "holds no token ids: start the server with --capsule-token-ids" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"format": 1}')
    assert cli.main(["replay", str(tmp_path / "other.json")]) == 1
    assert "is not a capsule" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "absent.json")]) == 1
    with pytest.raises(CapsuleError, match="no steps"):
        Replay(capsule_of([], history), toy_for)  # type: ignore[arg-type]
    with pytest.raises(CapsuleError, match="lacks 5 requests"):
        Replay(capsule_of(steps, History()), toy_for)  # type: ignore[arg-type]


def test_capsules_are_private_and_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, history = recorded(tmp_path, 5)
    folder = tmp_path / "a" / "b"
    for _ in range(MAX_CAPSULES + 3):
        path = write_capsule(capsule_of(steps, history), folder)
    assert len(list(folder.iterdir())) == MAX_CAPSULES
    assert path.exists()
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_folder() == Path("/state/rocm_infer/capsules")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert default_folder() == Path.home() / ".local/state/rocm_infer/capsules"


def test_without_token_ids_no_content_is_kept(tmp_path: Path) -> None:
    steps, _ = recorded(tmp_path, 5)
    history = History()
    secret = request("r0", [7001, 7002], stop=("hidden",), stop_token_ids=(7003,), logit_bias=((7004, 1.0),), salt="hush")
    history.add(secret)
    history.note(RequestOutput("r0", [7005]))
    text = write_capsule(capsule_of(steps, history, with_token_ids=False), tmp_path).read_text()
    assert not any(word in text for word in ("7001", "7002", "hidden", "7003", "7004", "hush", "7005"))
    (kept,) = read_capsule(next(tmp_path.glob("*.json"))).requests
    assert (kept.num_prompt, kept.num_output, kept.has_salt) == (2, 1, True)


@pytest.mark.parametrize("with_token_ids", [False, True])
def test_a_killed_worker_leaves_a_capsule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_token_ids: bool) -> None:
    client = make_client(monkeypatch, tmp_path)
    client._capsule_dir, client._capsule_token_ids = tmp_path / "capsules", with_token_ids
    said: list[str] = []

    async def body() -> None:
        await client.start()
        await collect(client.add(request("done", [3] * 5, max_tokens=2, ignore_eos=True)))
        streams = [client.add(request(f"id-{i}", [i + 2] * 6, max_tokens=400, ignore_eos=True)) for i in range(3)]
        for _ in range(4):  # until all have shared more than the last two steps
            await asyncio.gather(*(anext(stream) for stream in streams))
        if with_token_ids:  # a step that ends the process
            await collect(client.add(request("crash", [4, CRASH_TOKEN, FAIL_TOKEN], max_tokens=2)))
        else:
            os.kill(client._process.pid, signal.SIGABRT)  # as abort() in a library does
        for stream in streams:
            assert (await collect(stream))[-1].error is not None
        await client.shutdown()

    run_async(body)
    assert client.capsule is not None
    capsule = read_capsule(client.capsule)
    assert {"id-0", "id-1", "id-2"} <= {known.rid for known in capsule.requests}
    assert {"id-0", "id-1", "id-2"} <= {part.rid for part in capsule.steps[-2].parts}
    assert capsule.has_token_ids == with_token_ids
    assert {"python", "torch", "rocm-infer"} <= set(capsule.versions)
    assert capsule.config == client.config
    if with_token_ids:
        assert "status 42" in capsule.reason
        assert capsule.steps[-1].sampled is None
        assert "crash" in [part.rid for part in capsule.steps[-1].parts]
        monkeypatch.setattr(os, "_exit", _raise)
        assert replay(client.capsule, said.append, make_engine) == 1
        assert "fails: RuntimeError" in said[-2], said
        assert "crash [" in said[-1]
    else:
        assert "signal 6 (Aborted)" in capsule.reason
        assert "Fatal Python error: Aborted" in capsule.stacks


def _raise(status: int) -> None:
    raise RuntimeError(f"exit with {status}")


def test_a_hang_tells_all_stacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client(monkeypatch, tmp_path, step_timeout=1.0)
    client._capsule_dir = tmp_path / "capsules"

    async def body() -> None:
        await client.start()
        (last,) = await collect(client.add(request("hang", [SLEEP_TOKEN], max_tokens=2)))
        assert last.error is not None
        assert "longer than step_timeout (1 s)" in last.error.message
        await client.shutdown()

    run_async(body)
    (line,) = [record.getMessage() for record in caplog.records if "stacks of" in record.getMessage()]
    worker, own = line.split("stacks of this process")
    assert "toy_worker.py" in worker
    assert "in forward" in worker
    assert "_log_stacks" in own
    assert client.capsule is not None
    assert "in forward" in read_capsule(client.capsule).stacks


def test_a_stopped_worker_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not only a slow step: a process that does not get to its messages."""
    client = make_client(monkeypatch, tmp_path, step_timeout=1.0)

    async def body() -> None:
        await client.start()
        os.kill(client._process.pid, 19)  # SIGSTOP
        (last,) = await collect(client.add(request("a", [3], max_tokens=2)))
        assert last.error is not None
        assert "step_timeout" in last.error.message
        await client.shutdown()

    run_async(body)


def test_an_idle_worker_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = make_client(monkeypatch, tmp_path, step_timeout=3.0)

    async def body() -> None:
        await client.start()
        client._recording.last_beat = lambda: time.monotonic() - 100.0  # type: ignore[method-assign]
        await asyncio.sleep(1.0)
        assert client.state == "ready"
        await client.shutdown()

    run_async(body)


def test_a_deadline_ends_a_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client: EngineClient = make_client(monkeypatch, tmp_path)

    async def body() -> None:
        await client.start()
        late = client.add(request("late", [3], max_tokens=500, ignore_eos=True))
        await anext(late)
        client.expire("late", 2.5)
        client.expire("late", 2.5)
        last = (await collect(late))[-1]
        assert last.error is not None
        assert (last.error.code, last.error.message) == ("timeout", "request late: not finished within 2.5 seconds")
        assert client.num_requests == 0
        while (await client.stats())["num_running"]:
            await asyncio.sleep(0.01)
        assert (await client.stats())["finished_abort"] == 1
        await client.shutdown()

    run_async(body)
