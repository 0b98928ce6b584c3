# SPDX-License-Identifier: Apache-2.0
"""Checks of whole answers of /v1/chat/completions."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import Any

from rocm_infer.tools.conform_target import QUESTION, USER, Area, Target, among, ensure, equal

chat = Area("chat")
HOT = {"temperature": 2, "max_tokens": 24, "ignore_eos": True}


@chat.check("json", "an answer is application/json")
async def _(t: Target) -> None:
    reply = await t.send("POST", "/v1/chat/completions", {"model": t.model, "messages": USER, "max_tokens": 1})
    equal(reply.status, 200, "status")
    ensure(reply.headers.get("Content-Type", "").startswith("application/json"), "Content-Type", "JSON", dict(reply.headers))


@chat.check("object", "object is chat.completion")
async def _(t: Target) -> None:
    equal((await t.plain())["object"], "chat.completion", "object")


@chat.check("id", "id begins with chatcmpl- and differs between answers")
async def _(t: Target) -> None:
    ids = [(await t.plain())["id"], (await t.chat(max_tokens=1))["id"]]
    ensure(all(name.startswith("chatcmpl-") for name in ids) and ids[0] != ids[1], "id", "two names chatcmpl-...", ids)


@chat.check("created", "created is a unix time in seconds")
async def _(t: Target) -> None:
    created = (await t.plain())["created"]
    ensure(type(created) is int and 1.6e9 < created < 1e11, "created", "an integer of seconds", created)


@chat.check("model", "model is the one asked for")
async def _(t: Target) -> None:
    equal((await t.plain())["model"], t.model, "model")


@chat.check("choices", "one choice with index 0")
async def _(t: Target) -> None:
    equal([choice["index"] for choice in (await t.plain())["choices"]], [0], "indices")


@chat.check("message", "message has role assistant, text content, refusal null")
async def _(t: Target) -> None:
    message = (await t.plain())["choices"][0]["message"]
    equal(message["role"], "assistant", "role")
    ensure(isinstance(message["content"], str), "content", "a string", message["content"])
    ensure("refusal" in message and message["refusal"] is None, "refusal", "null", message)


@chat.check("finish-reason", "finish_reason is stop or length")
async def _(t: Target) -> None:
    among((await t.plain())["choices"][0]["finish_reason"], ("stop", "length"), "finish_reason")


@chat.check("logprobs-null", "logprobs is null unless asked for")
async def _(t: Target) -> None:
    choice = (await t.plain())["choices"][0]
    ensure("logprobs" in choice and choice["logprobs"] is None, "logprobs", "null", choice)


@chat.check("usage", "total_tokens is prompt_tokens + completion_tokens")
async def _(t: Target) -> None:
    usage = (await t.plain())["usage"]
    equal(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"], "total_tokens")
    ensure(usage["prompt_tokens"] > 0 < usage["completion_tokens"], "counts", "positive", usage)


@chat.check("usage-details", "usage tells cached and reasoning tokens")
async def _(t: Target) -> None:
    usage = (await t.plain())["usage"]
    for name, part in (("prompt_tokens_details", "cached_tokens"), ("completion_tokens_details", "reasoning_tokens")):
        ensure(type(usage.get(name, {}).get(part)) is int, f"{name}.{part}", "an integer", usage)


@chat.check("usage-counts-prompt", "prompt_tokens is what /tokenize counts for the same messages")
async def _(t: Target) -> None:
    count = (await t.ask("/tokenize", {"messages": USER}))["count"]
    equal((await t.plain())["usage"]["prompt_tokens"], count, "prompt_tokens")


@chat.check("fingerprint", "system_fingerprint is a text and the same for every answer")
async def _(t: Target) -> None:
    first, second = (await t.plain())["system_fingerprint"], (await t.chat(max_tokens=1))["system_fingerprint"]
    ensure(isinstance(first, str) and first, "system_fingerprint", "a text", first)
    equal(second, first, "system_fingerprint of another answer")


@chat.check("max-tokens-1", "max_tokens 1 gives one token and finish_reason length")
async def _(t: Target) -> None:
    answer = await t.chat(max_tokens=1)
    equal(answer["usage"]["completion_tokens"], 1, "completion_tokens")
    equal(answer["choices"][0]["finish_reason"], "length", "finish_reason")


@chat.check("max-completion-tokens", "max_completion_tokens wins over max_tokens")
async def _(t: Target) -> None:
    answer = await t.chat(max_completion_tokens=3, max_tokens=9, ignore_eos=True)
    equal(answer["usage"]["completion_tokens"], 3, "completion_tokens")


@chat.check("ignore-eos", "ignore_eos runs to max_tokens")
async def _(t: Target) -> None:
    answer = await t.chat(max_tokens=40, ignore_eos=True)
    equal(answer["usage"]["completion_tokens"], 40, "completion_tokens")
    equal(answer["choices"][0]["finish_reason"], "length", "finish_reason")


@chat.check("min-tokens", "min_tokens keeps the end away")
async def _(t: Target) -> None:
    answer = await t.chat(min_tokens=20, max_tokens=24)
    ensure(answer["usage"]["completion_tokens"] >= 20, "completion_tokens", "at least 20", answer["usage"])


@chat.check("greedy", "temperature 0 gives the same text each time")
async def _(t: Target) -> None:
    texts = await asyncio.gather(*[t.said(max_tokens=24, ignore_eos=True, seed=seed) for seed in (1, 2, 3)])
    equal(len(set(texts)), 1, "distinct texts")


@chat.check("seed", "the same seed gives the same text")
async def _(t: Target) -> None:
    first, second = await asyncio.gather(*[t.said(**HOT, seed=11) for _ in range(2)])
    equal(second, first, "second text")


@chat.check("seeds-differ", "different seeds give different texts")
async def _(t: Target) -> None:
    texts = await asyncio.gather(*[t.said(**HOT, seed=seed) for seed in range(6)])
    ensure(len(set(texts)) > 1, "texts of six seeds at temperature 2", "not all equal", texts)


@chat.check("batch-invariant", "a seeded answer is the same alone and among others")
async def _(t: Target) -> None:
    alone = await t.said(**HOT, seed=5)
    others = [t.said(messages=[{"role": "user", "content": f"{QUESTION} {i}"}], **HOT, seed=i) for i in range(6)]
    together = (await asyncio.gather(t.said(**HOT, seed=5), *others))[0]
    equal(together, alone, "text among others")


@chat.check("n", "n gives n choices, and the prompt counts once")
async def _(t: Target) -> None:
    answer = await t.chat(n=3, max_tokens=5, ignore_eos=True)
    equal(sorted(choice["index"] for choice in answer["choices"]), [0, 1, 2], "indices")
    equal(answer["usage"]["completion_tokens"], 15, "completion_tokens")
    equal(answer["usage"]["prompt_tokens"], (await t.plain())["usage"]["prompt_tokens"], "prompt_tokens")


@chat.check("n-differ", "the choices of a sampled request differ")
async def _(t: Target) -> None:
    texts = [choice["message"]["content"] for choice in (await t.chat(n=4, seed=3, **HOT))["choices"]]
    ensure(len(set(texts)) > 1, "texts", "not all equal", texts)


@chat.check("stop", "a stop string ends the answer before it")
async def _(t: Target) -> None:
    text = await t.said(max_tokens=32, ignore_eos=True)
    stop = text[4:7]
    answer = await t.chat(max_tokens=32, ignore_eos=True, stop=stop)
    equal(answer["choices"][0]["message"]["content"], text[: text.index(stop)], f"content with stop {stop!r}")
    equal(answer["choices"][0]["finish_reason"], "stop", "finish_reason")


@chat.check("stop-reason", "stop_reason names the stop string that matched")
async def _(t: Target) -> None:
    stop = (await t.said(max_tokens=32, ignore_eos=True))[4:7]
    choice = (await t.chat(max_tokens=32, ignore_eos=True, stop=[stop]))["choices"][0]
    equal(choice.get("stop_reason"), stop, "stop_reason")


@chat.check("stop-first", "of several stop strings the one that comes first ends the answer")
async def _(t: Target) -> None:
    text = await t.said(max_tokens=32, ignore_eos=True)
    stops = [text[9:12], text[4:7], "never \u00e9 seen"]
    end = min(text.index(stop) for stop in stops[:2])
    equal(await t.said(max_tokens=32, ignore_eos=True, stop=stops), text[:end], "content")


@chat.check("stop-16", "16 stop strings are accepted")
async def _(t: Target) -> None:
    await t.chat(max_tokens=2, stop=[f"never {i}" for i in range(16)])


@chat.check("stop-included", "include_stop_str_in_output keeps the stop string")
async def _(t: Target) -> None:
    text = await t.said(max_tokens=32, ignore_eos=True)
    stop = text[4:7]
    kept = await t.said(max_tokens=32, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    equal(kept, text[: text.index(stop) + len(stop)], "content")


@chat.check("no-stop-trim", "no_stop_trim keeps the stop string")
async def _(t: Target) -> None:
    text = await t.said(max_tokens=32, ignore_eos=True)
    stop = text[4:7]
    kept = await t.said(max_tokens=32, ignore_eos=True, stop=stop, no_stop_trim=True)
    equal(kept, text[: text.index(stop) + len(stop)], "content")


@chat.check("stop-token-ids", "a stop token id ends the answer")
async def _(t: Target) -> None:
    answer = await t.chat(max_tokens=16, ignore_eos=True, return_token_ids=True)
    ids = answer["choices"][0]["token_ids"]
    stopped = await t.chat(max_tokens=16, ignore_eos=True, return_token_ids=True, stop_token_ids=[ids[5]])
    among(stopped["choices"][0]["token_ids"], (ids[: ids.index(ids[5]) + 1], ids[: ids.index(ids[5])]), "token_ids")
    equal(stopped["choices"][0]["finish_reason"], "stop", "finish_reason")


@chat.check("token-ids", "return_token_ids gives as many ids as usage counts")
async def _(t: Target) -> None:
    answer = await t.chat(max_tokens=7, ignore_eos=True, return_token_ids=True)
    equal(len(answer["choices"][0]["token_ids"]), 7, "length of token_ids")
    equal(len(answer["prompt_token_ids"]), answer["usage"]["prompt_tokens"], "length of prompt_token_ids")


@chat.check("bias-up", "a logit_bias of 100 chooses the token")
async def _(t: Target) -> None:
    wanted = (await t.tokens("7"))[-1]
    answer = await t.chat(max_tokens=3, return_token_ids=True, logit_bias={str(wanted): 100})
    equal(answer["choices"][0]["token_ids"], [wanted] * 3, "token_ids")


@chat.check("bias-down", "a logit_bias of -100 bans the token")
async def _(t: Target) -> None:
    first = (await t.chat(max_tokens=1, return_token_ids=True))["choices"][0]["token_ids"][0]
    answer = await t.chat(max_tokens=6, ignore_eos=True, return_token_ids=True, logit_bias={str(first): -100})
    ensure(first not in answer["choices"][0]["token_ids"], "token_ids", f"without {first}", answer["choices"][0])


@chat.check("penalties", "presence and frequency penalties of 2 and -2 are accepted, and 2 avoids repetition")
async def _(t: Target) -> None:
    await t.chat(max_tokens=2, presence_penalty=-2, frequency_penalty=-2)
    wanted = (await t.tokens("7"))[-1]
    fields = {"max_tokens": 60, "ignore_eos": True, "return_token_ids": True, "logit_bias": {str(wanted): 100}}
    free = (await t.chat(**fields))["choices"][0]["token_ids"].count(wanted)
    held = (await t.chat(**fields, frequency_penalty=2, presence_penalty=2))["choices"][0]["token_ids"].count(wanted)
    ensure(held < free, "repetitions of a token with penalties", f"fewer than {free}", held)


@chat.check("repetition-penalty", "repetition_penalty is accepted")
async def _(t: Target) -> None:
    await t.chat(max_tokens=4, repetition_penalty=1.3)


@chat.check("top-k-1", "top_k 1 is greedy at any temperature")
async def _(t: Target) -> None:
    greedy = await t.said(max_tokens=20, ignore_eos=True)
    equal(await t.said(max_tokens=20, ignore_eos=True, temperature=1.5, top_k=1), greedy, "content")


@chat.check("top-p-0", "a tiny top_p is greedy at any temperature")
async def _(t: Target) -> None:
    greedy = await t.said(max_tokens=20, ignore_eos=True)
    equal(await t.said(max_tokens=20, ignore_eos=True, temperature=1.5, top_p=1e-6), greedy, "content")


@chat.check("min-p-1", "min_p 1 is greedy at any temperature")
async def _(t: Target) -> None:
    greedy = await t.said(max_tokens=20, ignore_eos=True)
    equal(await t.said(max_tokens=20, ignore_eos=True, temperature=1.5, min_p=1), greedy, "content")


async def _scored(t: Target, **fields: Any) -> Any:
    return await t.chat(max_tokens=8, ignore_eos=True, logprobs=True, **fields)


@chat.check("logprobs", "one entry per token: token, bytes, logprob at most 0")
async def _(t: Target) -> None:
    answer = await _scored(t)
    entries = answer["choices"][0]["logprobs"]["content"]
    equal(len(entries), answer["usage"]["completion_tokens"], "entries")
    for entry in entries:
        ensure(isinstance(entry["token"], str) and entry["logprob"] <= 0, "entry", "token and logprob <= 0", entry)
        ensure(all(0 <= byte < 256 for byte in entry["bytes"]), "bytes", "integers below 256", entry)
        equal(entry["top_logprobs"], [], "top_logprobs when none were asked for")


@chat.check("logprobs-bytes", "the bytes of all tokens are the content")
async def _(t: Target) -> None:
    choice = (await t.chat(max_tokens=2, logprobs=True))["choices"][0]
    joined = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    if choice["finish_reason"] == "length":
        equal(joined.decode("utf-8", "replace"), choice["message"]["content"], "text of the bytes")


@chat.check("top-logprobs", "top_logprobs 5 gives the five likeliest, best first")
async def _(t: Target) -> None:
    for entry in (await _scored(t, top_logprobs=5))["choices"][0]["logprobs"]["content"]:
        values = [other["logprob"] for other in entry["top_logprobs"]]
        equal(len(values), 5, "alternatives")
        equal(values, sorted(values, reverse=True), "their order")


@chat.check("top-logprobs-sum", "the probabilities of the top 20 sum to at most 1")
async def _(t: Target) -> None:
    for entry in (await _scored(t, top_logprobs=20))["choices"][0]["logprobs"]["content"]:
        total = sum(math.exp(other["logprob"]) for other in entry["top_logprobs"])
        ensure(total <= 1 + 1e-3, "sum", "at most 1", total)


@chat.check("logprobs-greedy", "at temperature 0 the chosen token is the likeliest")
async def _(t: Target) -> None:
    for entry in (await _scored(t, top_logprobs=1))["choices"][0]["logprobs"]["content"]:
        equal(entry["top_logprobs"][0]["logprob"], entry["logprob"], "likeliest")


@chat.check("logprobs-raw", "log-probabilities are those before temperature")
async def _(t: Target) -> None:
    cold, hot = [
        (await _scored(t, top_logprobs=5, temperature=heat, seed=1))["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        for heat in (0, 1.7)
    ]
    equal(hot, cold, "alternatives of the first token at temperature 1.7")


@chat.check("prompt-logprobs", "prompt_logprobs has an entry per prompt token, the first null")
async def _(t: Target) -> None:
    answer = await t.chat(max_tokens=1, prompt_logprobs=1)
    entries = answer["prompt_logprobs"]
    equal(len(entries), answer["usage"]["prompt_tokens"], "entries")
    ensure(entries[0] is None and all(entries[1:]), "entries", "null, then objects", entries[:3])


@chat.check("text-parts", "a list of one text part is the same as the text")
async def _(t: Target) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    answer = await t.chat(messages=messages, max_tokens=24)
    equal(answer["usage"]["prompt_tokens"], (await t.plain())["usage"]["prompt_tokens"], "prompt_tokens")
    equal(answer["choices"][0]["message"]["content"], (await t.plain())["choices"][0]["message"]["content"], "content")


@chat.check("developer", "role developer is role system")
async def _(t: Target) -> None:
    texts = [
        await t.said(messages=[{"role": role, "content": "Be brief."}, *USER], max_tokens=16)
        for role in ("system", "developer")
    ]
    equal(texts[1], texts[0], "content")


@chat.check("conversation", "earlier turns are part of the prompt")
async def _(t: Target) -> None:
    turns = [*USER, {"role": "assistant", "content": "42"}, *USER]
    answer = await t.chat(messages=turns, max_tokens=1)
    ensure(
        answer["usage"]["prompt_tokens"] > (await t.plain())["usage"]["prompt_tokens"],
        "prompt_tokens",
        "more than for one turn",
        answer["usage"],
    )


@chat.check("continue", "continue_final_message continues the assistant's text")
async def _(t: Target) -> None:
    turns = [*USER, {"role": "assistant", "content": "4"}]
    continued = await t.chat(messages=turns, continue_final_message=True, add_generation_prompt=False, max_tokens=2)
    again = await t.chat(messages=turns, max_tokens=2)
    ensure(
        continued["usage"]["prompt_tokens"] < again["usage"]["prompt_tokens"],
        "prompt_tokens when continuing",
        "fewer than when a new turn begins",
        [continued["usage"], again["usage"]],
    )


@chat.check("ignored", "fields without meaning here are accepted: user, metadata, store, service_tier and their like")
async def _(t: Target) -> None:
    fields: dict[str, Any] = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    more = {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low"}
    await t.chat(max_tokens=1, **fields, **more)


@chat.check("null-fields", "null means absent")
async def _(t: Target) -> None:
    await t.chat(max_tokens=1, stop=None, seed=None, n=None, tools=None, response_format=None, stream_options=None)


@chat.check("unknown-field", "an unknown field is accepted")
async def _(t: Target) -> None:
    await t.chat(max_tokens=1, some_future_field={"a": 1})


@chat.check("extensions", "priority, request_id, chat_template_kwargs, reasoning_effort and skip_special_tokens are accepted")
async def _(t: Target) -> None:
    fields = {"priority": 1, "request_id": uuid.uuid4().hex, "reasoning_effort": "none", "skip_special_tokens": True}
    await t.chat(max_tokens=1, chat_template_kwargs={"enable_thinking": False}, **fields)


@chat.check("prefix-cache", "a prompt that is asked again is cached, and the answer is the same to the last digit")
async def _(t: Target) -> None:
    fields = {"messages": [{"role": "user", "content": f"{QUESTION} " * 8}], "cache_salt": uuid.uuid4().hex}
    cold, warm = [await t.chat(**fields, max_tokens=12, logprobs=True, top_logprobs=3) for _ in range(2)]
    equal(cold["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "cached_tokens of the first")
    ensure(warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "cached_tokens", "more than 0", warm["usage"])
    equal(warm["choices"], cold["choices"], "choices")


@chat.check("cache-salt", "prefixes are not shared between salts")
async def _(t: Target) -> None:
    messages = [{"role": "user", "content": f"{QUESTION} " * 8}]
    for _ in range(2):
        answer = await t.chat(messages=messages, cache_salt=uuid.uuid4().hex, max_tokens=1)
        equal(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "cached_tokens")
