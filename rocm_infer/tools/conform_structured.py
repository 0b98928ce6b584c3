# SPDX-License-Identifier: Apache-2.0
"""Checks of structured output: whatever the model would say, the answer has the form that was asked for."""

from __future__ import annotations

import json
import re
from typing import Any

from rocm_infer.tools.conform_target import Area, Target, ensure, equal

structured = Area("structured")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Grace"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "active"],
    "additionalProperties": False,
}


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


async def asked(t: Target, schema: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request for a value under a schema."""
    return {"response_format": response_format(schema), "max_tokens": 160, "logit_bias": await t.no_blanks()}


async def value_of(t: Target, schema: dict[str, Any], **fields: Any) -> Any:
    """What the model answers under a schema, decoded."""
    choice = (await t.chat(**await asked(t, schema), **fields))["choices"][0]
    equal(choice["finish_reason"], "stop", f"finish_reason of {choice['message']['content']!r}")
    return decoded(choice["message"]["content"])


def decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _NotJson(text) from error


class _NotJson(Exception):
    """The text where JSON was expected."""


def person(value: Any) -> None:
    """The value is as PERSON says."""
    equal(sorted(value), ["active", "age", "name", "tags"], "members")
    ensure(value["name"] in ("Ada", "Grace"), "name", "Ada or Grace", value)
    ensure(type(value["age"]) is int and 0 <= value["age"] <= 99, "age", "0 to 99", value)
    ensure(1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b"}, "tags", "1 to 3 of a, b", value)
    ensure(type(value["active"]) is bool, "active", "a boolean", value)


@structured.check("schema", "json_schema with enum, integer range, array bounds, boolean, no further members")
async def _(t: Target) -> None:
    person(await value_of(t, PERSON))


@structured.check("schema-sampled", "the same at temperature 2, for every choice")
async def _(t: Target) -> None:
    answer = await t.chat(**await asked(t, PERSON), temperature=2, n=4, seed=1)
    for choice in answer["choices"]:
        person(decoded(choice["message"]["content"]))


@structured.check("schema-stream", "the pieces of a stream are the same JSON")
async def _(t: Target) -> None:
    events = await t.chat_events(**await asked(t, PERSON))
    person(decoded(events.content()))
    equal(decoded(events.content()), await value_of(t, PERSON), "value")
    equal(events.choices()[-1]["finish_reason"], "stop", "finish_reason")


@structured.check("schema-ref", "$ref to $defs, nested")
async def _(t: Target) -> None:
    schema = {
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"enum": [0, 1]}, "y": {"enum": [0, 1]}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
    }
    value = await value_of(t, schema)
    equal(sorted(value), ["from", "to"], "members")
    ensure(all(value[end][axis] in (0, 1) for end in value for axis in "xy"), "points", "of 0 and 1", value)


@structured.check("schema-any-of", "anyOf")
async def _(t: Target) -> None:
    schema = {
        "type": "object",
        "properties": {"value": {"anyOf": [{"enum": ["x"]}, {"type": "boolean"}, {"type": "null"}]}},
        "required": ["value"],
        "additionalProperties": False,
    }
    value = (await value_of(t, schema))["value"]
    ensure(value in ("x", None) or type(value) is bool, "value", "x, a boolean or null", value)


@structured.check("schema-array", "an array of arrays")
async def _(t: Target) -> None:
    row = {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2}
    schema = {"type": "array", "items": row, "minItems": 2, "maxItems": 2}
    value = await value_of(t, schema)
    equal([len(each) for each in value], [2, 2], "lengths")


@structured.check("schema-const", "const and text beyond ASCII")
async def _(t: Target) -> None:
    text = "\u00e9\U0001f600\u6f22"
    schema = {"type": "object", "properties": {"a": {"const": text}}, "required": ["a"], "additionalProperties": False}
    equal(await value_of(t, schema), {"a": text}, "value")


@structured.check("schema-pattern", "strings with a pattern")
async def _(t: Target) -> None:
    schema = {
        "type": "object",
        "properties": {"date": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}},
        "required": ["date"],
        "additionalProperties": False,
    }
    value = (await value_of(t, schema))["date"]
    ensure(re.fullmatch(r"[0-9]{4}-[0-9]{2}", value), "date", "dddd-dd", value)


@structured.check("half-characters", "a stream never shows half a character, nor a stop string that begins inside one")
async def _(t: Target) -> None:
    text = "\u00e9\U0001f600\u6f22"
    schema = {"type": "object", "properties": {"a": {"const": text}}, "required": ["a"], "additionalProperties": False}
    fields = await asked(t, schema)
    events = await t.chat_events(**fields)
    ensure("\ufffd" not in events.content() and text in events.content(), "content", text, events.content())
    stopped = (await t.chat_events(**fields, stop="\U0001f600")).content()
    equal(stopped, events.content().partition("\U0001f600")[0], "content with a stop string of four bytes")


@structured.check("json-object", "json_object gives an object, cut only by max_tokens")
async def _(t: Target) -> None:
    answer = await t.chat(response_format={"type": "json_object"}, max_tokens=60)
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    ensure(text.lstrip().startswith("{"), "content", "{...", text)
    if choice["finish_reason"] == "stop":
        ensure(isinstance(decoded(text), dict), "content", "an object", text)


@structured.check("text", "response_format text changes nothing")
async def _(t: Target) -> None:
    plain = (await t.plain())["choices"][0]["message"]["content"]
    equal(await t.said(response_format={"type": "text"}, max_tokens=24), plain, "content")


@structured.check("logprobs", "log-probabilities are reported beside a schema")
async def _(t: Target) -> None:
    answer = await t.chat(response_format=response_format(PERSON), max_tokens=8, logprobs=True, top_logprobs=2)
    entries = answer["choices"][0]["logprobs"]["content"]
    ensure(entries and all(entry["logprob"] <= 0 for entry in entries), "logprobs", "at most 0", entries[:2])


@structured.check("bad-schema", "a schema that cannot be compiled is 400")
async def _(t: Target) -> None:
    for schema in ({"type": "no-such-type"}, {"$ref": "#/nowhere"}, {"type": "object", "properties": {"a": 7}}):
        await t.chat_refused("response_format", response_format=response_format(schema))


@structured.check("missing-schema", "json_schema without a schema is 400")
async def _(t: Target) -> None:
    await t.chat_refused(None, response_format={"type": "json_schema"})


@structured.check("regex", "regex: the answer matches")
async def _(t: Target) -> None:
    text = await t.said(regex="(red|green) [0-9]{3}", max_tokens=40)
    ensure(re.fullmatch("(red|green) [0-9]{3}", text), "content", "(red|green) [0-9]{3}", text)


@structured.check("regex-bad", "a regex that cannot be compiled is 400")
async def _(t: Target) -> None:
    await t.chat_refused("regex", regex="([a-z")


@structured.check("ebnf", "ebnf: the answer is of the grammar")
async def _(t: Target) -> None:
    text = await t.said(ebnf='root ::= "<" ("a" | "b") ("," ("a" | "b"))? ">"', max_tokens=40)
    ensure(re.fullmatch("<[ab](,[ab])?>", text), "content", "<a> to <b,b>", text)


@structured.check("ebnf-bad", "a grammar that cannot be compiled is 400")
async def _(t: Target) -> None:
    await t.chat_refused("ebnf", ebnf="root ::= (")


@structured.check("completions", "structured output works for /v1/completions too")
async def _(t: Target) -> None:
    answer = await t.complete(**await asked(t, PERSON))
    person(decoded(answer["choices"][0]["text"]))
