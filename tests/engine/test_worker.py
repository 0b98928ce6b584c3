# SPDX-License-Identifier: Apache-2.0
"""The process border: a real worker with the toy model, driven by the asyncio client."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rocm_infer.config import EngineConfig, SamplingParams
from rocm_infer.engine.client import EngineClient, EngineDied, RequestStream
from rocm_infer.engine.messages import (
    AddRequest,
    ErrorInfo,
    Outputs,
    RequestOutput,
    TokenLogprob,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from tests.engine.toy import request, run, tokens_of, toy_engine
from tests.engine.toy_worker import CRASH_TOKEN, SLEEP_TOKEN, TOY_WORKER

ROOT = Path(__file__).resolve().parents[2]


def make_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **settings: Any) -> EngineClient:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = EngineConfig(**{"model": "toy", "page_size": 4, "max_total_tokens": 2048, **settings})
    return EngineClient(config, command=TOY_WORKER, log_level="error")


def run_async(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 200))  # type: ignore[arg-type]


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_life_of_a_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One worker for all that does not kill it: tokens, refusals, aborts, queries, a clean end."""
    client = make_client(monkeypatch, tmp_path)

    async def body() -> None:
        early = client.add(request("early", [3], max_tokens=1))
        assert (await anext(early)).error.code == "engine_dead"
        info = await client.start()
        assert info == client.info
        assert (info["context_length"], info["model"]) == (512, "toy")
        requests = [request(str(i), [i + 2] * 9, max_tokens=20, ignore_eos=True, logprobs=i % 2) for i in range(8)]
        streams = [client.add(each) for each in requests]
        twin = await collect(client.add(requests[0]))
        assert [output.error.code for output in twin] == ["duplicate_request_id"]
        outputs = await asyncio.gather(*(collect(stream) for stream in streams))
        expected = run(toy_engine(), *requests)
        for each, got in zip(requests, outputs):
            assert tokens_of(got) == tokens_of(expected[each.rid])
            assert got[-1].finish_reason == "length"
        refused = await collect(client.add(request("long", [3] * 600, max_tokens=5)))
        assert [(o.finish_reason, o.error.code, o.error.param) for o in refused] == [
            ("error", "context_length_exceeded", "prompt")
        ]
        endless = client.add(request("endless", [4], max_tokens=400, ignore_eos=True))
        await anext(endless)
        assert client.num_requests == 1
        endless.close()
        endless.close()
        rest = await collect(endless)
        assert rest[-1].finish_reason == "abort"
        client.abort("unknown")
        assert client.num_requests == 0
        stats = await client.stats()
        assert (stats["finished_length"], stats["finished_abort"], stats["num_pages_used"]) == (8, 1, 0)
        assert await client.flush() > 0
        pid = client._process.pid
        chances = [int(Path(f"/proc/{of}/oom_score_adj").read_text()) for of in (pid, "self")]
        assert chances[0] > chances[1], "when memory runs out it is the worker that must go"
        left = client.add(request("left", [4], max_tokens=400, ignore_eos=True))
        await client.shutdown()
        assert (await collect(left))[-1].finish_reason == "abort"
        assert client.state == "closed"
        assert client._process.returncode == 0
        assert not is_alive(pid)
        with pytest.raises(EngineDied, match="closed"):
            await client.stats()

    run_async(body)
    assert list(tmp_path.iterdir()) == [], "the socket must be removed"


def test_death_of_a_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its requests get an error with their id, the client says why, and a new worker can be started."""
    client = make_client(monkeypatch, tmp_path)
    deaths: list[str] = []
    client._on_death = deaths.append

    async def body() -> None:
        await client.start()
        streams = [client.add(request(f"id-{i}", [i + 2], max_tokens=400, ignore_eos=True)) for i in range(3)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        os.kill(client._process.pid, signal.SIGTERM)  # ignored: the parent decides
        os.kill(client._process.pid, signal.SIGINT)
        await anext(streams[0])
        os.kill(client._process.pid, signal.SIGKILL)
        for i, stream in enumerate(streams):
            last = (await collect(stream))[-1]
            assert last.finish_reason == "error"
            assert last.error is not None
            assert last.error.code == "engine_dead"
            assert f"id-{i}" in last.error.message
        assert client.state == "dead"
        assert client.failure is not None
        assert client.failure.startswith("the engine process was killed by signal 9 (Killed; ")
        await asyncio.sleep(0)
        assert deaths == [client.failure]
        with pytest.raises(EngineDied, match="signal 9"):
            await client.flush()
        await client.start()
        assert (await collect(client.add(request("again", [2], max_tokens=2, ignore_eos=True))))[-1].finish_reason == "length"
        crash = client.add(request("crash", [CRASH_TOKEN], max_tokens=2))
        (last,) = await collect(crash)
        assert last.error is not None
        assert "exited with status 42" in last.error.message
        await client.shutdown()

    run_async(body)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_client_ends_the_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What cannot be handed over would otherwise leave everybody waiting for an answer that never comes."""
    client = make_client(monkeypatch, tmp_path)

    async def body() -> None:
        await client.start()
        fine = client.add(request("fine", [3], max_tokens=400, ignore_eos=True))
        await anext(fine)
        put = RequestStream.put

        def broken(stream: RequestStream, output: RequestOutput) -> None:
            if stream.rid == "odd" and output.error is None:
                raise LookupError("no such thing")
            put(stream, output)

        monkeypatch.setattr(RequestStream, "put", broken)
        for stream in (fine, client.add(request("odd", [4], max_tokens=400, ignore_eos=True))):
            last = (await collect(stream))[-1]
            assert last.error is not None
            assert last.error.code == "engine_dead"
            assert "LookupError: no such thing" in last.error.message
        await client.shutdown()

    run_async(body)


def test_requests_beyond_the_limits_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that is busy with a long step need not be asked."""
    client = make_client(monkeypatch, tmp_path, max_running_requests=2, max_queued_requests=1)
    sent: list[object] = []
    monkeypatch.setattr(client, "_send", sent.append)
    client.state = "ready"

    async def body() -> None:
        streams = [client.add(request(str(i), [3], max_tokens=1)) for i in range(4)]
        (refused,) = await collect(streams[3])
        assert refused.error is not None
        assert refused.error.code == "queue_full"
        assert (client.num_requests, len(sent)) == (3, 3)
        client.expire("0", 1.0)
        client.add(request("next", [3], max_tokens=1))
        assert client.num_requests == 3

    run_async(body)


def test_a_reader_that_falls_behind_finds_one_output() -> None:
    """The outputs of several steps come as one, with everything that they held apart."""
    first, second, third = TokenLogprob(3, -0.5), TokenLogprob(4, -0.25), TokenLogprob(5, -0.125)
    outputs = [
        RequestOutput("a", [3], num_prompt=2, num_cached=1, logprobs=[first], prompt_logprobs=[None, second]),
        RequestOutput("a", [4], num_prompt=2, num_cached=1, logprobs=[second]),
        RequestOutput("a", [5], "stop", 5, 2, 1, logprobs=[third]),
    ]

    async def body() -> None:
        stream = RequestStream("a", lambda rid: None)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.put(RequestOutput("a", [2], num_prompt=2, num_cached=1))
        assert (await waiting).token_ids == [2]
        for output in outputs:
            stream.put(output)
        (found,) = await collect(stream)
        assert found == RequestOutput("a", [3, 4, 5], "stop", 5, 2, 1, [first, second, third], [None, second])

    run_async(body)


def test_hung_step_ends_the_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = make_client(monkeypatch, tmp_path, step_timeout=0.4)

    async def body() -> None:
        await client.start()
        (last,) = await collect(client.add(request("hang", [SLEEP_TOKEN], max_tokens=2)))
        assert last.error is not None
        assert "longer than step_timeout (0.4 s)" in last.error.message
        await client.shutdown()

    run_async(body)


def test_model_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = make_client(monkeypatch, tmp_path, model="missing")

    async def body() -> None:
        with pytest.raises(EngineDied, match=r"^model: expected a folder with config.json, got 'missing'"):
            await client.start()
        assert client.state == "dead"
        await client.shutdown()

    run_async(body)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("folder", "text"), [("x" * 100, "set TMPDIR to a shorter folder"), ("short", "could not be started")])
def test_start_that_cannot_succeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, text: str) -> None:
    (tmp_path / folder).mkdir()
    client = make_client(monkeypatch, tmp_path / folder)
    client._command = (str(tmp_path / "no-such-program"),)

    async def body() -> None:
        with pytest.raises(EngineDied, match=text):
            await client.start()
        assert client.state == "dead"
        await client.shutdown()

    run_async(body)
    assert list((tmp_path / folder).iterdir()) == []


def test_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """No orphans, whatever happens to the server."""
    script = (
        "import asyncio\n"
        "from rocm_infer.config import EngineConfig\n"
        "from rocm_infer.engine.client import EngineClient\n"
        "from tests.engine.toy_worker import TOY_WORKER\n"
        "async def main():\n"
        "    config = EngineConfig(model='toy', max_total_tokens=64)\n"
        "    client = EngineClient(config, command=TOY_WORKER, log_level='error')\n"
        "    await client.start()\n"
        "    print(client._process.pid, flush=True)\n"
        "    await asyncio.sleep(250)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 100
    while is_alive(pid):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []


def test_messages_survive_the_wire() -> None:
    params = SamplingParams(max_tokens=3, logit_bias=((5, -1.5),), stop=("a", "b"), seed=-(2**63), logprobs=2)
    add = AddRequest("rid", [1, 2**31], params, priority=-3, salt="s")
    assert decode_to_worker(encode(add)) == add
    output = RequestOutput(
        "rid",
        [4],
        "error",
        4,
        2,
        1,
        [TokenLogprob(4, -0.5, [(4, -0.5)])],
        [None, TokenLogprob(2, -1.0)],
        ErrorInfo("queue_full", "m"),
    )
    assert decode_from_worker(encode(Outputs([output]))) == Outputs([output])
    with pytest.raises(msgspec.ValidationError):
        decode_to_worker(encode({"type": "AddRequest", "rid": 7}))
