# SPDX-License-Identifier: Apache-2.0
"""/v1/completions: prompt forms, echo with log-probabilities, several prompts and candidates."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.fakes import MODEL, TOKENIZER, FakeClient, Harness, Script, logprob_of, run

TEXT = Script().text


async def whole(server: Harness, **fields: Any) -> dict[str, Any]:
    status, answer = await server.post("/v1/completions", {"model": MODEL, **fields})
    assert status == 200, answer
    return answer


async def streamed(server: Harness, **fields: Any) -> list[dict[str, Any]]:
    events = await server.events("/v1/completions", {"model": MODEL, "stream": True, **fields})
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_the_client_reads_it() -> None:
    async def scenario(server: Harness) -> None:
        answer = await server.sdk.completions.create(model=MODEL, prompt="abc", max_tokens=5)
        assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
            "text_completion",
            "Hello",
            "length",
        )
        assert answer.id.startswith("cmpl-")
        text = ""
        async for chunk in await server.sdk.completions.create(model=MODEL, prompt="abc", max_tokens=5, stream=True):
            assert chunk.object == "text_completion"
            text += chunk.choices[0].text
        assert text == "Hello"

    run(scenario)


def test_sixteen_tokens_by_default() -> None:
    async def scenario(server: Harness) -> None:
        assert (await whole(server, prompt="abc"))["usage"]["completion_tokens"] == 16

    run(scenario)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        (TOKENIZER.encode("abc"), ["abc"]),
        ([TOKENIZER.encode("abc"), TOKENIZER.encode("d")], ["abc", "d"]),
    ],
)
def test_prompt_forms(prompt: Any, expected: list[str]) -> None:
    async def scenario(server: Harness) -> None:
        answer = await whole(server, prompt=prompt, n=2, max_tokens=2)
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
        seen = [TOKENIZER.decode(request.prompt_ids) for request in server.engine.requests]
        assert seen == [text for text in expected for _ in range(2)]
        assert answer["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(text)) for text in expected)
        assert answer["usage"]["completion_tokens"] == 4 * len(expected)

    run(scenario)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_of_token_ids(max_tokens: int) -> None:
    """What lm-eval sends for log-likelihoods."""
    ids = TOKENIZER.encode("the cat")

    async def scenario(server: Harness) -> None:
        answer = await whole(server, prompt=[ids, ids[:2]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
        first, second = answer["choices"]
        assert first["text"] == "the cat" + TEXT[:max_tokens]
        logprobs = first["logprobs"]
        assert logprobs["tokens"] == ["the", " ", "c", "a", "t", *TEXT[:max_tokens]]
        assert logprobs["text_offset"] == [0, 3, 4, 5, 6, 7][: 5 + max_tokens]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:5] == [logprob_of(i, ids[i]) for i in range(1, 5)]
        assert logprobs["top_logprobs"][1] == {" ": logprob_of(1, ids[1])}
        assert len(second["logprobs"]["tokens"]) == 2 + max_tokens
        assert first["finish_reason"] == "length"

    run(scenario)


def test_echo_streams_as_it_is_whole() -> None:
    async def scenario(server: Harness) -> None:
        fields = {"prompt": "wörd", "echo": True, "logprobs": 2, "max_tokens": 30, "stop": " 😀"}
        answer = await whole(server, **fields)
        chunks = await streamed(server, **fields)
        choice = answer["choices"][0]
        assert choice["text"] == "wörd" + TEXT[: TEXT.index(" 😀")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
        joined: dict[str, list[Any]] = {name: [] for name in choice["logprobs"]}
        for chunk in chunks:
            for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
                joined[name] += values
        assert joined == choice["logprobs"]
        assert joined["tokens"][1] == "bytes:\\xc3"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    run(scenario)


def test_logprobs_offsets_follow_the_text() -> None:
    async def scenario(server: Harness) -> None:
        logprobs = (await whole(server, prompt="x", logprobs=0, max_tokens=30))["choices"][0]["logprobs"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if not token.startswith(("bytes:", "<|")):
                assert TEXT[offset : offset + len(token)] == token

    run(scenario)


def test_best_of_returns_the_likeliest() -> None:
    texts = iter(["zz", "!!", "mm"])

    async def scenario(server: Harness) -> None:
        answer = await whole(server, prompt="x", best_of=3, n=2)
        assert [choice["text"] for choice in answer["choices"]] == ["!!", "mm"]
        assert answer["choices"][0]["logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 9

    run(scenario, FakeClient(lambda request: Script(text=next(texts))))


def test_prompt_logprobs_and_token_ids() -> None:
    async def scenario(server: Harness) -> None:
        answer = await whole(server, prompt="ab", prompt_logprobs=0, return_token_ids=True, max_tokens=1)
        choice = answer["choices"][0]
        assert len(choice["prompt_logprobs"]) == 2
        assert choice["prompt_token_ids"] == TOKENIZER.encode("ab")
        assert choice["token_ids"] == TOKENIZER.encode("H")

    run(scenario)


def test_a_stop_token_shows_nothing() -> None:
    async def scenario(server: Harness) -> None:
        answer = await whole(server, prompt="x", max_tokens=100)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (TEXT, "stop", TOKENIZER.eos_id)

    run(scenario)
