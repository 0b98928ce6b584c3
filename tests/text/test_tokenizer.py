# SPDX-License-Identifier: Apache-2.0
"""Loading, specials, and the bytes of single tokens against the library's own decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from rocm_infer.text.files import TextFileError
from rocm_infer.text.tokenizer import Tokenizer, TokenizerError
from tests.text.toys import CONFIG, byte_level, sentence_piece, write_folder

BYTES = Tokenizer(byte_level(), CONFIG)
PIECES = Tokenizer(sentence_piece(), CONFIG)


@given(st.text())
def test_token_bytes_spell_the_text(text: str) -> None:
    ids = BYTES.encode(text)
    assert b"".join(map(BYTES.token_bytes, ids)).decode() == text
    assert BYTES.decode(ids, skip_special_tokens=False) == text


@given(st.text(alphabet="abc é€😀"))
def test_pieces_spell_the_text(text: str) -> None:
    ids = PIECES.encode(text)
    spelled = b"".join(map(PIECES.token_bytes, ids)).decode()
    assert spelled.removeprefix(" ") == PIECES.decode(ids) == text


@given(st.lists(st.integers(0, BYTES.vocab_size - 1)))
def test_any_ids_spell_what_the_library_decodes(ids: list[int]) -> None:
    spelled = b"".join(map(BYTES.token_bytes, ids)).decode(errors="replace")
    assert spelled == BYTES.decode(ids, skip_special_tokens=False)


def test_specials_are_known(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_folder(tmp_path))
    assert tokenizer.token(tokenizer.bos_id or -1) == "<|bos|>"
    assert tokenizer.token(tokenizer.eos_id or -1) == "<|end|>"
    assert tokenizer.bos_id in tokenizer.special_ids
    assert tokenizer.encode("two words") == [tokenizer._backend.token_to_id("two words")]
    assert tokenizer._backend.token_to_id("two words") not in tokenizer.special_ids
    assert tokenizer.decode([tokenizer.bos_id or -1, *tokenizer.encode("hi")]) == "hi"


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("present", [True, False])
def test_the_checkpoint_decides_about_bos(wanted: bool | None, present: bool) -> None:
    backend = byte_level()
    bos = backend.token_to_id("<|bos|>")
    if present:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
        )
    tokenizer = Tokenizer(backend, CONFIG if wanted is None else CONFIG | {"add_bos_token": wanted})
    starts = tokenizer.encode("x")[0] == bos
    assert starts == (present if wanted is None else wanted)
    assert tokenizer.encode("x", add_special_tokens=False)[0] != bos


def test_an_id_outside_the_vocabulary_is_empty() -> None:
    assert BYTES.token_bytes(10**9) == b""


def test_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in .*--tokenizer"):
        Tokenizer.load(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TextFileError, match=r"tokenizer_config\.json.*object"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.load(folder)


def test_an_unknown_decoder_is_refused() -> None:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece is not supported"):
        Tokenizer(backend, CONFIG)
