# SPDX-License-Identifier: Apache-2.0
"""What is left of a worker that died: its last steps, the requests in them, its settings, and why it ended, in one JSON file.

Token ids, stop strings and logit biases are kept only when asked for; a length and a SHA-256 stand for the prompt otherwise.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from rocm_infer.config import EngineConfig, SamplingParams
from rocm_infer.engine.messages import AddRequest, RequestOutput
from rocm_infer.engine.recorder import StepRecord

CAPSULE_FORMAT = 1
NUM_ENDED = 64  # ended requests that are remembered
MAX_CAPSULES = 20  # in one folder; older ones are deleted
PACKAGES = ("rocm-infer", "torch", "triton", "numpy", "msgspec", "pyzmq")


class CapsuleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request in the recorded steps. `prompt_ids`, `output_ids` (those the client had received) and the parts of `params`
    that carry content are None or empty unless token ids were asked for."""

    rid: str
    num_prompt: int
    prompt_sha256: str
    num_output: int
    priority: int
    has_salt: bool
    params: SamplingParams
    has_ended: bool
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None


class Capsule(msgspec.Struct, frozen=True, kw_only=True):
    """`steps` oldest first; the last one did not end if the worker died in it. `stacks`: of the worker, where it could tell."""

    format: int
    reason: str
    time: str
    versions: dict[str, str]
    config: EngineConfig
    info: dict[str, Any]
    steps: list[StepRecord]
    requests: list[CapsuleRequest]
    stacks: str = ""

    @property
    def has_token_ids(self) -> bool:
        return all(request.prompt_ids is not None for request in self.requests)


class History:
    """The requests a capsule may need: those alive, and the last ones that ended, with the tokens they got."""

    def __init__(self) -> None:
        self._alive: dict[str, tuple[AddRequest, list[int]]] = {}
        self._ended: collections.deque[tuple[AddRequest, list[int]]] = collections.deque(maxlen=NUM_ENDED)

    def add(self, request: AddRequest) -> None:
        self._alive[request.rid] = request, []

    def note(self, output: RequestOutput) -> None:
        """Take down what a request got, and its end."""
        entry = self._alive.get(output.rid)
        if entry is not None:
            entry[1].extend(output.token_ids)
            if output.finish_reason is not None:
                self._ended.append(self._alive.pop(output.rid))

    def entries(self) -> list[tuple[AddRequest, list[int], bool]]:
        """Request, tokens, and whether it has ended."""
        return [(*entry, True) for entry in self._ended] + [(*entry, False) for entry in self._alive.values()]


class CapsuleError(ValueError):
    """A file is not a capsule we can read; the message says why."""


def default_folder(name: str = "capsules") -> Path:
    """$XDG_STATE_HOME/rocm_infer/NAME, or ~/.local/state/rocm_infer/NAME."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state else Path.home() / ".local" / "state") / "rocm_infer" / name


def make_capsule(
    *,
    reason: str,
    config: EngineConfig,
    info: Mapping[str, Any],
    steps: Sequence[StepRecord],
    requests: Iterable[tuple[AddRequest, Sequence[int], bool]],
    stacks: str,
    with_token_ids: bool,
) -> Capsule:
    """`requests`: each with the output tokens received so far and whether it had ended; those in no step are left out
    unless they were alive."""
    recorded = {part.rid for step in steps for part in step.parts}
    kept = [
        _describe(request, output_ids, has_ended, with_token_ids)
        for request, output_ids, has_ended in requests
        if not has_ended or request.rid in recorded
    ]
    return Capsule(
        format=CAPSULE_FORMAT,
        reason=reason,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=_versions(),
        config=config,
        info=dict(info),
        steps=list(steps) if with_token_ids else [_without_tokens(step) for step in steps],
        requests=kept,
        stacks=stacks,
    )


def write_capsule(capsule: Capsule, folder: Path) -> Path:
    """Write a capsule only its owner can read; returns its path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    old = sorted(folder.glob("capsule-*.json"), key=lambda path: path.stat().st_mtime)
    for path in old[: max(0, len(old) - MAX_CAPSULES + 1)]:
        with contextlib.suppress(OSError):
            path.unlink()
    path = folder / f"capsule-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}-{time.monotonic_ns()}.json"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(capsule), indent=1))
    return path


def read_capsule(path: Path) -> Capsule:
    """Raises OSError or CapsuleError."""
    try:
        capsule = msgspec.json.decode(path.read_bytes(), type=Capsule)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CapsuleError(f"{path} is not a capsule: {error}") from error
    if capsule.format != CAPSULE_FORMAT:
        raise CapsuleError(f"{path} has capsule format {capsule.format}; this version reads {CAPSULE_FORMAT}")
    return capsule


def _describe(request: AddRequest, output_ids: Sequence[int], has_ended: bool, with_token_ids: bool) -> CapsuleRequest:
    ids = array.array("q", request.prompt_ids)
    return CapsuleRequest(
        rid=request.rid,
        num_prompt=len(ids),
        prompt_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
        num_output=len(output_ids),
        priority=request.priority,
        has_salt=bool(request.salt),
        params=request.params
        if with_token_ids
        else dataclasses.replace(request.params, stop=(), stop_token_ids=(), logit_bias=(), grammar=None),
        has_ended=has_ended,
        prompt_ids=request.prompt_ids if with_token_ids else None,
        output_ids=list(output_ids) if with_token_ids else None,
    )


def _without_tokens(step: StepRecord) -> StepRecord:
    return msgspec.structs.replace(step, sampled=None if step.sampled is None else [])


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "system": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
