# SPDX-License-Identifier: Apache-2.0
"""Checks of the routes beside generation: models, tokens, health, metrics, headers, the OpenAPI document."""

from __future__ import annotations

from rocm_infer.tools.conform_target import QUESTION, USER, Area, Target, ensure, equal, error_of

info = Area("info")
TEXT = "na\u00efve \u6f22\u5b57 \U0001f600"
METRICS = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total", "generation_tokens_total"),
    *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket"),
    *("request_success_total", "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum"),
    *("request_decode_time_seconds_sum", "request_inference_time_seconds_sum", "prefix_cache_queries_total"),
    *("prefix_cache_hits_total", "num_preemptions_total", "iteration_tokens_total_bucket", "cache_config_info"),
)


@info.check("models", "/v1/models lists models with id, object, created, owned_by, max_model_len")
async def _(t: Target) -> None:
    body = (await t.get("/v1/models")).body
    equal(body["object"], "list", "object")
    ensure(body["data"], "data", "at least one model", body)
    for model in body["data"]:
        equal(model["object"], "model", "object of a model")
        missing = {"id", "created", "owned_by", "root", "parent", "max_model_len"} - set(model)
        ensure(not missing, "members of a model", f"also {missing}", model)


@info.check("model", "/v1/models/{id} is one of them")
async def _(t: Target) -> None:
    reply = await t.get(f"/v1/models/{t.model}")
    equal((reply.status, reply.body["id"]), (200, t.model), "status and id")


@info.check("model-404", "/v1/models/{id} of an unknown model is 404 model_not_found")
async def _(t: Target) -> None:
    equal(error_of(await t.get("/v1/models/no-such-model"), 404)["code"], "model_not_found", "error.code")


@info.check("health", "/health, /ready, /live and /ping are 200 and say a state")
async def _(t: Target) -> None:
    for path in ("/health", "/ready", "/live", "/ping"):
        reply = await t.get(path, {"Authorization": None})
        equal(reply.status, 200, path)
        ensure(reply.body and "status" in reply.body and "version" in reply.body, path, "status and version", reply.text)


@info.check("version", "/version says a version")
async def _(t: Target) -> None:
    ensure((await t.get("/version")).body.get("version"), "version", "a text", "nothing")


@info.check("server-info", "/server_info shows the settings and never a key")
async def _(t: Target) -> None:
    reply = await t.get("/server_info")
    equal(reply.status, 200, "status")
    ensure(t.api_key is None or f'"{t.api_key}"' not in reply.text, "settings", "without the key", "the key")


@info.check("openapi", "/openapi.json describes every main route")
async def _(t: Target) -> None:
    paths = (await t.get("/openapi.json")).body["paths"]
    wanted = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/messages", "/v1/responses", "/tokenize", "/metrics"}
    ensure(wanted <= set(paths), "paths", f"also {wanted - set(paths)}", sorted(paths))


@info.check("metrics", "/metrics has the metrics that routers and boards for vLLM query")
async def _(t: Target) -> None:
    await t.plain()
    reply = await t.get("/metrics", {"Authorization": None})
    equal(reply.status, 200, "status")
    ensure(reply.headers.get("Content-Type", "").startswith("text/plain"), "Content-Type", "text/plain", dict(reply.headers))
    missing = [name for name in METRICS if f"\nvllm:{name}" not in "\n" + reply.text]
    ensure(not missing, "metrics", "all of them", f"without {missing}")


@info.check("metrics-move", "token counters grow by what is generated")
async def _(t: Target) -> None:
    async def count() -> float:
        lines = (await t.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

    before = await count()
    await t.chat(max_tokens=7, ignore_eos=True)
    ensure(await count() >= before + 7, "vllm:generation_tokens_total", f"at least {before + 7}", await count())


@info.check("request-id", "x-request-id is echoed, and made where there is none")
async def _(t: Target) -> None:
    equal((await t.get("/v1/models", {"X-Request-Id": "abc-1"})).headers.get("x-request-id"), "abc-1", "x-request-id")
    made = [(await t.get("/v1/models")).headers.get("x-request-id") for _ in range(2)]
    ensure(made[0] and made[0] != made[1], "x-request-id", "a new one each time", made)


@info.check("request-id-safe", "an unusable x-request-id is replaced")
async def _(t: Target) -> None:
    given = "x" * 2000
    got = (await t.get("/v1/models", {"X-Request-Id": given})).headers.get("x-request-id")
    ensure(got and got != given, "x-request-id for one of 2000 characters", "another", got)


@info.check("processing-ms", "openai-processing-ms is a number")
async def _(t: Target) -> None:
    value = (await t.get("/v1/models")).headers.get("openai-processing-ms", "")
    ensure(value.isdigit(), "openai-processing-ms", "digits", value)


@info.check("no-cors", "no page of another origin is let in")
async def _(t: Target) -> None:
    reply = await t.get("/v1/models", {"Origin": "http://elsewhere.example"})
    ensure("Access-Control-Allow-Origin" not in reply.headers, "Access-Control-Allow-Origin", "absent", dict(reply.headers))


@info.check("tokenize", "/tokenize gives tokens, count and max_model_len")
async def _(t: Target) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        body = await t.ask(path, {"prompt": TEXT})
        equal(body["count"], len(body["tokens"]), f"count of {path}")
        ensure(body["max_model_len"] > 0 and all(type(token) is int for token in body["tokens"]), path, "integers", body)


@info.check("tokenize-messages", "/tokenize takes messages")
async def _(t: Target) -> None:
    plain = await t.ask("/tokenize", {"prompt": QUESTION, "add_special_tokens": False})
    chat = await t.ask("/tokenize", {"messages": USER, "add_generation_prompt": True})
    ensure(chat["count"] > plain["count"], "count with the template", f"more than {plain['count']}", chat["count"])


@info.check("tokenize-either", "/tokenize wants exactly one of prompt and messages")
async def _(t: Target) -> None:
    await t.refused("/tokenize", {"prompt": "a", "messages": USER})
    await t.refused("/tokenize", {})


@info.check("token-strs", "return_token_strs adds the tokens' texts")
async def _(t: Target) -> None:
    body = await t.ask("/tokenize", {"prompt": QUESTION, "return_token_strs": True})
    equal(len(body["token_strs"]), body["count"], "length of token_strs")


@info.check("detokenize", "/detokenize is the inverse, under prompt and under text")
async def _(t: Target) -> None:
    ids = await t.tokens(TEXT)
    for path in ("/detokenize", "/v1/detokenize"):
        body = await t.ask(path, {"tokens": ids})
        equal((body["prompt"], body["text"]), (TEXT, TEXT), f"texts of {path}")


@info.check("detokenize-range", "/detokenize refuses ids outside the vocabulary")
async def _(t: Target) -> None:
    await t.refused("/detokenize", {"tokens": [2**30]}, param="tokens")


@info.check("content-type", "a POST of another content type is refused")
async def _(t: Target) -> None:
    reply = await t.send("POST", "/v1/completions", data=b"prompt=a", headers={"Content-Type": "text/plain"})
    ensure(400 <= reply.status < 500, "status", "400 to 499", reply.status)


@info.check("flush", "/flush_cache forgets cached prefixes", alone=True)
async def _(t: Target) -> None:
    fields = {"messages": [{"role": "user", "content": "flush " * 30}], "max_tokens": 1}
    await t.chat(**fields)
    equal((await t.send("POST", "/flush_cache")).status, 200, "status of /flush_cache")
    usage = (await t.chat(**fields))["usage"]
    equal(usage["prompt_tokens_details"]["cached_tokens"], 0, "cached_tokens after the flush")
