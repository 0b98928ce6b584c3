# SPDX-License-Identifier: Apache-2.0
"""The small JSON files beside a checkpoint's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rocm_infer.config import ConfigError, SamplingParams

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class TextFileError(ValueError):
    """A file of the checkpoint's text side is missing or broken; the message says what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an absent file is an empty object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TextFileError(f"{path} is not readable JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise TextFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """Fields of SamplingParams that generation_config.json sets. Raises TextFileError when they are out of range."""
    found = read_json(directory / "generation_config.json")
    defaults = {name: found[name] for name in SAMPLING_DEFAULTS if found.get(name) is not None}
    if defaults.get("top_k") == -1:
        defaults["top_k"] = 0
    try:
        SamplingParams(**defaults)
    except (ConfigError, TypeError) as error:
        path = directory / "generation_config.json"
        raise TextFileError(f"{path}: {error}; `serve --generation-config none` ignores the file") from error
    return defaults
