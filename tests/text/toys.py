# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers and checkpoint folders made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CONFIG: dict[str, Any] = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>"}}


def byte_level(merges: tuple[tuple[str, str], ...] = (("t", "h"), ("th", "e"), ("Ġ", "a"))) -> tokenizers.Tokenizer:
    """Byte-level BPE: 256 bytes, a few merges, one plain added token, special tokens at the end."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    made = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(["two words"])
    made.add_special_tokens(list(SPECIALS))
    return made


def sentence_piece() -> tokenizers.Tokenizer:
    """Llama-2 style: U+2581 for spaces, byte fallback, a decoder that strips one leading space."""
    pieces = (
        ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [chr(c) for c in range(97, 123)] + ["▁a", "▁the", "é"]
    )
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(list(SPECIALS))
    return made


def write_folder(folder: Path, backend: tokenizers.Tokenizer | None = None, **config: Any) -> Path:
    """A checkpoint folder with tokenizer, tokenizer config and chat template, but no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (backend or byte_level()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": CHAT_TEMPLATE} | config))
    return folder
