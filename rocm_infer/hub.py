# SPDX-License-Identifier: Apache-2.0
"""From a model's name to a directory: the embedded model, a local directory, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from rocm_infer.config import EMBEDDED_MODEL

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt"]
REASONS = {
    "RepositoryNotFoundError": "the hub has no such model, or it is private (hf auth login)",
    "GatedRepoError": "its licence must be accepted on its page first, then run `hf auth login`",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and it is not in the local cache",
    "LocalEntryNotFoundError": "it is not in the local cache and the hub cannot be reached",
}


class ModelNotFound(OSError):
    """No directory for this name; the message says what to do."""


def resolve_model(name: str) -> Path:
    """The directory of a model, downloaded if need be (HF_HUB_OFFLINE and HF_HOME are respected). Raises ModelNotFound."""
    if name == EMBEDDED_MODEL:
        return _embedded()
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.exists() or name.startswith(("/", "./", "../", "~")) or not HUB_ID.fullmatch(name):
        raise ModelNotFound(
            f"model {name!r}: no such directory; name a checkpoint directory or a hub id such as Qwen/Qwen3-0.6B"
        )
    return _download(name)


def _embedded() -> Path:
    path = Path(__file__).parent / "assets" / EMBEDDED_MODEL
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"the embedded model {EMBEDDED_MODEL} is missing from this installation; install the package again")
    return path


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most models are local

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub client raises errors of several libraries
        kinds = [kind.__name__ for kind in type(error).__mro__]
        reason = next((REASONS[kind] for kind in kinds if kind in REASONS), f"{kinds[0]}: {str(error).splitlines()[0]}")
        raise ModelNotFound(
            f"model {name!r} is not a directory and cannot be fetched: {reason}. "
            "Check the spelling and the network, or name a local directory with --model"
        ) from error
