# SPDX-License-Identifier: Apache-2.0
"""The engine in process: prompt forms, results, stops, errors, streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rocm_infer import LLM, SamplingParams
from rocm_infer.config import ConfigError
from rocm_infer.hub import ModelNotFound
from rocm_infer.llm import GenerationError
from rocm_infer.text.files import TextFileError

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), device="cpu", max_total_tokens=4096, max_queued_requests=8)


def test_one_or_many_prompts(llm: LLM) -> None:
    one = llm.generate("the cat", GREEDY)
    ids = llm.tokenizer.encode("the cat")
    assert (one.prompt, one.prompt_token_ids, one.finish_reason) == ("the cat", ids, "length")
    assert len(one.token_ids) == 8
    assert one.text == llm.tokenizer.decode(one.token_ids)
    assert one.logprobs is None
    assert llm.generate(ids, GREEDY).token_ids == one.token_ids
    many = llm.generate(["the cat", ids, "a dog"], GREEDY)
    assert [result.token_ids for result in many[:2]] == [one.token_ids] * 2
    assert llm.generate([], GREEDY) == []


def test_more_prompts_than_the_queue_holds(llm: LLM) -> None:
    done: list[int] = []
    results = llm.generate([f"number {i}" for i in range(30)], GREEDY, on_result=done.append)
    assert sorted(done) == list(range(30))
    assert [result.prompt for result in results] == [f"number {i}" for i in range(30)]


def test_parameters_for_each_prompt(llm: LLM) -> None:
    results = llm.generate(["a", "b"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, n=3, seed=1)])
    assert [len(result.token_ids) for result in results] == [1, 2]
    assert [len(result.outputs) for result in results] == [1, 3]
    with pytest.raises(ValueError, match="one for each of 2"):
        llm.generate(["a", "b"], [GREEDY])


def test_seeds(llm: LLM) -> None:
    hot = SamplingParams(max_tokens=8, seed=5, n=2, ignore_eos=True)
    first = llm.generate("x", hot)
    assert [output.token_ids for output in llm.generate("x", hot).outputs] == [output.token_ids for output in first.outputs]
    assert first.outputs[0].token_ids != first.outputs[1].token_ids
    assert llm.generate("x", SamplingParams(max_tokens=8, seed=6, ignore_eos=True)).token_ids == first.outputs[1].token_ids


def test_stop_strings(llm: LLM) -> None:
    free = llm.generate("the cat", SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    stop = free.text[10:13]
    assert len(stop) == 3
    stopped = llm.generate("the cat", SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop,)))
    assert (stopped.finish_reason, stopped.outputs[0].matched_stop) == ("stop", stop)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert llm.generate("the cat", GREEDY).finish_reason == "length"
    assert llm.engine.stats()["num_running"] == 0


def test_logprobs(llm: LLM) -> None:
    result = llm.generate("abc", SamplingParams(max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=1, ignore_eos=True))
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert all(entry.logprob == entry.top[0][1] for entry in result.logprobs)
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == 3


def test_chat_and_stream(llm: LLM) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    answer = llm.chat(messages, GREEDY)
    assert answer.prompt == "<|bos|><|user|>hi<|end|><|assistant|>"
    assert "".join(llm.stream(llm.chat_prompt(messages), GREEDY)) == answer.text


def test_a_stream_left_early_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True, temperature=0.0))
    next(stream)
    stream.close()
    assert llm.generate("the cat", GREEDY).finish_reason == "length"
    assert llm.engine.stats()["num_running"] == llm.engine.stats()["num_waiting"] == 0


def test_the_checkpoints_defaults(llm: LLM) -> None:
    assert (llm.default_params.temperature, llm.default_params.top_k) == (0.5, 7)


def test_bad_input(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="512") as caught:
        llm.generate(["a", "x" * 600], GREEDY)
    assert caught.value.info.code == "context_length_exceeded"
    with pytest.raises(GenerationError, match="token ids"):
        llm.generate([10**6], GREEDY)
    with pytest.raises(GenerationError, match="at least one token"):
        llm.generate("", GREEDY)
    assert llm.generate("a", GREEDY).finish_reason == "length"
    with pytest.raises(ModelNotFound, match="no such directory"):
        LLM(str(tmp_path / "absent"))
    with pytest.raises(TextFileError, match=r"no tokenizer\.json"):
        LLM(str(tmp_path))
    with pytest.raises(ConfigError, match="page_size"):
        LLM(page_size=0)
