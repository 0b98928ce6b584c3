# SPDX-License-Identifier: Apache-2.0
"""Checks of /v1/completions."""

from __future__ import annotations

from rocm_infer.tools.conform_target import QUESTION, Area, Target, among, ensure, equal

completions = Area("completions")
PROMPTS = ["one two three", "What is 1 + 1?", QUESTION]


@completions.check("shape", "object text_completion, id cmpl-, text, finish_reason")
async def _(t: Target) -> None:
    answer = await t.long()
    equal(answer["object"], "text_completion", "object")
    ensure(answer["id"].startswith("cmpl-"), "id", "cmpl-...", answer["id"])
    choice = answer["choices"][0]
    ensure(isinstance(choice["text"], str), "text", "a string", choice)
    equal((choice["index"], choice["finish_reason"], choice["logprobs"]), (0, "length", None), "index, reason, logprobs")


@completions.check("default-16", "max_tokens is 16 unless given")
async def _(t: Target) -> None:
    equal((await t.complete(ignore_eos=True))["usage"]["completion_tokens"], 16, "completion_tokens")


@completions.check("list", "a list of prompts gives a choice for each, in order")
async def _(t: Target) -> None:
    answer = await t.complete(prompt=PROMPTS, max_tokens=6, ignore_eos=True)
    equal([choice["index"] for choice in answer["choices"]], [0, 1, 2], "indices")
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        alone = await t.complete(prompt=prompt, max_tokens=6, ignore_eos=True)
        equal(choice["text"], alone["choices"][0]["text"], f"text for {prompt!r}")


@completions.check("index", "index is prompt * n + choice, and each prompt counts once")
async def _(t: Target) -> None:
    answer = await t.complete(prompt=PROMPTS[:2], n=2, max_tokens=4, ignore_eos=True, temperature=1.5, seed=2)
    equal([choice["index"] for choice in answer["choices"]], [0, 1, 2, 3], "indices")
    once = await t.complete(prompt=PROMPTS[:2], max_tokens=1)
    equal(answer["usage"]["prompt_tokens"], once["usage"]["prompt_tokens"], "prompt_tokens")
    second = await t.complete(prompt=PROMPTS[1], n=2, max_tokens=4, ignore_eos=True, temperature=1.5, seed=2)
    equal(
        [choice["text"] for choice in answer["choices"][2:]], [choice["text"] for choice in second["choices"]], "second prompt"
    )


@completions.check("token-ids", "a prompt of token ids is the text they make")
async def _(t: Target) -> None:
    ids = await t.tokens(QUESTION, special=True)
    answer = await t.complete(prompt=ids, max_tokens=32, ignore_eos=True)
    equal(answer["choices"][0]["text"], (await t.long())["choices"][0]["text"], "text")
    equal(answer["usage"]["prompt_tokens"], len(ids), "prompt_tokens")


@completions.check("token-id-lists", "a list of lists of token ids")
async def _(t: Target) -> None:
    ids = [await t.tokens(prompt, special=True) for prompt in PROMPTS[:2]]
    by_ids = await t.complete(prompt=ids, max_tokens=6, ignore_eos=True)
    by_text = await t.complete(prompt=PROMPTS[:2], max_tokens=6, ignore_eos=True)
    equal([c["text"] for c in by_ids["choices"]], [c["text"] for c in by_text["choices"]], "texts")


@completions.check("echo", "echo puts the prompt before the text")
async def _(t: Target) -> None:
    answer = await t.complete(max_tokens=4, ignore_eos=True, echo=True)
    ensure(answer["choices"][0]["text"].startswith(QUESTION), "text", f"{QUESTION}...", answer["choices"][0]["text"])


@completions.check("log-likelihood", "echo, max_tokens 0 and token ids: a log-probability per prompt token, the first null")
async def _(t: Target) -> None:
    ids = await t.tokens(QUESTION, special=True)
    choice = (await t.complete(prompt=ids, max_tokens=0, echo=True, logprobs=1))["choices"][0]
    values = choice["logprobs"]["token_logprobs"]
    equal(len(values), len(ids), "entries")
    ensure(values[0] is None and all(value <= 0 for value in values[1:]), "values", "null, then at most 0", values)


@completions.check("log-likelihood-1", "the same with max_tokens 1, as lm-eval asks")
async def _(t: Target) -> None:
    ids = await t.tokens(QUESTION, special=True)
    none, one = [
        (await t.complete(prompt=ids, max_tokens=limit, echo=True, logprobs=1))["choices"][0]["logprobs"]["token_logprobs"]
        for limit in (0, 1)
    ]
    equal(one[: len(ids)], none, "log-probabilities of the prompt")


@completions.check("log-likelihood-own", "the model's own text has the log-probabilities it was sampled with")
async def _(t: Target) -> None:
    ids = await t.tokens(QUESTION, special=True)
    made = (await t.complete(prompt=ids, max_tokens=6, ignore_eos=True, logprobs=1, return_token_ids=True))["choices"][0]
    scored = await t.complete(prompt=ids + made["token_ids"], max_tokens=0, echo=True, logprobs=1)
    again = scored["choices"][0]["logprobs"]["token_logprobs"][len(ids) :]
    sampled = made["logprobs"]["token_logprobs"]
    worst = max(abs(a - b) for a, b in zip(again, sampled, strict=True))
    ensure(worst < 0.1, "difference of log-probabilities, scored and sampled", "below 0.1", worst)


@completions.check("logprobs", "tokens, token_logprobs, top_logprobs and text_offset run parallel")
async def _(t: Target) -> None:
    shown = (await t.complete(max_tokens=6, ignore_eos=True, logprobs=5))["choices"][0]["logprobs"]
    equal({len(shown[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}, {6}, "lengths")
    ensure(all(5 <= len(top) <= 6 for top in shown["top_logprobs"]), "top_logprobs", "5 or 6 each", shown["top_logprobs"])
    equal(shown["text_offset"], sorted(shown["text_offset"]), "order of text_offset")


@completions.check("logprobs-0", "logprobs 0 gives the chosen token alone")
async def _(t: Target) -> None:
    shown = (await t.complete(max_tokens=3, ignore_eos=True, logprobs=0))["choices"][0]["logprobs"]
    ensure(all(len(top) == 1 for top in shown["top_logprobs"]), "top_logprobs", "1 each", shown["top_logprobs"])


@completions.check("logprobs-20", "logprobs up to 20 are accepted, more are not")
async def _(t: Target) -> None:
    await t.complete(max_tokens=1, logprobs=20)
    await t.refused("/v1/completions", {"prompt": "a", "logprobs": 21}, param="logprobs")


@completions.check("echo-offset", "with echo, offsets begin at the prompt's start")
async def _(t: Target) -> None:
    shown = (await t.complete(max_tokens=2, ignore_eos=True, echo=True, logprobs=1))["choices"][0]["logprobs"]
    equal(shown["text_offset"][0], 0, "first offset")
    equal(shown["text_offset"], sorted(shown["text_offset"]), "order of text_offset")


@completions.check("best-of", "best_of makes more candidates than it returns")
async def _(t: Target) -> None:
    answer = await t.complete(n=1, best_of=3, max_tokens=4, ignore_eos=True, temperature=1.5, seed=1)
    equal(len(answer["choices"]), 1, "choices")
    equal(answer["usage"]["completion_tokens"], 12, "completion_tokens of all candidates")


@completions.check("best-of-small", "best_of below n is refused")
async def _(t: Target) -> None:
    await t.refused("/v1/completions", {"prompt": "a", "n": 3, "best_of": 2}, param="best_of")


@completions.check("suffix", "suffix is refused by name")
async def _(t: Target) -> None:
    await t.refused("/v1/completions", {"prompt": "a", "suffix": "b"}, param="suffix", code="unsupported_parameter")


@completions.check("stop", "a stop string ends the text before it")
async def _(t: Target) -> None:
    text = (await t.long())["choices"][0]["text"]
    choice = (await t.complete(max_tokens=32, ignore_eos=True, stop=text[5:8]))["choices"][0]
    equal((choice["text"], choice["finish_reason"]), (text[: text.index(text[5:8])], "stop"), "text and finish_reason")


@completions.check("stream", "chunks are text_completion objects, and their texts are the whole text")
async def _(t: Target) -> None:
    events = await t.completion_events(max_tokens=32, ignore_eos=True)
    equal({chunk["object"] for chunk in events.chunks}, {"text_completion"}, "objects")
    equal(events.text(), (await t.long())["choices"][0]["text"], "text")
    equal(events.done, True, "[DONE]")


@completions.check("stream-finish", "finish_reason is null until the last chunk")
async def _(t: Target) -> None:
    *earlier, last = [choice["finish_reason"] for choice in (await t.completion_events(max_tokens=8)).choices()]
    equal(set(earlier) | {None}, {None}, "finish_reason before the last chunk")
    among(last, ("stop", "length"), "last finish_reason")


@completions.check("stream-echo", "a stream with echo begins with the prompt")
async def _(t: Target) -> None:
    text = (await t.completion_events(max_tokens=3, ignore_eos=True, echo=True)).text()
    ensure(text.startswith(QUESTION), "text", f"{QUESTION}...", text)


@completions.check("stream-list", "a stream of several prompts ends each choice once")
async def _(t: Target) -> None:
    events = await t.completion_events(prompt=PROMPTS, max_tokens=4, ignore_eos=True)
    for index in range(3):
        ends = [choice["finish_reason"] for choice in events.choices(index) if choice["finish_reason"]]
        equal(ends, ["length"], f"finish_reasons of choice {index}")


@completions.check("stream-usage", "include_usage works here too")
async def _(t: Target) -> None:
    events = await t.completion_events(max_tokens=5, ignore_eos=True, stream_options={"include_usage": True})
    equal(events.chunks[-1]["choices"], [], "choices of the last chunk")
    equal(events.chunks[-1]["usage"]["completion_tokens"], 5, "completion_tokens")


@completions.check("stream-logprobs", "log-probabilities of a stream are those of the whole answer")
async def _(t: Target) -> None:
    fields = {"max_tokens": 6, "ignore_eos": True, "logprobs": 2}
    whole = (await t.complete(**fields))["choices"][0]["logprobs"]
    parts = [choice["logprobs"] for choice in (await t.completion_events(**fields)).choices() if choice["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        equal([value for part in parts for value in part[name]], whole[name], name)


@completions.check("empty-list", "an empty list of prompts is refused")
async def _(t: Target) -> None:
    await t.refused("/v1/completions", {"prompt": []}, param="prompt")


@completions.check("bad-ids", "token ids outside the vocabulary are refused")
async def _(t: Target) -> None:
    await t.refused("/v1/completions", {"prompt": [2**30]}, param="prompt")
    await t.refused("/v1/completions", {"prompt": [-1]})


@completions.check("unicode", "text of any script survives echo")
async def _(t: Target) -> None:
    text = "na\u00efve \u6f22\u5b57 \U0001f600 \u05d0"
    answer = await t.complete(prompt=text, echo=True, max_tokens=0)
    equal(answer["choices"][0]["text"], text, "echo")
