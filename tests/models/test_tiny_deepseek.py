# SPDX-License-Identifier: Apache-2.0
"""The embedded model: what its folder holds, that transformers reads it as we do, and that it still knows its answers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import tasks
from training.tiny_deepseek import ASSET_DIR, SPECIAL_TOKENS, TinyDeepseek, encode, greedy, load_exported

transformers = pytest.importorskip("transformers")
SIZE_LIMIT = 8 * 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def _eager() -> Iterator[None]:
    """The training implementation without a compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def ours() -> TinyDeepseek:
    return load_exported(ASSET_DIR, torch.float32).eval()


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(ASSET_DIR, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    last = f"model.layers.{model.config.num_hidden_layers}."
    assert all(name.startswith(last) for name in report["unexpected_keys"])  # the MTP layer
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(ASSET_DIR)


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in ASSET_DIR.iterdir()) <= SIZE_LIMIT


def test_sizes_fit_kernel_tiles() -> None:
    config = json.loads((ASSET_DIR / "config.json").read_text())
    for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank"):
        assert config[name] % 128 == 0, name
    for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert config[name] % 16 == 0, name


@pytest.mark.parametrize("length", [30, 300, 1500])
def test_logits_agree_with_transformers(ours: TinyDeepseek, theirs: torch.nn.Module, length: int) -> None:
    exercise = tasks.held_out_exercises("recall", 1, recall_tokens=(length, length))[0]
    ids = torch.tensor([encode(exercise)[0]])
    with torch.no_grad():
        expected = theirs(ids).logits
        got = ours.lm_head(ours(ids))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@given(st.text(max_size=50))
def test_any_text_survives_the_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> None:
    if any(token in text for token in SPECIAL_TOKENS):
        return
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_chat_template_is_what_training_saw(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    exercise = tasks.Exercise("sum", "1 + 1 =", "2", (("And é?", "3"),))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And é?"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert [*ids, *b"3", tokenizer.eos_token_id] == encode(exercise, "Be brief.")[0]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_held_out_exercises_are_answered(ours: TinyDeepseek, task: str) -> None:
    exercises = tasks.held_out_exercises(task, 12, seed=1, recall_tokens=(30, 400))
    answers = greedy(ours, [e.prompt for e in exercises], tasks.LONGEST_ANSWER)
    assert sum(a == e.answer for a, e in zip(answers, exercises)) >= 11


@given(st.integers(0, 2**32))
def test_training_never_sees_a_held_out_problem(seed: int) -> None:
    rng = random.Random(seed)
    word = tasks.make_reverse(rng, False).answer[::-1]
    assert not tasks.is_held_out(f"word {word}")
    assert tasks.is_held_out(f"word {tasks.make_reverse(rng, True).answer[::-1]}")


@given(st.integers(0, 2**32), st.booleans())
def test_answers_are_right(seed: int, held_out: bool) -> None:
    """Each exercise's answer, recomputed from the words of its prompt."""
    rng = random.Random(seed)
    for make in (tasks.make_sum, tasks.make_difference):
        exercise = make(rng, held_out)
        a, b = (int(n) for n in "".join(c if c.isdigit() else " " for c in exercise.prompt).split())
        assert int(exercise.answer) == (a + b if exercise.task == "sum" else abs(a - b))
    recall = tasks.make_recall(rng, held_out, 20, 2)
    for prompt, answer in ((recall.prompt, recall.answer), *recall.follow_ups):
        key = re.findall(r"\b[a-z]{3}\b", prompt)[-1]
        assert f"{key}={answer}" in recall.prompt
    count = tasks.make_count(rng, held_out)
    word, total = re.sub(r"[\d ]", "", count.answer.split(":")[0]), int(count.answer.split(": ")[1])
    asked = set(re.findall(r"\b[a-z]\b", count.prompt.replace("'s", " ").replace(word, "")))
    assert word in count.prompt
    assert total == (sum(c in asked for c in word) if asked else len(word))
