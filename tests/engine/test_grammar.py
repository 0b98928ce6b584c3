# SPDX-License-Identifier: Apache-2.0
"""Grammars in the engine: a model of random logits obeys every schema, alone or in company; bad grammars hurt nobody else."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import random
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rocm_infer.config import EngineConfig, Grammar
from rocm_infer.engine import engine as engine_module
from rocm_infer.engine.capsule import History, make_capsule
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.grammar import Grammars
from rocm_infer.engine.messages import AddRequest, RequestOutput
from rocm_infer.engine.recorder import FILE_NAME, Recorder, Recording
from rocm_infer.engine.request import RequestRefused
from rocm_infer.text import grammar
from rocm_infer.text.grammar import Format, GrammarTextError
from rocm_infer.text.tokenizer import Tokenizer
from rocm_infer.text.tools import FORMATS, Function, ToolFormat, ToolSplit, forced_calls, free_calls
from rocm_infer.tools.replay import Replay
from tests.engine.toy import ToyModel, drain, request, tokens_of
from tests.engine.toy import run as run_all
from tests.text.toys import CONFIG, byte_level, write_folder

TOKENIZER = Tokenizer(byte_level(), CONFIG)
VOCAB = TOKENIZER.vocab_size + 2  # the last two make the toy fail
EOS = TOKENIZER.eos_id or 0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog", 3]},
        "sizes": {"type": "array", "items": {"$ref": "#/$defs/size"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
    "$defs": {
        "size": {
            "type": "object",
            "properties": {"w": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
            "required": ["w", "ok"],
            "additionalProperties": False,
        }
    },
}


def grammar_of(form: Format, param: str = "response_format") -> Grammar:
    return Grammar(grammar.as_text(form), param)


def schema_grammar(schema: Any = SCHEMA, whitespace: int = 1) -> Grammar:
    return grammar_of(grammar.json_schema(schema) | {"max_whitespace_cnt": whitespace})


def engine(**settings: Any) -> Engine:
    config = EngineConfig(model="toy", **{"page_size": 4, "max_total_tokens": 4096, "num_threads": 1, **settings})
    made = Engine(config, model=ToyModel(1024, VOCAB, EOS))
    made.set_vocabulary(TOKENIZER.vocabulary(VOCAB))
    return made


def wanted(rid: str, seed: int = 0, form: Grammar | None = None, **params: Any) -> AddRequest:
    settings: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0, "seed": seed, "grammar": form or schema_grammar()}
    return request(rid, TOKENIZER.encode(f"request {seed}"), **{**settings, **params})


def text_of(outputs: list[RequestOutput]) -> str:
    return TOKENIZER.decode(tokens_of(outputs))


def check(value: Any) -> None:
    """A value satisfies SCHEMA."""
    assert list(value) == ["name", "kind", "sizes"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 5
    assert value["kind"] in ("cat", "dog", 3)
    assert 1 <= len(value["sizes"]) <= 2
    for size in value["sizes"]:
        assert list(size) == ["w", "ok"]
        assert type(size["w"]) is int
        assert 0 <= size["w"] <= 99
        assert type(size["ok"]) is bool


def test_random_logits_obey_a_schema() -> None:
    outputs = run_all(engine(), *[wanted(f"{seed}", seed, temperature=2.0 * (seed % 2)) for seed in range(8)])
    texts = [text_of(output) for output in outputs.values()]
    for output in outputs.values():
        assert output[-1].finish_reason == "stop"
        check(json.loads(text_of(output)))
    assert len(set(texts)) > 1


def test_grammars_change_nothing_for_others_and_others_nothing_for_them() -> None:
    """Alone, in company, in small chunks, preempted, with a cached prefix, with penalties: the same tokens."""
    mixed = [
        wanted("a", 1),
        wanted("b", 2, grammar=None, max_tokens=60),
        wanted("c", 3, form=grammar_of(grammar.regex("[a-f]{3,40}x"))),
        wanted("d", 4, frequency_penalty=0.5, logit_bias=((TOKENIZER.encode("9")[0], 3.0),)),
        wanted("e", 1, top_k=5, min_tokens=3),
        wanted("f", 6, grammar=None, max_tokens=60, presence_penalty=1.0),
        wanted("g", 7, form=grammar_of(grammar.choice(["yes", "no", "perhaps"])), logprobs=2),
    ]
    alone = {each.rid: tokens_of(run_all(engine(), each)[each.rid]) for each in mixed}
    check(json.loads(TOKENIZER.decode(alone["a"])))
    crowded = engine(max_total_tokens=256, max_running_requests=5, chunked_prefill_size=7, schedule_conservativeness=0.1)
    assert {rid: tokens_of(output) for rid, output in run_all(crowded, *mixed).items()} == alone
    assert crowded.stats()["preemptions"] > 0
    again = [AddRequest(f"{each.rid}2", each.prompt_ids, each.params) for each in mixed]
    found = run_all(crowded, *again)
    assert {rid[:-1]: tokens_of(output) for rid, output in found.items()} == alone
    assert not crowded.grammars._matchers, "matchers of finished requests are left"


def test_a_failed_step_is_repeated_without_moving_the_grammar() -> None:
    lonely = tokens_of(run_all(engine(), wanted("a", 1))["a"])
    made = engine()
    made.add(wanted("a", 1))
    for _ in range(12):
        made.step()
    produced = made.scheduler.requests["a"].num_output
    made.add(request("bad", [VOCAB - 1], max_tokens=3))  # its step raises, then each request runs alone
    outputs = drain(made)
    assert outputs["bad"][-1].error is not None
    assert tokens_of(outputs["a"]) == lonely[produced:]


def test_logprobs_are_of_the_distribution_before_the_grammar() -> None:
    output = run_all(engine(), wanted("a", 5, form=grammar_of(grammar.choice(["yes"])), logprobs=20))["a"]
    assert text_of(output) == "yes"
    first = (output[0].logprobs or [])[0]
    assert first.token_id == TOKENIZER.encode("y")[0]
    assert first.top[0][1] > first.logprob, "a more likely token was forbidden"


def test_the_end_comes_with_the_grammar() -> None:
    """ignore_eos and min_tokens do not carry an output beyond its grammar, but min_tokens uses what the grammar leaves open."""
    one = grammar_of(grammar.choice(["ab"]))
    for params in ({"ignore_eos": True}, {"min_tokens": 50}):
        output = run_all(engine(), wanted("a", form=one, **params))["a"]
        assert (text_of(output), output[-1].finish_reason, output[-1].matched_stop) == ("ab", "stop", EOS)
    long = run_all(engine(), wanted("a", form=grammar_of(grammar.regex("a{1,60}")), min_tokens=50))["a"]
    assert len(text_of(long)) >= 50
    cut = run_all(engine(), wanted("a", form=one, max_tokens=1))["a"]
    assert (text_of(cut), cut[-1].finish_reason) == ("a", "length")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"type": "regex", "pattern": "("}, "parenthesis"),
        ({"type": "grammar", "grammar": "root ::= nothing"}, "not defined"),
        ({"type": "grammar", "grammar": 'root ::= root "a"'}, "no output"),
        ({"type": "json_schema", "json_schema": {"$ref": "#/$defs/a"}}, "defs"),
        ({"type": "json_schema", "json_schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum"),
        ({"type": "surprise"}, ""),
    ],
)
def test_a_bad_grammar_is_refused_and_hurts_nobody(form: Format, says: str) -> None:
    made = engine()
    made.add(wanted("bad", form=grammar_of(form, "my_field")))
    made.add(wanted("good", 1))
    outputs = drain(made)
    (refusal,) = outputs["bad"]
    assert refusal.error is not None
    assert (refusal.finish_reason, refusal.error.code, refusal.error.param) == ("error", "invalid_value", "my_field")
    assert says in refusal.error.message
    assert refusal.error.message.startswith("my_field: ")
    assert "/cpp/" not in refusal.error.message
    check(json.loads(text_of(outputs["good"])))


def test_requests_that_wait_for_their_grammar() -> None:
    made = engine(max_queued_requests=2)
    made.add(wanted("a"))
    assert made.has_work
    assert made.stats()["num_waiting"] == 1
    for again in (wanted("a"), wanted("a", grammar=None)):
        with pytest.raises(RequestRefused, match="in use"):
            made.add(again)
    made.add(wanted("b"))
    with pytest.raises(RequestRefused, match="waiting"):
        made.add(wanted("c"))
    made.abort("b")
    outputs = drain(made)
    assert outputs["b"][-1].finish_reason == "abort"
    check(json.loads(text_of(outputs["a"])))
    assert not made.has_work
    without = Engine(EngineConfig(model="toy", num_threads=1, max_total_tokens=64), model=ToyModel(64, VOCAB, EOS))
    with pytest.raises(RequestRefused, match="vocabulary"):
        without.add(wanted("a", max_tokens=4))


def test_a_vocabulary_that_cannot_spell_the_grammar() -> None:
    made = engine()
    made.set_vocabulary([b"" if token == b"s" else token for token in TOKENIZER.vocabulary(VOCAB)])
    output = run_all(made, wanted("a", form=grammar_of(grammar.choice(["yes"]))))["a"]
    assert output[-1].error is not None
    assert "grammar allows no token" in output[-1].error.message


def test_masks_allow_no_special_token_as_text() -> None:
    grammars = Grammars(VOCAB, [EOS])
    grammars.vocabulary = TOKENIZER.vocabulary(VOCAB)
    made = engine()
    made.grammars = grammars
    given = made.make_request(wanted("a", form=grammar_of(grammar.regex("[<|>a-z]+"))), 0)
    masks = grammars.begin([given])
    assert masks is not None
    words = masks.of([given, made.make_request(wanted("b", grammar=None), 1)], torch.device("cpu"))
    allowed = ((words[:, :, None] >> torch.arange(32)) & 1).flatten(1)[:, :VOCAB]
    assert allowed[1].all(), "a request without a grammar is free"
    texts = {TOKENIZER.token(token) for token in allowed[0].nonzero()[:, 0].tolist()}
    assert {"<", "|", "a", "th", "the"} <= texts
    assert not any(text.startswith("<|") for text in texts)


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    monkeypatch.setattr(made.grammars, "compile", lambda text: Future())
    monkeypatch.setattr(engine_module, "GRAMMAR_TIMEOUT", 0.0)
    (refusal,) = run_all(made, wanted("a"))["a"]
    assert refusal.error is not None
    assert (refusal.error.code, refusal.error.param) == ("invalid_value", "response_format")
    assert not made.has_work


def test_replay_follows_grammars(tmp_path: Path) -> None:
    """The last steps of constrained requests give the same tokens again, in an engine that reads the vocabulary itself."""
    folder = write_folder(tmp_path / "toy")
    made, history = engine(), History()
    made.config = dataclasses.replace(made.config, model=str(folder))
    recording = Recording(tmp_path / FILE_NAME)
    made.recorder = Recorder(tmp_path / FILE_NAME)
    for seed in range(3):
        made.add(wanted(f"{seed}", seed))
        history.add(wanted(f"{seed}", seed))
    while made.compiling:
        made.step()
    for _ in range(20):
        for output in made.step():
            history.note(output)
    capsule = make_capsule(
        reason="test",
        config=made.config,
        info=made.info,
        steps=recording.steps(),
        requests=history.entries(),
        stacks="",
        with_token_ids=True,
    )
    recording.close()
    again = Replay(capsule, lambda config: Engine(config, model=ToyModel(1024, VOCAB, EOS)))
    results = [again.run(record) for record in capsule.steps]
    assert sum(len(result.tokens) for result in results) > 30
    assert not any(result.differences for result in results)


# Schemas with a text that satisfies them and one that does not.
ENFORCED: list[tuple[Any, str, str]] = [
    ({"type": "object"}, '{"a": [1]}', "[1]"),
    ({}, "[null]", "nul"),
    ({"type": "array"}, '[1, "a"]', "{}"),
    ({"minimum": 3}, "4", "2"),
    ({"type": ["string", "null"], "minLength": 2}, "null", '"a"'),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"], "additionalProperties": True},
     '{"a": 1, "b": 2}', '{"a": 1}'),
    ({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}, '{"a": 1}', '{"a": 1, "b": 1}'),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"x": 1}', '{"x": "1"}'),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}, '{"xy": 1}', '{"y": 1}'),
    ({"type": "string", "pattern": "^ab"}, '"abc"', '"xab"'),
    ({"type": "string", "pattern": "b+$"}, '"aabb"', '"ba"'),
    ({"type": "string", "format": "date"}, '"2024-02-29"', '"today"'),
    ({"type": "string", "format": "our own", "maxLength": 3}, '"abc"', '"abcd"'),
    ({"type": "integer", "multipleOf": 5}, "35", "36"),
    ({"type": "string", "minLength": 1, "maxLength": 2}, '"é😀"', '"\t"'),
    ({"type": "number", "exclusiveMaximum": 1}, "0.5", "1.0"),
    ({"items": [{"type": "integer"}, {"type": "boolean"}], "additionalItems": {"type": "null"}}, "[1, true, null]", "[1, 2]"),
    ({"type": "array", "items": {"type": "array", "items": {"enum": ["a", "b"]}}, "minItems": 1}, '[["a", "b"]]', '[["c"]]'),
    ({"type": "integer", "enum": [1, "a"]}, "1", '"a"'),
    ({"const": {"a": [1]}}, '{"a":[1]}', '{"a":[2]}'),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}], "description": "either"}, "null", '"x"'),
    ({"allOf": [{"$ref": "#/$defs/n"}], "title": "n", "$defs": {"n": {"type": "integer"}}}, "3", '"x"'),
    ({"$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
                      "required": ["next"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
     '{"next": {"next": null}}', '{"next": {}}'),
]  # fmt: skip


def test_every_keyword_is_enforced() -> None:
    import xgrammar

    made = engine().grammars
    for schema, good, bad in ENFORCED:
        compiled = made.compile(schema_grammar(schema, 4).text).result()
        for text, is_good in ((good, True), (bad, False)):
            matcher = xgrammar.GrammarMatcher(compiled)
            assert (matcher.accept_string(text) and matcher.accept_token(EOS)) == is_good, (schema, text)


LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"}, {"type": "string"}]),
    st.builds(lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, *[st.integers(-120, 120)] * 2),
    st.builds(lambda a, b: {"type": "number", "exclusiveMinimum": a, "maximum": a + b}, *[st.integers(0, 9)] * 2).filter(
        lambda schema: schema["exclusiveMinimum"] < schema["maximum"]
    ),
    st.builds(lambda n: {"type": "integer", "multipleOf": n}, st.integers(1, 12)),
    st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, *[st.integers(0, 3)] * 2),
    st.sampled_from(["^a+b?$", "[0-9]", "^x", "\\.$", "^(ab|cd){2}$", "^[^a-z]*$"]).map(
        lambda p: {"type": "string", "pattern": p}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email", "unknown"]).map(
        lambda f: {"type": "string", "format": f}
    ),
    st.lists(st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=4), min_size=1, max_size=3).map(
        lambda v: {"enum": v}
    ),
    st.just({"type": ["integer", "null"], "minimum": 7}),
)
KEYS = st.sampled_from(["a", "b", 'q"', "é"])


def _object(properties: dict[str, Any], required: list[str], others: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [name for name in required if name in properties]}
    return schema if others is None else schema | {"additionalProperties": others}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda items, a, b: {"type": "array", "items": items, "minItems": a, "maxItems": a + b},
            inner,
            *[st.integers(0, 2)] * 2,
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda items: {"type": "array", "prefixItems": items, "items": False}),
        st.builds(
            _object, st.dictionaries(KEYS, inner, max_size=3), st.lists(KEYS, unique=True), st.none() | st.booleans() | inner
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}),
        inner.map(lambda part: {"type": "object", "additionalProperties": part, "maxProperties": 2}),
    ),
    max_leaves=6,
)


def walk(text: str, rng: random.Random) -> bytes | None:
    """A random output of a grammar, None if it does not end in time."""
    import xgrammar

    matcher, mask, made = xgrammar.GrammarMatcher(WALKER.compile(text).result()), xgrammar.allocate_token_bitmask(1, VOCAB), b""
    closing = {TOKENIZER.encode(char)[0] for char in '"]},'} | {EOS}
    for _ in range(400):
        matcher.fill_next_token_bitmask(mask, 0)
        allowed = ((mask[0][:, None] >> torch.arange(32)) & 1).flatten()[:VOCAB].nonzero()[:, 0].tolist()
        assert allowed, f"stuck behind {made!r}"
        ends = closing.intersection(allowed)
        token = rng.choice(sorted(ends) if ends and rng.random() < 0.5 else allowed)
        assert matcher.accept_token(token)
        if token == EOS:
            return made
        made += TOKENIZER.token_bytes(token)
    return None


WALKER = engine().grammars


@settings(deadline=None, max_examples=1000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 60)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_random_walks_satisfy_random_schemas(schema: Any, rng: random.Random) -> None:
    """An independent validator accepts whatever a grammar lets through."""
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    made = walk(schema_grammar(schema, 2).text, rng)
    if made is not None:
        text = made.decode(errors="replace")  # XGrammar lets byte tokens form overlong UTF-8; users see U+FFFD there
        value = json.loads(re.sub(r"\\u[dD][89a-fA-F]", r"\\u00", text))  # half characters are JSON, but not for the validator
        if "\ufffd" in text:
            return  # its lengths are not those that the grammar counted
        assert jsonschema_rs.is_valid(schema, value), (schema, value)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("special", [{}, {"<|tool|>": TOKENIZER.special_texts["<|tool|>"]}], ids=["text", "token"])
def test_forced_calls_are_read_as_calls(form: ToolFormat, special: dict[str, int]) -> None:
    """Whatever the grammar of a family lets through is calls with arguments of the schema, and nothing else."""
    if special:  # the family's marker is a special token
        (marker,) = special
        changed = {name: getattr(form, name).replace(form.begin, marker) for name in ("before", "opening", "closing")}
        form = dataclasses.replace(form, begin=form.begin if form.at_start else marker, **({} if form.at_start else changed))
    size = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}, "s": {"enum": ["a", "b c"]}},
    }
    size |= {"required": ["n", "s"], "additionalProperties": False}
    functions = [Function("first", size), Function("second.one", size, strict=True)]
    forced = grammar_of(forced_calls(form, functions, special, parallel=True)).text
    rng = random.Random(0)
    for _ in range(8):
        made = walk(forced, rng)
        if made is None:
            continue
        split = ToolSplit(form, functions)
        pieces = split.push(made.decode()) + split.finish()
        assert pieces
        assert all(piece.call >= 0 for piece in pieces), pieces
        names = [piece.name for piece in pieces if piece.name is not None]
        assert set(names) <= {"first", "second.one"}
        for call in range(split.num_calls):
            value = json.loads("".join(piece.text for piece in pieces if piece.call == call))
            assert list(value) == ["n", "s"]
            assert 1 <= value["n"] <= 99
            assert value["s"] in ("a", "b c")
    free = free_calls(form, functions, special, parallel=False)
    if free is not None:
        assert WALKER.compile(grammar_of(free).text).result()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "/uniqueItems"),
        ({"properties": {"a": {"not": {}}, "b": {"if": {}}}}, "/properties/a/not, /properties/b/if"),
        ({"allOf": [{"type": "object"}, {"type": "object"}]}, "/allOf of several"),
        ({"$ref": "#/$defs/a", "minimum": 1}, "/minimum beside $ref"),
        ({"$ref": "http://example.com/schema"}, "another document"),
        ({"type": "number", "multipleOf": 0.5}, "/multipleOf"),
        ({"type": "string", "pattern": "^(?!a)", "minLength": 2}, "look-around"),
        ({"type": "string", "format": "date", "maxLength": 20}, "/maxLength beside|/format beside"),
        ({"minimum": 1, "minLength": 2}, "several types"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "not in properties"),
        ({"type": "strange"}, "unknown type"),
        ({"enum": [1], "type": "string"}, "no value"),
        ({"const": {"a": [2**63]}}, "64 bits"),
        ({"type": "array", "items": 3}, "expected an object"),
        ({"required": "a"}, "list of names"),
        (3, "expected an object"),
    ],
)
def test_what_cannot_be_enforced_is_named(schema: Any, named: str) -> None:
    with pytest.raises(GrammarTextError) as caught:
        grammar.json_schema(schema)
    assert any(part in str(caught.value) for part in named.split("|"))


def test_endless_schemas_are_refused() -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(GrammarTextError, match="deep"):
        grammar.json_schema(deep)
    with pytest.raises(GrammarTextError, match="too long"):
        grammar.as_text(grammar.choice(["x" * 100] * 2000))
    with pytest.raises(GrammarTextError, match="valid text"):
        grammar.as_text(grammar.choice(["\ud800"]))


def test_xgrammar_waits_for_the_first_grammar() -> None:
    """Nothing imports it with a module: it brings transformers, which takes seconds."""
    root = Path(engine_module.__file__).parents[1]
    found = [
        file.name
        for file in root.rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "xgrammar" in ast.unparse(node)
    ]
    assert found == []


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("marker", ["<|tool|>", "</think>"])
def test_a_thought_of_any_text_may_stand_before_an_answer(marker: str, begun: bool) -> None:
    """Forced only once the closing marker, a special token or plain text, has been written."""
    import xgrammar

    closing = TOKENIZER.encode(marker, add_special_tokens=False)
    special = {marker: closing[0]} if marker in TOKENIZER.special_texts else {}
    form = grammar.after_thinking(grammar.choice(["yes"]), "<think>", marker, special, begun=begun)
    compiled = WALKER.compile(grammar_of(form).text).result()
    opening = [] if begun else TOKENIZER.encode("<think>")
    matcher = xgrammar.GrammarMatcher(compiled)
    for token in (*opening, *TOKENIZER.encode('so {"no" '), *closing, *TOKENIZER.encode("\n\nyes"), EOS):
        assert matcher.accept_token(token), token
    assert matcher.is_terminated()
    thinking = xgrammar.GrammarMatcher(compiled)
    for token in (*opening, *TOKENIZER.encode("yes")):
        assert thinking.accept_token(token)
    assert not thinking.accept_token(EOS), "a thought cannot end the output"
    if not begun:
        silent = xgrammar.GrammarMatcher(compiled)
        assert all(silent.accept_token(token) for token in (*TOKENIZER.encode("yes"), EOS)), "a thought is no duty"
