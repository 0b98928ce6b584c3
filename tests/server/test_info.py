# SPDX-License-Identifier: Apache-2.0
"""Models, tokens, health, configuration, metrics, headers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from rocm_infer.server import schema
from rocm_infer.server.messages import MessagesRequest
from rocm_infer.server.profile import ProfileBody
from tests.server.fakes import CONTEXT, MODEL, TOKENIZER, FakeClient, Harness, Script, run

HI: list[Any] = [{"role": "user", "content": "hi"}]


def test_models() -> None:
    async def scenario(server: Harness) -> None:
        models = [model async for model in server.sdk.models.list()]
        assert [model.id for model in models] == ["a/b", "other"]
        _, body = await server.get("/v1/models/a/b")
        expected = {"id": "a/b", "object": "model", "owned_by": "rocm-infer", "root": MODEL, "parent": None}
        assert expected.items() <= body.items()
        assert body["max_model_len"] == CONTEXT
        for name in ("a/b", "other"):
            answer = await server.sdk.chat.completions.create(model=name, messages=HI)
            assert answer.model == name
        status, body = await server.post("/v1/completions", {"prompt": "x"})
        assert (status, body["model"]) == (200, "a/b")

    run(scenario, served_model_name=("a/b", "other"))


def test_tokenize_and_back() -> None:
    async def scenario(server: Harness) -> None:
        for prefix in ("", "/v1"):
            _, body = await server.post(prefix + "/tokenize", {"model": MODEL, "prompt": "the é", "return_token_strs": True})
            assert body["tokens"] == TOKENIZER.encode("the é")
            assert (body["count"], body["max_model_len"]) == (4, CONTEXT)
            assert body["token_strs"] == ["the", "Ġ", "Ã", "©"]
            _, back = await server.post(prefix + "/detokenize", {"tokens": body["tokens"]})
            assert back == {"prompt": "the é", "text": "the é"}
        _, body = await server.post("/tokenize", {"messages": HI})
        assert TOKENIZER.decode(body["tokens"], skip_special_tokens=False) == "<|bos|><|user|>hi<|end|><|assistant|>"

    run(scenario)


def test_health_by_phase() -> None:
    async def scenario(server: Harness) -> None:
        for path in ("/health", "/ready", "/live", "/ping", "/health_generate"):
            status, body = await server.get(path)
            assert (status, body["status"]) == (200, "ready")
        for phase in ("starting", "unhealthy", "draining"):
            server.service.enter(phase, "so it is")  # type: ignore[arg-type]
            for path in ("/health", "/ready", "/ping"):
                async with server.http.get(server.url + path) as response:
                    body = await response.json()
                    assert response.status == 503
                    assert (body["error"]["code"], body["error"]["type"]) == (phase, "server_error")
                    assert "so it is" in body["error"]["message"]
                    assert "Retry-After" in response.headers
            assert (await server.get("/live"))[0] == 200
            status, body = await server.post("/v1/completions", {"prompt": "x"})
            assert (status, body["error"]["code"]) == (503, phase)

    run(scenario)


def test_health_sees_a_dead_or_silent_engine() -> None:
    async def scenario(server: Harness) -> None:
        server.engine.die("killed by signal 9")
        status, body = await server.get("/health")
        assert (status, body["error"]["code"]) == (503, "unhealthy")
        assert "signal 9" in body["error"]["message"]

    run(scenario)


def test_model_and_server_info() -> None:
    async def scenario(server: Harness) -> None:
        for path in ("/model_info", "/get_model_info"):
            _, body = await server.get(path)
            assert (body["model_path"], body["is_generation"]) == (MODEL, True)
        for path in ("/server_info", "/get_server_info"):
            _, body = await server.get(path)
            assert (body["port"], body["max_running_requests"]) == (30000, 8)
            assert (await server.engine.stats()).items() <= body["internal_states"][0].items()
            assert body["engine"]["context_length"] == CONTEXT

    run(scenario)


def test_headers() -> None:
    async def scenario(server: Harness) -> None:
        async def ids(given: str | None, stream: bool) -> str:
            headers = {} if given is None else {"X-Request-Id": given}
            fields = {"prompt": "x", "stream": stream}
            async with server.http.post(server.url + "/v1/completions", json=fields, headers=headers) as response:
                assert int(response.headers["openai-processing-ms"]) >= 0
                return response.headers["x-request-id"]

        for stream in (False, True):
            assert await ids("abc-1", stream) == "abc-1"
            assert (await ids(None, stream)).startswith("req-")
            assert (await ids("x" * 200, stream)).startswith("req-")
        async with server.http.get(server.url + "/nope") as response:
            assert response.headers["x-request-id"].startswith("req-")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert not any(name.startswith("Access-Control") for name in response.headers)

    run(scenario)


def test_metrics() -> None:
    async def scenario(server: Harness) -> None:
        await server.post("/v1/completions", {"prompt": "abc", "max_tokens": 5, "n": 2})
        await server.post("/v1/completions", {"prompt": "abc", "max_tokens": 50})
        await server.get("/nope")
        status, text = await server.get("/metrics")
        assert status == 200
        families = {family.name: family for family in text_string_to_metric_families(text)}

        def value(name: str, **labels: str) -> float:
            samples = [sample for family in families.values() for sample in family.samples if sample.name == name]
            (found,) = [sample for sample in samples if labels.items() <= sample.labels.items()]
            assert found.labels["model_name"] == MODEL
            return found.value

        num_tokens = len(TOKENIZER.encode(Script().text)) + 1
        for prefix in ("rocm_infer:", "vllm:"):
            assert value(prefix + "generation_tokens_total") == 10 + num_tokens
            assert value(prefix + "prompt_tokens_total") == 9
            assert value(prefix + "request_success_total", finished_reason="length") == 2
            assert value(prefix + "request_success_total", finished_reason="stop") == 1
            assert value(prefix + "time_to_first_token_seconds_count") == 3
            assert value(prefix + "e2e_request_latency_seconds_count") == 3
            assert value(prefix + "inter_token_latency_seconds_count") == 8 + num_tokens - 1
            assert value(prefix + "request_prompt_tokens_sum") == 9
            assert value(prefix + "request_generation_tokens_sum") == 10 + num_tokens
            assert value(prefix + "num_requests_running") == 0
            assert value(prefix + "num_preemptions_total") == 3
        assert value("vllm:kv_cache_usage_perc") == value("rocm_infer:kv_cache_usage_ratio") == 0.25
        assert value("vllm:cache_config_info", block_size="16", num_gpu_blocks="64") == 1
        assert value("rocm_infer:http_responses_total", status="404") == 1

    run(scenario, FakeClient())


def test_the_server_needs_no_torch() -> None:
    code = "import rocm_infer.server.lifecycle, rocm_infer.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_openapi_document_lists_every_route() -> None:
    async def scenario(server: Harness) -> None:
        _, document = await server.get("/openapi.json")
        assert document["openapi"].startswith("3.1")
        served = {(resource.method.lower(), resource.resource.canonical) for resource in server.runner.app.router.routes()}
        served = {(method, path) for method, path in served if method != "head" and path != "/openapi.json"}
        listed = {(method, path) for path, methods in document["paths"].items() for method in methods}
        assert listed == served
        schemas = document["components"]["schemas"]
        chat = schemas["ChatRequest"]
        assert chat["required"] == ["messages"]
        assert "max_completion_tokens" in chat["properties"]
        for methods in document["paths"].values():
            for operation in methods.values():
                reference = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
                assert reference is None or reference["$ref"].rsplit("/", 1)[1] in schemas

    run(scenario)


def test_the_chat_page_loads_nothing_from_elsewhere() -> None:
    async def scenario(server: Harness) -> None:
        async with server.http.get(server.url + "/") as response:
            assert response.status == 200
            assert response.content_type == "text/html"
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            text = await response.text()
        assert "<title>rocm_infer</title>" in text
        assert "://" not in text

    run(scenario, api_key=("k",))


def test_the_guide_names_every_parameter() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    bodies = (schema.ChatRequest, schema.CompletionRequest, schema.StreamOptions, MessagesRequest, ProfileBody)
    for kind in bodies:
        for name in kind.__struct_fields__:
            assert f"`{name}`" in guide, name
    assert all(f"`{name}`" in guide for name in schema.IGNORED)


def test_other_names_of_metrics_are_a_choice() -> None:
    for choice, there, missing in (
        ("vllm", "vllm:", "sglang:"),
        ("sglang", "sglang:", "vllm:"),
        ("none", "rocm_infer:", "llm:"),
    ):

        async def scenario(server: Harness, there: str = there, missing: str = missing) -> None:
            await server.post("/v1/completions", {"prompt": "abc", "max_tokens": 2})
            _, text = await server.get("/metrics")
            assert f"\n{there}" in text
            assert missing not in text

        run(scenario, metrics_compat=choice)


def test_sglangs_names() -> None:
    async def scenario(server: Harness) -> None:
        await server.post("/v1/completions", {"prompt": "abc", "max_tokens": 5})
        _, text = await server.get("/metrics")
        lines = [line for line in text.splitlines() if line.startswith("sglang:")]
        assert len(lines) == len({line.rsplit(" ", 1)[0] for line in lines})
        for wanted in (
            *("num_running_reqs{", "num_queue_reqs{", "token_usage{", "page_size{", "num_pages{", "max_total_num_tokens{"),
            *("cache_hit_rate{", "cached_tokens_total{", "prompt_tokens_total{", "generation_tokens_total{", "gen_throughput{"),
            *("queue_time_seconds_count{", "prompt_tokens_histogram_count{", "generation_tokens_histogram_sum{"),
            *("num_requests_total{", "num_aborted_requests_total{", "num_retracted_requests_total{"),
        ):
            assert any(line.startswith("sglang:" + wanted) for line in lines), wanted
        for stage in ("queue", "prefill", "decode"):
            (found,) = [line for line in lines if "per_stage_req_latency_seconds_count" in line and f'stage="{stage}"' in line]
            assert found.endswith(" 1.0")

    run(scenario)


def test_what_log_requests_tells(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Harness) -> None:
        headers = {"X-Request-Id": "r-7"}
        await server.post("/v1/completions", {"prompt": "hidden words", "max_tokens": 4, "seed": 5, "stop": "qq"}, **headers)

    told: dict[str, list[dict[str, Any]]] = {}
    for level in ("none", "metadata", "params", "content"):
        caplog.clear()
        with caplog.at_level("DEBUG", logger="rocm_infer"):
            run(scenario, log_requests=level)
        told[level] = [record.fields for record in caplog.records if record.name == "rocm_infer.requests"]
        shown = " ".join(record.getMessage() for record in caplog.records)
        assert ("hidden" in shown) == (level == "content")
        assert ("qq" in shown) == (level in ("params", "content"))
    assert told["none"] == []
    (metadata,), (params,), (content,) = told["metadata"], told["params"], told["content"]
    assert metadata["id"] == "r-7"
    output = {"prompt_tokens": 12, "cached_tokens": 0, "completion_tokens": 4, "finish_reason": "length"}
    assert metadata["outputs"] == [output]
    assert "params" not in metadata
    assert (params["params"]["seed"], params["params"]["stop"], params["outputs"]) == (5, ("qq",), [output])
    assert (content["outputs"][0]["prompt"], content["outputs"][0]["text"]) == ("hidden words", "Hell")


def test_pages_of_other_origins_are_refused() -> None:
    async def scenario(server: Harness) -> None:
        for site, expected in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            status, body = await server.get("/flush_cache", **{"Sec-Fetch-Site": site})
            assert status == expected, body
            assert (await server.get("/", **{"Sec-Fetch-Site": site}))[0] == 200
        status, body = await server.post("/v1/completions", {"prompt": "a"}, **{"Sec-Fetch-Site": "cross-site"})
        assert (status, body["error"]["code"]) == (403, "cross_origin")

    run(scenario)


def test_a_path_cannot_break_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Harness) -> None:
        async with server.http.get(URL(server.url + "/a%0Ainjected", encoded=True)) as response:
            assert response.status == 404

    with caplog.at_level("INFO", logger="rocm_infer"):
        run(scenario)
    lines = [record.getMessage() for record in caplog.records if record.name == "rocm_infer.access"]
    assert lines
    assert not any("\n" in line for line in lines)
