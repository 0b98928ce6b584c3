# SPDX-License-Identifier: Apache-2.0
"""Text that arrives in pieces equals text decoded at once, and a stop string never shows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.text.detokenize import StopMatcher, TextRules, TextStream
from rocm_infer.text.tokenizer import Tokenizer
from tests.text.toys import CONFIG, byte_level, sentence_piece

BYTES = Tokenizer(byte_level(), CONFIG)
PIECES = Tokenizer(sentence_piece(), CONFIG)
SHORT = st.text(alphabet="ab", min_size=1, max_size=5)


def cut(items: list, sizes: list[int]) -> list[list]:
    """The items in runs of the given sizes (repeated), nothing lost."""
    runs, start, turn = [], 0, 0
    while start < len(items):
        size = sizes[turn % len(sizes)]
        runs.append(items[start : start + size])
        start, turn = start + size, turn + 1
    return runs


def first_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """By definition: the shortest prefix of the text that ends with a stop string, and the longest such string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return None


@given(st.text(alphabet="ab", max_size=40), st.lists(SHORT, max_size=4), st.lists(st.integers(1, 4), min_size=1))
def test_stop_matching_follows_its_definition(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    expected = first_stop(text, stops)
    whole = text if expected is None else expected[0]
    for piece in cut(list(text), sizes):
        shown += matcher.push("".join(piece))
        assert whole.startswith(shown)
    assert matcher.matched == (None if expected is None else expected[1])
    assert shown + matcher.flush() == whole


@given(st.text(alphabet="ab", max_size=40), SHORT)
def test_only_what_could_become_a_stop_is_held_back(text: str, stop: str) -> None:
    matcher = StopMatcher([stop])
    shown = matcher.push(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[start:]) for start in range(len(shown)))


def test_include_keeps_the_stop_string() -> None:
    matcher = StopMatcher(["STOP"], include=True)
    assert matcher.push("go ST") + matcher.push("OP on") + matcher.push("x") + matcher.flush() == "go STOP"


@given(st.lists(st.integers(0, BYTES.vocab_size - 1)), st.lists(st.integers(1, 4), min_size=1), st.booleans())
def test_pieces_of_any_ids_add_up(ids: list[int], sizes: list[int], skip: bool) -> None:
    stream = TextStream(BYTES, TextRules(skip_special_tokens=skip))
    text = "".join(stream.push(run) for run in cut(ids, sizes)) + stream.finish()
    assert text == BYTES.decode(ids, skip_special_tokens=skip)
    assert stream.num_tokens == len(ids)


@given(st.text(alphabet="ab é€😀日本", min_size=1))
def test_no_half_character_is_shown(text: str) -> None:
    for tokenizer in (BYTES, PIECES):
        stream = TextStream(tokenizer, TextRules())
        shown = ""
        for token_id in tokenizer.encode(text):
            shown += stream.push([token_id])
            assert "\ufffd" not in shown
        assert shown.endswith(text)
        assert stream.finish() == ""


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    stream = TextStream(BYTES, TextRules())
    assert stream.push(BYTES.encode("€")[:2]) == ""
    assert stream.finish() == "\ufffd"


@given(st.text(alphabet="ab€", max_size=30), st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_across_tokens_never_shows(text: str, stops: list[str]) -> None:
    stream = TextStream(BYTES, TextRules(stop=tuple(stops)))
    ids = BYTES.encode(text)
    shown = ""
    for token_id in ids:
        shown += stream.push([token_id])
        assert not any(stop in shown for stop in stops)
    shown += stream.finish()
    expected = first_stop(text, stops)
    assert shown == (text if expected is None else expected[0])
    assert stream.matched == (None if expected is None else expected[1])


@given(st.text(alphabet="ab", min_size=1, max_size=30), SHORT, st.lists(st.integers(1, 6), min_size=1))
def test_the_token_count_ends_at_the_stop(text: str, stop: str, sizes: list[int]) -> None:
    one_by_one, in_runs = (TextStream(BYTES, TextRules(stop=(stop,))) for _ in range(2))
    ids = BYTES.encode(text)
    for token_id in ids:
        one_by_one.push([token_id])
    for run in cut(ids, sizes):
        in_runs.push(run)
    assert one_by_one.num_tokens == in_runs.num_tokens


def test_min_tokens_hides_early_stops() -> None:
    stream = TextStream(BYTES, TextRules(stop=("b",), min_tokens=3))
    assert stream.push(BYTES.encode("abab")) == "aba"
    assert stream.matched == "b"


def test_a_stop_token_shows_only_when_asked() -> None:
    (token_id,) = BYTES.encode("x")
    for include, tail in ((False, ""), (True, "x")):
        stream = TextStream(BYTES, TextRules(include_stop=include))
        assert stream.push(BYTES.encode("ab")) + stream.push_stop_token(token_id) + stream.finish() == "ab" + tail
        assert stream.num_tokens == 3
