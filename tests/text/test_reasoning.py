# SPDX-License-Identifier: Apache-2.0
"""Thinking and answer are told apart however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.text.reasoning import ReasoningSplit, begins_inside, count_thinking, thinks

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a b", "\n", " ", "</thin"]), max_size=8)


def split(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    parts = ReasoningSplit(inside=inside)
    found = [parts.push(piece) for piece in pieces] + [parts.finish()]
    return "".join(thought for thought, _ in found), "".join(answer for _, answer in found)


@pytest.mark.parametrize(
    ("text", "inside", "thought", "answer"),
    [
        ("<think>\nwhy not\n</think>\n\nYes.", False, "why not", "Yes."),
        ("why not\n</think>\n\nYes.", True, "why not", "Yes."),
        ("\n<think></think>Yes.", False, "", "Yes."),
        ("Yes.", False, "", "Yes."),
        ("  Yes <think>no</think>", False, "", "  Yes <think>no</think>"),
        ("<think>never ends", False, "never ends", ""),
        ("a </thin b</think>c", True, "a </thin b", "c"),
        ("a\n\nb</think>c</think>d", True, "a\n\nb", "c</think>d"),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
    ],
)
def test_by_example(text: str, inside: bool, thought: str, answer: str) -> None:
    assert split([text], inside=inside) == (thought, answer)
    assert split(list(text), inside=inside) == (thought, answer)


@given(PIECES, st.booleans())
def test_the_cut_does_not_matter(pieces: list[str], inside: bool) -> None:
    text = "".join(pieces)
    whole = split([text], inside=inside)
    for pieces_of_it in (pieces, list(text)):
        thought, answer = split(pieces_of_it, inside=inside)
        assert (thought.rstrip(), answer) == (whole[0].rstrip(), whole[1])


def test_which_models_think() -> None:
    assert thinks("{% if x %}<think>{% endif %}")
    assert not thinks("{{ messages }}")
    assert begins_inside("<|assistant|><think>\n")
    assert not begins_inside("<|assistant|><think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("pieces", "inside", "count"),
    [
        (["<thi", "nk>", "a", "b</th", "ink>", "c", "d"], False, 5),
        (["a", "</think>", "c"], True, 2),
        ([" ", "<think>", "a"], False, 3),
        (["a", "<think>"], False, 0),
        (["<", "b"], False, 0),
        ([], True, 0),
        (["<th"], False, 0),
    ],
)
def test_counting_the_tokens_of_thinking(pieces: list[str], inside: bool, count: int) -> None:
    assert count_thinking([piece.encode() for piece in pieces], inside=inside) == count
