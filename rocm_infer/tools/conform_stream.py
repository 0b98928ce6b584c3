# SPDX-License-Identifier: Apache-2.0
"""Checks of streams of /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json

from rocm_infer.tools.conform_target import Area, Target, among, chat_body, ensure, equal, error_of

stream = Area("stream")


@stream.check("content-type", "a stream is text/event-stream")
async def _(t: Target) -> None:
    kind = (await t.streamed()).headers.get("Content-Type", "")
    ensure(kind.startswith("text/event-stream"), "Content-Type", "text/event-stream", kind)


@stream.check("no-cache", "Cache-Control is no-cache")
async def _(t: Target) -> None:
    ensure("no-cache" in (await t.streamed()).headers.get("Cache-Control", ""), "Cache-Control", "no-cache", "something else")


@stream.check("no-buffering", "X-Accel-Buffering is no")
async def _(t: Target) -> None:
    equal((await t.streamed()).headers.get("X-Accel-Buffering"), "no", "X-Accel-Buffering")


@stream.check("done", "[DONE] ends the stream")
async def _(t: Target) -> None:
    equal((await t.streamed()).done, True, "[DONE]")


@stream.check("framing", "every line is data or a comment, and every event ends with a blank line")
async def _(t: Target) -> None:
    raw = (await t.streamed()).raw
    ensure(raw.endswith("\n\n"), "end of the stream", "a blank line", raw[-40:])
    for part in raw.replace("\r\n", "\n").strip("\n").split("\n\n"):
        ensure(part.startswith(("data: ", ":")) and "\n" not in part, "event", "one line of data", part)


@stream.check("object", "every chunk is a chat.completion.chunk")
async def _(t: Target) -> None:
    equal({chunk["object"] for chunk in (await t.streamed()).chunks}, {"chat.completion.chunk"}, "objects")


@stream.check("same-head", "all chunks share id, created, model and system_fingerprint")
async def _(t: Target) -> None:
    for name in ("id", "created", "model", "system_fingerprint"):
        values = {chunk[name] for chunk in (await t.streamed()).chunks}
        equal(len(values), 1, f"distinct values of {name}")


@stream.check("role-first", "the first chunk has role assistant and empty content")
async def _(t: Target) -> None:
    first = (await t.streamed()).choices()[0]
    equal(first["delta"], {"role": "assistant", "content": ""}, "first delta")
    equal(first["finish_reason"], None, "finish_reason of the first chunk")


@stream.check("finish-null", "finish_reason is null until the last chunk, never an empty string")
async def _(t: Target) -> None:
    *earlier, last = [choice["finish_reason"] for choice in (await t.streamed()).choices()]
    equal(set(earlier), {None}, "finish_reason before the last chunk")
    among(last, ("stop", "length"), "finish_reason of the last chunk")


@stream.check("empty-last", "the last chunk of a choice has an empty delta")
async def _(t: Target) -> None:
    equal((await t.streamed()).deltas()[-1], {}, "last delta")


@stream.check("no-empty-delta", "no chunk between the first and the last is empty")
async def _(t: Target) -> None:
    deltas = (await t.streamed()).deltas()[1:-1]
    ensure(all(any(delta.values()) for delta in deltas), "deltas", "each with text", deltas)


@stream.check("same-text", "the pieces are the whole answer")
async def _(t: Target) -> None:
    equal((await t.streamed()).content(), (await t.plain())["choices"][0]["message"]["content"], "content")


@stream.check("usage-last", "include_usage: one more chunk with usage and no choices, null before it")
async def _(t: Target) -> None:
    *earlier, last = (await t.streamed()).chunks
    equal(last["choices"], [], "choices of the last chunk")
    ensure(all("usage" in chunk and chunk["usage"] is None for chunk in earlier), "usage before", "null", earlier[:2])


@stream.check("usage-same", "usage of a stream is that of the whole answer")
async def _(t: Target) -> None:
    shown, whole = (await t.streamed()).chunks[-1]["usage"], (await t.plain())["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        equal(shown[name], whole[name], name)


@stream.check("usage-absent", "no usage unless asked for")
async def _(t: Target) -> None:
    events = await t.chat_events(max_tokens=3)
    ensure(not any(chunk.get("usage") for chunk in events.chunks), "usage", "absent", events.chunks[-1])
    ensure(all(chunk["choices"] for chunk in events.chunks), "choices", "in every chunk", events.chunks[-1])


@stream.check("usage-continuous", "continuous_usage_stats counts in every chunk")
async def _(t: Target) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await t.chat_events(max_tokens=6, ignore_eos=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in events.chunks]
    equal(counts, sorted(counts), "completion_tokens over time")
    equal(counts[-1], 6, "completion_tokens at the end")


@stream.check("max-tokens-1", "a stream of one token")
async def _(t: Target) -> None:
    events = await t.chat_events(max_tokens=1)
    equal(events.choices()[-1]["finish_reason"], "length", "finish_reason")
    equal(events.done, True, "[DONE]")


@stream.check("n", "each of n choices begins with a role and ends once")
async def _(t: Target) -> None:
    events = await t.chat_events(n=3, max_tokens=5, ignore_eos=True)
    for index in range(3):
        choices = events.choices(index)
        equal(choices[0]["delta"].get("role"), "assistant", f"role in the first delta of choice {index}")
        equal([choice["finish_reason"] for choice in choices if choice["finish_reason"]], ["length"], "finish_reasons")


@stream.check("n-same", "n streamed choices are those of the whole answer")
async def _(t: Target) -> None:
    fields = {"n": 3, "seed": 4, "temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
    whole = [choice["message"]["content"] for choice in (await t.chat(**fields))["choices"]]
    events = await t.chat_events(**fields)
    equal([events.content(index) for index in range(3)], whole, "contents")


@stream.check("logprobs-same", "log-probabilities of a stream are those of the whole answer")
async def _(t: Target) -> None:
    fields = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8, "ignore_eos": True}
    whole = (await t.chat(**fields))["choices"][0]["logprobs"]["content"]
    choices = (await t.chat_events(**fields)).choices()
    equal([entry for choice in choices for entry in (choice["logprobs"] or {}).get("content", ())], whole, "entries")


@stream.check("token-ids-same", "token ids of a stream are those of the whole answer")
async def _(t: Target) -> None:
    fields = {"return_token_ids": True, "max_tokens": 8, "ignore_eos": True}
    whole = (await t.chat(**fields))["choices"][0]["token_ids"]
    choices = (await t.chat_events(**fields)).choices()
    equal([token for choice in choices for token in choice.get("token_ids") or ()], whole, "token_ids")


@stream.check("stop", "a stop string is never shown, not even its beginning, wherever the tokens end")
async def _(t: Target) -> None:
    text = await t.said(max_tokens=32, ignore_eos=True)
    for start, end in ((3, 6), (5, 6), (2, 9)):
        stop = text[start:end]
        events = await t.chat_events(max_tokens=32, ignore_eos=True, stop=stop)
        equal(events.content(), text[: text.index(stop)], f"content with stop {stop!r}")
        equal(events.choices()[-1]["finish_reason"], "stop", "finish_reason")


@stream.check("stop-almost", "text that only began like a stop string is shown after all")
async def _(t: Target) -> None:
    text = await t.said(max_tokens=16, ignore_eos=True)
    events = await t.chat_events(max_tokens=16, ignore_eos=True, stop=text[2:5] + "\u2603")
    equal(events.content(), text, "content")


@stream.check("error-first", "what is wrong with a request is an HTTP error, not an event")
async def _(t: Target) -> None:
    fields = chat_body({"model": t.model, "temperature": 9, "stream": True})
    error_of(await t.send("POST", "/v1/chat/completions", fields), 400)


@stream.check("request-id", "a stream has the request's x-request-id")
async def _(t: Target) -> None:
    fields = chat_body({"model": t.model, "max_tokens": 1, "stream": True})
    reply = await t.send("POST", "/v1/chat/completions", fields, headers={"X-Request-Id": "conform-1"})
    equal(reply.headers.get("x-request-id"), "conform-1", "x-request-id")


@stream.check("abort", "/abort_request ends a stream with finish_reason abort")
async def _(t: Target) -> None:
    fields = {"max_tokens": 2000, "ignore_eos": True, "stream": True, "request_id": "conform-abort"}
    running = asyncio.ensure_future(t.chat_events(**fields))
    while not running.done():
        await t.send("POST", "/abort_request", {"rid": "conform-abort"})
        await asyncio.sleep(0.02)
    equal((await running).choices()[-1]["finish_reason"], "abort", "finish_reason")


@stream.check("disconnect", "a client that goes away frees its pages", alone=True)
async def _(t: Target) -> None:
    body = json.dumps(chat_body({"model": t.model, "max_tokens": 2000, "ignore_eos": True, "stream": True}))
    headers = {**t.headers(), "Content-Type": "application/json"}
    async with t.session.post(t.base_url + "/v1/chat/completions", data=body, headers=headers) as response:
        await response.content.readline()
    for _ in range(200):
        used = [line for line in (await t.get("/metrics")).text.splitlines() if line.startswith("vllm:num_requests_running")]
        if used and float(used[0].split()[-1]) == 0:
            return
        await asyncio.sleep(0.05)
    ensure(False, "vllm:num_requests_running after the client left", "0 within 10 s", used)
