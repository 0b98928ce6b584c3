# SPDX-License-Identifier: Apache-2.0
"""Structured output over HTTP: what reaches the engine, what is refused, and a real server whose random model obeys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from rocm_infer.engine.messages import ErrorInfo
from rocm_infer.text.chat import ChatTemplate
from tests.server.fakes import FakeClient, Harness, Script, run
from tests.server.toy_server import ToyServer, toy_server

CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
HI: list[Any] = [{"role": "user", "content": "hi"}]
INTEGER = {"type": "integer"}


def form_of(server: Harness) -> Any:
    """The structural tag of the last request."""
    grammar = server.engine.requests[-1].params.grammar
    return None if grammar is None else json.loads(grammar.text)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": INTEGER}}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": INTEGER, "strict": True}}}, "json_schema"),
        ({"json_schema": INTEGER}, "json_schema"),
        ({"json_schema": json.dumps(INTEGER)}, "json_schema"),
        ({"regex": "a+"}, "regex"),
        ({"ebnf": 'root ::= "a"'}, "grammar"),
        ({"guided_json": INTEGER}, "json_schema"),
        ({"guided_regex": "a+"}, "regex"),
        ({"guided_choice": ["a", "b"]}, "or"),
        ({"guided_grammar": 'root ::= "a"'}, "grammar"),
        ({"structured_outputs": {"choice": ["a"]}}, "const_string"),
        ({"structured_outputs": {"json": INTEGER, "regex": None}}, "json_schema"),
    ],
)
def test_every_spelling_reaches_the_engine(fields: dict[str, Any], kind: str | None) -> None:
    async def scenario(server: Harness) -> None:
        for path, prompt in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "hi"})):
            status, answer = await server.post(path, prompt | fields)
            assert status == 200, answer
            form = form_of(server)
            assert (form and form["type"]) == kind
        if fields.keys() <= {"json_schema", "regex", "ebnf"}:
            status, _ = await server.post(NATIVE, {"text": "hi", "sampling_params": fields})
            assert status == 200
            assert form_of(server)["type"] == kind
        assert server.engine.has_vocabulary == (kind is not None)

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_cannot_compile_is_400(stream: bool) -> None:
    error = ErrorInfo("invalid_value", "regex: the parenthesis is not closed", "regex")

    async def scenario(server: Harness) -> None:
        for path, prompt in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "hi"})):
            status, body = await server.post(path, {**prompt, "regex": "(", "stream": stream})
            assert (status, body["error"]["param"], body["error"]["code"]) == (400, "regex", "invalid_value")

    run(scenario, FakeClient(Script(error=error)))


@pytest.mark.parametrize("begun", [False, True])
def test_thinking_comes_before_the_grammar(begun: bool) -> None:
    async def scenario(server: Harness) -> None:
        template = "hi<think>\n" if begun else "hi{# <think> #}"
        object.__setattr__(server.service.files, "template", ChatTemplate(template, {}))
        await server.post(CHAT, {"messages": HI, "json_schema": INTEGER})
        thought, blank, answer = form_of(server)["elements"]
        thought = thought if begun else thought["content"]
        assert (thought["begin"], thought["end"]) == ("" if begun else "<think>", "</think>")
        assert (blank["type"], answer["type"]) == ("regex", "json_schema")

    run(scenario)


def test_the_vocabulary_is_told_once_per_worker() -> None:
    async def scenario(server: Harness) -> None:
        await server.post(CHAT, {"messages": HI})
        assert not server.engine.has_vocabulary
        await server.post(CHAT, {"messages": HI, "regex": "a"})
        first = server.engine.vocabulary
        await server.post(CHAT, {"messages": HI, "regex": "b"})
        assert server.engine.vocabulary is first
        assert len(first) == server.service.vocab_size
        assert first[server.service.tokenizer.eos_id or 0] == b""

    run(scenario)


class Pet(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    ages: list[int] = pydantic.Field(max_length=2)
    friend: Toy | None


class Toy(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    loud: bool


Pet.model_rebuild()
PET_FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": Pet.model_json_schema()}}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyServer]:
    with toy_server(tmp_path_factory.mktemp("structured")) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: ToyServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.timeout(600)
def test_a_random_model_obeys_through_http(server: ToyServer, client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="toy", messages=HI, response_format=Pet, n=3, seed=1, max_tokens=400, temperature=1.0
    )
    pets = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(pet, Pet) for pet in pets)
    request: dict[str, Any] = {"model": "toy", "messages": HI, "seed": 5, "max_tokens": 400, "temperature": 1.0}
    whole = client.chat.completions.create(**request, response_format=PET_FORMAT)
    chunks = client.chat.completions.create(**request, response_format=PET_FORMAT, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    Pet.model_validate_json(text)
    completion = client.completions.create(
        model="toy", prompt="x", max_tokens=50, temperature=1, extra_body={"regex": "[0-9]{3}-(yes|no)"}, logprobs=1
    )
    assert re.fullmatch("[0-9]{3}-(yes|no)", completion.choices[0].text)
    status, native = server.request(
        NATIVE,
        {"text": "x", "sampling_params": {"ebnf": 'root ::= ("ab" | "cd")+ "."', "max_new_tokens": 60, "temperature": 2}},
    )
    assert status == 200
    assert re.fullmatch(r"(ab|cd)+(\.)?", native["text"])


@pytest.mark.timeout(600)
def test_forced_calls_through_http(server: ToyServer, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "toy", "messages": HI, "tools": TOOLS, "temperature": 1.0, "max_tokens": 300}
    named: Any = {"type": "function", "function": {"name": "add"}}
    for seed in range(3):
        answer = client.chat.completions.create(**request, tool_choice=named, seed=seed)
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls or []
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert set(json.loads(call.function.arguments)) == {"a"}  # type: ignore[union-attr]
        with client.chat.completions.stream(**request, tool_choice="required", seed=seed, parallel_tool_calls=False) as stream:
            message = stream.get_final_completion().choices[0].message
        assert [set(json.loads(call.function.arguments)) for call in message.tool_calls or []] == [{"a"}]


@pytest.mark.timeout(600)
def test_refusals_and_a_new_worker(server: ToyServer) -> None:
    """A grammar that cannot be compiled is 400; a worker that takes another's place learns the vocabulary again."""
    for stream in (False, True):
        status, body = server.request(CHAT, {"messages": HI, "regex": "(", "stream": stream})
        assert (status, body["error"]["param"]) == (400, "regex")
    server.kill_worker()
    server.wait_for(lambda: server.request("/health")[0] == 200)
    status, body = server.request(CHAT, {"messages": HI, "guided_choice": ["yes", "no"], "max_tokens": 9})
    assert status == 200, body
    assert body["choices"][0]["message"]["content"] in ("yes", "no")
    server.assert_idle()
