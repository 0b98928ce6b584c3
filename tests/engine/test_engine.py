# SPDX-License-Identifier: Apache-2.0
"""The engine's law: a request's result is the same alone, batched, chunked, preempted, prefix-cached. And its edges."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rocm_infer.config import ConfigError, EngineConfig, SamplingParams
from rocm_infer.engine.batch import Batch
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest, RequestOutput, TokenLogprob
from rocm_infer.engine.request import RequestRefused
from tests.engine.toy import EOS, FAIL_TOKEN, NAN_TOKEN, VOCAB, ToyModel, drain, request, run, tokens_of, toy_engine

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]

params = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 24),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 2**40),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.7]),
    logit_bias=st.sampled_from([(), (), ((3, 5.0), (4, -100.0))]),
    stop_token_ids=st.sampled_from([(), (7, 8, 9)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([None, None, 0, 2]),
)
prompts = st.one_of(
    st.lists(st.integers(2, 3), min_size=1, max_size=40),
    st.integers(1, 60).map(lambda length: (PROMPT * 6)[:length]),
)
engine_settings = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 4, 7, 16]),
        "max_total_tokens": st.sampled_from([96, 128, 1024]),
        "max_running_requests": st.sampled_from([1, 3, 16]),
        "chunked_prefill_size": st.sampled_from([1, 5, 16, 512]),
        "schedule_conservativeness": st.sampled_from([0.0, 0.0, 0.4, 1.0]),
        "disable_radix_cache": st.booleans(),
    }
)


@dataclasses.dataclass
class Result:
    """What a client got in the end."""

    tokens: list[int]
    finish: tuple[Any, ...]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None] | None


def result_of(outputs: list[RequestOutput]) -> Result:
    assert all(output.finish_reason is None for output in outputs[:-1]), "something came after the end"
    last = outputs[-1]
    scored = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert len(scored) <= 1
    return Result(
        tokens_of(outputs),
        (last.finish_reason, last.matched_stop, last.num_prompt, last.error),
        [each for output in outputs for each in output.logprobs or []],
        scored[0] if scored else None,
    )


def alone(each: AddRequest) -> Result:
    engine = toy_engine(page_size=512, disable_radix_cache=True, chunked_prefill_size=1024)
    return result_of(run(engine, each)[each.rid])


@hypothesis_settings(max_examples=2 * hypothesis_settings().max_examples)
@given(
    specs=st.lists(st.tuples(prompts, params, st.integers(0, 12)), min_size=1, max_size=7),
    settings=engine_settings,
    data=st.data(),
)
def test_result_does_not_depend_on_company(specs: list[Any], settings: dict[str, Any], data: st.DataObject) -> None:
    """Requests arrive at random steps, get cut, cached, preempted; some neighbours are aborted; results stay as alone."""
    requests = []
    for number, (prompt, chosen, _) in enumerate(specs):
        min_tokens = data.draw(st.integers(0, min(5, chosen.max_tokens)))
        requests.append(AddRequest(str(number), prompt, dataclasses.replace(chosen, min_tokens=min_tokens)))
    arrivals = [spec[2] for spec in specs]
    aborted = {each.rid: data.draw(st.integers(0, 20)) for each in requests[1:] if data.draw(st.integers(0, 3)) == 0}
    engine = toy_engine(**settings)
    outputs: dict[str, list[RequestOutput]] = {each.rid: [] for each in requests}
    for step in range(max(arrivals) + 1):
        for each, arrival in zip(requests, arrivals):
            if arrival == step:
                engine.add(each)
        for rid, when in aborted.items():
            if when == step:
                engine.abort(rid)
        for output in engine.step():
            outputs[output.rid].append(output)
        engine.scheduler.check()
    for rid, rest in drain(engine).items():
        outputs[rid] += rest
    assert engine.stats()["num_pages_used"] == 0
    assert not engine.sampler.tables.rows
    for each in requests:
        got, expected = result_of(outputs[each.rid]), alone(each)
        if got.finish[0] == "abort":
            assert each.rid in aborted
            assert got.tokens == expected.tokens[: len(got.tokens)]
            continue
        assert got.tokens == expected.tokens
        assert got.finish == expected.finish
        assert got.logprobs == expected.logprobs
        assert got.prompt_logprobs == expected.prompt_logprobs


def test_preempted_and_chunked_and_cached_really_happen() -> None:
    engine = toy_engine(max_total_tokens=64, schedule_conservativeness=0.0, chunked_prefill_size=7)
    run(engine, *[request(str(i), [2 + i] * 9, max_tokens=30, ignore_eos=True) for i in range(6)])
    assert engine.stats()["preemptions"] > 0
    engine = toy_engine()
    run(engine, *[request(str(i), PROMPT, max_tokens=4, ignore_eos=True) for i in range(3)])
    stats = engine.stats()
    assert stats["prompt_tokens"] == 30
    assert stats["cached_tokens"] == 16


def test_steps_are_counted_by_their_size_and_waiting_is_told_once() -> None:
    engine = toy_engine(chunked_prefill_size=9)
    outputs = run(engine, *[request(str(i), [2 + i] * 6, max_tokens=4, ignore_eos=True) for i in range(2)])
    stats = engine.stats()
    assert stats["step_tokens"] == 2 * (6 + 3)
    # 6 + 3 prompt tokens; the other 3 beside a decode; then decodes of two, and of the later one alone
    assert [stats[f"step_tokens_{bound}"] for bound in (1, 8, 16, 32, "inf")] == [1, 3, 1, 0, 0]
    for told in outputs.values():
        assert told[0].queue_seconds is not None
        assert 0 <= told[0].queue_seconds < 60
        assert all(output.queue_seconds is None for output in told[1:])


def test_generated_tokens_are_reused_by_the_next_turn() -> None:
    engine = toy_engine()
    first = run(engine, request("a", PROMPT, max_tokens=11, ignore_eos=True))["a"]
    longer = PROMPT + tokens_of(first) + [2, 3]
    second = run(engine, request("b", longer, max_tokens=3, ignore_eos=True))["b"]
    assert second[-1].num_cached == 20, "20 of the 21 tokens of the first turn were computed"
    assert tokens_of(second) == alone(request("b", longer, max_tokens=3, ignore_eos=True)).tokens


def test_unseeded_requests_differ_and_repeat_with_the_engine_seed() -> None:
    def texts(seed: int) -> list[list[int]]:
        engine = toy_engine(random_seed=seed)
        outputs = run(engine, *[request(str(i), PROMPT, temperature=1.0, max_tokens=12, ignore_eos=True) for i in range(2)])
        return [tokens_of(outputs[str(i)]) for i in range(2)]

    assert texts(1)[0] != texts(1)[1]
    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_finish_reasons() -> None:
    free = alone(request("free", PROMPT, max_tokens=30, ignore_eos=True)).tokens
    stop = free[4]
    position = free.index(stop)
    stopped = run(toy_engine(), request("s", PROMPT, max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))["s"]
    assert tokens_of(stopped) == free[: position + 1]
    assert (stopped[-1].finish_reason, stopped[-1].matched_stop) == ("stop", stop)
    biased = run(toy_engine(), request("e", PROMPT, max_tokens=30, logit_bias=((EOS, 100.0),)))["e"]
    assert tokens_of(biased) == [EOS]
    assert (biased[-1].finish_reason, biased[-1].matched_stop) == ("stop", EOS)
    waited = run(toy_engine(), request("m", PROMPT, max_tokens=30, min_tokens=6, logit_bias=((EOS, 100.0),)))["m"]
    assert len(tokens_of(waited)) == 7
    assert tokens_of(waited)[-1] == EOS
    limited = run(toy_engine(), request("l", PROMPT, max_tokens=3, ignore_eos=True))["l"]
    assert (tokens_of(limited), limited[-1].finish_reason) == (free[:3], "length")
    whole = run(toy_engine(max_len=24), request("c", PROMPT, ignore_eos=True))["c"]
    assert len(tokens_of(whole)) == 14
    assert whole[-1].finish_reason == "length"


@pytest.mark.parametrize("length", [1, 4, 5, 9])
def test_scoring_a_prompt_without_output(length: int) -> None:
    """What lm-eval's echo asks for; also twice, when the prompt is cached already."""
    engine = toy_engine(chunked_prefill_size=3)
    for rid in "ab":
        (output,) = run(engine, request(rid, PROMPT[:length], max_tokens=0, prompt_logprobs=2))[rid]
        assert (output.token_ids, output.finish_reason) == ([], "length")
        assert output.prompt_logprobs is not None
        assert [None if each is None else each.token_id for each in output.prompt_logprobs] == [None, *PROMPT[1:length]]
        for each in output.prompt_logprobs[1:]:
            assert each is not None
            assert each.logprob <= each.top[0][1] + 1e-6
            assert sum(math.exp(value) for _, value in each.top) <= 1 + 1e-5


def test_scores_survive_a_preemption_in_the_middle_of_the_prompt() -> None:
    engine = toy_engine(max_total_tokens=64, chunked_prefill_size=4, schedule_conservativeness=0.0)
    older = request("older", [4] * 8, max_tokens=40, ignore_eos=True)
    scored = request("scored", (PROMPT * 6)[:48], max_tokens=2, prompt_logprobs=1, ignore_eos=True)
    outputs = run(engine, older, scored)
    assert engine.stats()["preemptions"] > 0
    assert result_of(outputs["scored"]) == alone(scored)


def test_prompt_that_ends_with_a_stop_token_has_not_stopped() -> None:
    (output,) = run(toy_engine(), request("a", [5, EOS], max_tokens=0))["a"]
    assert (output.finish_reason, output.matched_stop) == ("length", None)


def test_logprobs_are_of_the_raw_distribution() -> None:
    model = ToyModel()
    outputs = run(toy_engine(), request("a", [5], max_tokens=1, logprobs=3, logit_bias=((4, 100.0),), ignore_eos=True))["a"]
    assert outputs[0].logprobs is not None
    (entry,) = outputs[0].logprobs
    cache = model.make_cache(1, 4, torch.float32)
    one = torch.tensor([1], dtype=torch.int32)
    batch = Batch(
        torch.tensor([5]),
        torch.tensor([0]),
        torch.tensor([0]),
        1,
        torch.tensor([0, 1]),
        one,
        one[None] * 0,
        torch.tensor([0]),
        [],
        [],
    )
    expected = model.logits(model.forward(batch, cache))[0].log_softmax(-1)
    assert entry.token_id == 4
    assert entry.logprob == pytest.approx(float(expected[4]), abs=1e-5)
    values, ids = expected.topk(3)
    assert [token for token, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("hazard", [NAN_TOKEN, FAIL_TOKEN])
def test_one_bad_request_does_not_harm_the_others(hazard: int) -> None:
    engine = toy_engine()
    good = [
        request(str(i), [*PROMPT, i + 2], max_tokens=9, logprobs=1, prompt_logprobs=1, presence_penalty=1.0) for i in range(3)
    ]
    outputs = run(engine, good[0], request("bad", [*PROMPT, hazard, 3], max_tokens=9), *good[1:])
    (last,) = outputs["bad"]
    assert last.finish_reason == "error"
    assert last.error is not None
    assert last.error.code == ("nan_logits" if hazard == NAN_TOKEN else "internal_error")
    assert "bad" in last.error.message
    assert "Traceback" not in last.error.message
    for each in good:
        assert result_of(outputs[each.rid]) == alone(each)
    assert engine.stats()["num_pages_used"] == 0


def test_pages_of_a_nan_request_are_not_reused() -> None:
    engine = toy_engine()
    run(engine, request("bad", [2] * 8 + [NAN_TOKEN] + [3] * 8, max_tokens=2))
    again = run(engine, request("again", [2] * 8 + [NAN_TOKEN] + [3] * 8, max_tokens=2))["again"]
    assert again[-1].num_cached == 0


def test_abort_in_every_state() -> None:
    engine = toy_engine(max_running_requests=2, chunked_prefill_size=4)
    for i in range(4):
        engine.add(request(str(i), [*PROMPT, i + 2], max_tokens=50, ignore_eos=True))
    for rid in "0123":
        engine.step()
        engine.abort(rid)
        engine.abort(rid)
        engine.scheduler.check()
    outputs = drain(engine)
    assert {rid: outputs[rid][-1].finish_reason for rid in outputs} == {"3": "abort"}
    assert engine.stats()["finished_abort"] == 4
    assert engine.stats()["num_pages_used"] == 0
    engine.abort("unknown")
    assert not engine.has_work


def test_flush_forgets_prefixes_that_nobody_uses() -> None:
    engine = toy_engine()
    run(engine, request("a", PROMPT, max_tokens=1))
    assert engine.flush() == 2
    again = run(engine, request("b", PROMPT, max_tokens=1))["b"]
    assert again[-1].num_cached == 0


@pytest.mark.parametrize(
    ("wrong", "code", "param", "text"),
    [
        (request("x", []), "invalid_value", "prompt", "at least one token"),
        (request("x", [3, VOCAB]), "invalid_value", "prompt", "0 to 60, got 61"),
        (request("x", [-1]), "invalid_value", "prompt", "got -1"),
        (request("x", [3], logit_bias=((VOCAB, 1.0),)), "invalid_value", "logit_bias", "got 61"),
        (request("x", [3], stop_token_ids=(-5,)), "invalid_value", "stop_token_ids", "got -5"),
        (request("x", [3], min_tokens=5, max_tokens=4), "invalid_value", "min_tokens", "at most max_tokens"),
        (request("x", [3] * 100, max_tokens=413), "context_length_exceeded", "max_tokens", "512 tokens.* 100 in .* 413"),
        (request("x", [3] * 513, max_tokens=0), "context_length_exceeded", "prompt", "512 tokens.* 513 in"),
        (request("x", [3] * 512), "context_length_exceeded", "prompt", "at least 1 more"),
    ],
)
def test_impossible_requests_are_refused(wrong: AddRequest, code: str, param: str, text: str) -> None:
    engine = toy_engine()
    with pytest.raises(RequestRefused, match=text) as refusal:
        engine.add(wrong)
    assert (refusal.value.info.code, refusal.value.info.param) == (code, param)
    assert not engine.has_work


def test_context_is_no_longer_than_the_cache() -> None:
    engine = toy_engine(max_total_tokens=64)
    assert engine.context_length == engine.info["context_length"] == 64
    run(engine, request("fits", [3] * 60, max_tokens=4))
    with pytest.raises(RequestRefused, match="holds 64 tokens"):
        engine.add(request("long", [3] * 60, max_tokens=5))


def test_context_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 512 .* got 513"):
        Engine(EngineConfig(model="toy", context_length=513, max_total_tokens=64, num_threads=1), model=ToyModel())


def test_queue_is_bounded() -> None:
    engine = toy_engine(max_queued_requests=2)
    for rid in "ab":
        engine.add(request(rid, PROMPT, max_tokens=1))
    with pytest.raises(RequestRefused) as refusal:
        engine.add(request("c", PROMPT, max_tokens=1))
    assert refusal.value.info.code == "queue_full"
    assert set(drain(engine)) == {"a", "b"}
