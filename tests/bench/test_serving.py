# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark's arithmetic on hand-made results, and a run against a scripted server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web
from tokenizers import Tokenizer, models, pre_tokenizers

from bench import overhead, serving
from bench.clients import Prompt, Result


def finished(start: float, ttft: float, itls: list[float]) -> Result:
    prompt = Prompt("x", 10, 1 + len(itls))
    return Result(prompt, True, "", "text", 1 + len(itls), start=start, ttft=ttft, latency=ttft + sum(itls), itls=itls)


def test_summary_follows_the_definitions():
    results = [finished(0.0, 0.1, [0.1] * 4), finished(0.5, 0.3, [0.2, 0.4]), Result(Prompt("x", 7, 3), error="HTTP 500")]
    summary = serving.summarise(results, duration=2.0, count_tokens=len, levels={"ttft": 200.0})
    assert summary["completed"] == 2
    assert summary["failed"] == 1
    assert summary["total_input_tokens"] == 20
    assert summary["total_output_tokens"] == 8
    assert summary["output_throughput"] == pytest.approx(4.0)
    assert summary["concurrency"] == pytest.approx((0.5 + 0.9) / 2.0)
    assert summary["mean_ttft_ms"] == pytest.approx(200.0)
    assert summary["mean_tpot_ms"] == pytest.approx((100.0 + 300.0) / 2)
    assert summary["max_itl_ms"] == pytest.approx(400.0)
    assert summary["goodput"] == pytest.approx(0.5)
    assert summary["goodput_attainment"] == pytest.approx(1 / 3)
    assert summary["max_concurrent_requests"] == 2


def test_a_chunk_of_several_tokens_counts_each():
    result = Result(Prompt("x", 1, 4), start=10.0)
    result.arrived("a", 1, now=10.5, last=10.0)
    result.arrived("abcd", 4, now=11.1, last=10.5)
    assert result.ttft == pytest.approx(0.5)
    assert result.itls == pytest.approx([0.2, 0.2, 0.2])


def test_seed_command_is_understood():
    line = "--backend rocm-infer --dataset-name random --num-prompts 4000 --random-input 128 --random-output 128"
    args = serving.parse_args(line.split())
    assert (args.random_input_len, args.random_output_len, args.num_prompts) == (128, 128, 4000)
    assert args.base_url == "http://127.0.0.1:30000"


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    words = sorted(set(serving.PASSAGE.split()))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def scripted_server(tokenizer_dir: Path, bodies: list[dict]) -> web.Application:
    """Native, completions and chat streams of as many words as were asked for."""

    async def models_route(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted"}]})

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"tokenizer_path": str(tokenizer_dir), "version": "1"})

    async def stream(request: web.Request, events: list[dict]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def native(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        count = body["sampling_params"]["max_new_tokens"]
        events = [{"text": "w" * n, "meta_info": {"completion_tokens": n}} for n in range(1, count + 1)]
        return await stream(request, events)

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        usage = [{"completion_tokens": n + 1} for n in range(body["max_tokens"])]
        return await stream(request, [{"choices": [{"text": "w"}], "usage": each} for each in usage])

    async def chat(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return web.json_response({"error": {"message": "no"}}, status=400)

    app = web.Application()
    app.router.add_get("/v1/models", models_route)
    app.router.add_get("/model_info", info)
    app.router.add_get("/server_info", info)
    app.router.add_post("/generate", native)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat)
    return app


async def against(app: web.Application, line: str, tmp_path: Path) -> dict:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        output = tmp_path / "out.jsonl"
        return await serving.run(
            serving.parse_args([*line.split(), "--port", str(port), "--output-file", str(output), "--disable-tqdm"])
        )
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("api", ["rocm-infer", "vllm"], ids=["native", "completions"])
def test_run_against_a_scripted_server(api, word_tokenizer, tmp_path, capsys):
    bodies: list[dict] = []
    line = f"--backend {api} --num-prompts 9 --random-input 12 --random-output 5 --max-concurrency 3 --output-details"
    summary = asyncio.run(against(scripted_server(word_tokenizer, bodies), line, tmp_path))
    assert summary["completed"] == 9
    assert len(bodies) == 10
    stored = json.loads((tmp_path / "out.jsonl").read_text())
    assert stored["total_output_tokens"] == sum(stored["output_lens"]) == summary["total_output_tokens"]
    assert "Serving Benchmark Result" in capsys.readouterr().out


def test_a_refusing_server_is_reported(word_tokenizer, tmp_path):
    with pytest.raises(SystemExit, match="the warm-up request failed: HTTP 400"):
        asyncio.run(against(scripted_server(word_tokenizer, []), "--backend vllm-chat --num-prompts 2", tmp_path))


def test_a_server_that_loads_is_waited_for(word_tokenizer, tmp_path):
    statuses = [503, 503, 200]

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=statuses.pop(0))

    app = scripted_server(word_tokenizer, [])
    app.router.add_get("/health", health)
    summary = asyncio.run(against(app, "--num-prompts 2 --random-input 4 --random-output 2", tmp_path))
    assert (summary["completed"], statuses) == (2, [])


def test_what_http_costs_is_measured(capsys):
    """The real worker and the real server: both make as many tokens."""
    line = "--num-prompts 6 --random-input-len 8 --random-output-len 4 --rounds 2 --num-threads 1 --json"
    overhead.main(line.split())
    found = json.loads(capsys.readouterr().out)
    assert found["engine"]["tokens"] == found["http"]["tokens"] > 6
    assert found["engine"]["server"] == 0
    assert min(found["engine"]["worker"], found["http"]["worker"]) > 0
    assert 0 <= found["cpu_share"] < 1


def test_a_missing_server_is_one_sentence():
    with pytest.raises(SystemExit, match="no server answered at"):
        asyncio.run(serving.run(serving.parse_args(["--port", "9", "--ready-check-timeout-sec", "0"])))
