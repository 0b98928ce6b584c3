# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer.json: text to ids, ids to text, and each token's own bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from rocm_infer.text.files import TextFileError, read_json

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(TextFileError):
    """The tokenizer is missing, broken, or of a kind that cannot be decoded incrementally."""


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


def _decoder_kind(decoder: dict[str, Any] | None) -> str:
    """'bytes' (byte-level BPE), 'pieces' (SentencePiece style: U+2581 and <0xNN>) or 'words' (joined by spaces)."""
    if decoder is None:
        return "words"
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        return "bytes"
    if kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        return "pieces"
    raise TokenizerError(
        f"tokenizer.json: decoder {' + '.join(sorted(kinds))} is not supported; "
        "expected ByteLevel, or Metaspace / Replace / ByteFallback / Fuse / Strip"
    )


def _special_text(value: object) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


class Tokenizer:
    """Encodes and decodes for one model. Thread-safe; the heavy calls release the interpreter lock.

    `special_tokens` maps bos_token, eos_token, ... to their text, for chat templates; `special_texts` the text of every special
    token to its id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self._backend = backend
        self._kind = _decoder_kind(json.loads(backend.to_str())["decoder"])
        self._alphabet = _byte_alphabet()
        self._bytes: dict[int, bytes] = {}
        self.config = config
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.special_texts = {self.token(token_id): token_id for token_id in self.special_ids}
        named = {name: _special_text(value) for name, value in config.items() if name.endswith("_token")}
        self.special_tokens = {name: text for name, text in named.items() if text is not None}
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self._bos_rule = self._find_bos_rule()

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """From a checkpoint directory. Raises TokenizerError with what to do."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"no tokenizer.json in {directory}: name a directory that has one with --tokenizer, or convert the "
                "checkpoint's tokenizer once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise TokenizerError(f"{path} is not a readable tokenizer ({error}); fetch the checkpoint again") from error
        named = {
            name: value
            for name, value in read_json(directory / "special_tokens_map.json").items()
            if isinstance(value, str | dict)
        }
        return cls(backend, named | read_json(directory / "tokenizer_config.json"))

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _find_bos_rule(self) -> str:
        """What `add_bos_token` asks for beyond tokenizer.json's own post-processor: 'add', 'drop' or ''."""
        wanted = self.config.get("add_bos_token")
        if self.bos_id is None or wanted is None:
            return ""
        present = self._backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]
        return "" if wanted == present else "add" if wanted else "drop"

    def vocabulary(self, size: int) -> list[bytes]:
        """The bytes of the tokens 0 to size - 1, empty for special ones and those that do not exist."""
        return [b"" if token_id in self.special_ids else self.token_bytes(token_id) for token_id in range(size)]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with special tokens the beginning-of-text token as the checkpoint asks for it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.bos_id is not None:
            if self._bos_rule == "add":
                return [self.bos_id, *ids]
            if self._bos_rule == "drop" and ids[:1] == [self.bos_id]:
                return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of complete ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; empty for an id outside the vocabulary."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text; empty for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(self.token(token_id))
        return known

    def _spell(self, token: str) -> bytes:
        if self._kind == "bytes":
            codes = [self._alphabet.get(char, -1) for char in token]
            return token.encode() if -1 in codes else bytes(codes)
        if self._kind == "words":
            return f" {token}".encode()
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
