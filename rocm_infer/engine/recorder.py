# SPDX-License-Identifier: Apache-2.0
"""The flight recorder: the engine's last steps in a file that both processes map, so that they outlive the worker however it ends.

Layout, little-endian: a header of HEADER_SIZE bytes (time of the last sign of life, f64 seconds of the monotonic clock), then
NUM_SLOTS slots of SLOT_SIZE bytes. Step number i (from 1) lies in slot i % NUM_SLOTS: number u64, length of the composition
u32, length of the result u32, composition, result. A number or a length is written after what it vouches for and set to zero
before that changes, so a reader never takes a torn record for a whole one.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

import msgspec

from rocm_infer.engine.scheduler import Step

FILE_NAME = "steps"  # in the folder that client and worker share
HEADER_SIZE = 4096
NUM_SLOTS = 32
SLOT_SIZE = 1 << 16
FILE_SIZE = HEADER_SIZE + NUM_SLOTS * SLOT_SIZE
NUMBER, LENGTH, BEAT = struct.Struct("<Q"), struct.Struct("<I"), struct.Struct("<d")
COMPOSITION_LENGTH, RESULT_LENGTH, PAYLOAD = 8, 12, 16  # offsets in a slot
MAX_ENTRIES = 256  # parts of one step that are recorded; with ids of 170 characters they still fit a slot


class RequestPart(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one request: computed `num_tokens` tokens from position `start` on, and sampled a token or not.

    `arrival` counts the requests an engine accepted; the seed of a request that brings none is a function of it.
    """

    rid: str
    arrival: int
    start: int
    num_tokens: int
    samples: bool


class StepRecord(msgspec.Struct, frozen=True):
    """One step. The first `num_decodes` parts are decodes. `sampled` are the new tokens in the order of the parts that sample,
    -1 where the logits were not finite; None: the step did not end, or failed. `num_omitted` parts were too many to be recorded."""

    number: int
    num_decodes: int
    parts: list[RequestPart]
    num_omitted: int = 0
    sampled: list[int] | None = None


class _Composition(msgspec.Struct, array_like=True):
    num_decodes: int
    parts: list[RequestPart]
    num_omitted: int


_encode = msgspec.msgpack.Encoder().encode
_decode_composition = msgspec.msgpack.Decoder(_Composition).decode
_decode_sampled = msgspec.msgpack.Decoder(list[int]).decode


class Recorder:
    """The engine's side: `begin` before a step runs, `end` after it, `beat` whenever the engine is alive."""

    def __init__(self, path: Path) -> None:
        """Map the file that a `Recording` made. Raises OSError."""
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), FILE_SIZE)
        self._number = 0

    def beat(self) -> None:
        """Say that the engine is alive."""
        BEAT.pack_into(self._map, 0, time.monotonic())

    def begin(self, step: Step) -> None:
        """Record what is about to run."""
        self._number += 1
        slot = self._slot()
        NUMBER.pack_into(self._map, slot, 0)
        LENGTH.pack_into(self._map, slot + RESULT_LENGTH, 0)
        parts = _parts(step)
        kept = parts[:MAX_ENTRIES]
        data = _encode(_Composition(min(len(step.decodes), len(kept)), kept, len(parts) - len(kept)))
        if len(data) > SLOT_SIZE - PAYLOAD:  # ids of unusual length
            data = _encode(_Composition(0, [], len(parts)))
        LENGTH.pack_into(self._map, slot + COMPOSITION_LENGTH, len(data))
        self._map[slot + PAYLOAD : slot + PAYLOAD + len(data)] = data
        NUMBER.pack_into(self._map, slot, self._number)

    def end(self, sampled: list[int]) -> None:
        """Record the tokens of the step that `begin` announced."""
        slot = self._slot()
        (length,) = LENGTH.unpack_from(self._map, slot + COMPOSITION_LENGTH)
        data = _encode(sampled)
        start = slot + PAYLOAD + length
        if start + len(data) <= slot + SLOT_SIZE:
            self._map[start : start + len(data)] = data
            LENGTH.pack_into(self._map, slot + RESULT_LENGTH, len(data))

    def _slot(self) -> int:
        return HEADER_SIZE + self._number % NUM_SLOTS * SLOT_SIZE


class Recording:
    """The other side: reads what a `Recorder` wrote, while it lives or afterwards."""

    def __init__(self, path: Path) -> None:
        """Make the file and map it. Raises OSError."""
        with path.open("x+b") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_SIZE)  # now, or a full disk ends the worker with SIGBUS later
            self._map = mmap.mmap(file.fileno(), FILE_SIZE, access=mmap.ACCESS_READ)

    def last_beat(self) -> float:
        """Monotonic time of the last sign of life, 0 if there was none."""
        found: float = BEAT.unpack_from(self._map, 0)[0]
        return found

    def steps(self) -> list[StepRecord]:
        """The recorded steps, oldest first; those that were being written when the worker ended are left out."""
        found = [self._read(HEADER_SIZE + index * SLOT_SIZE) for index in range(NUM_SLOTS)]
        return sorted((step for step in found if step is not None), key=lambda step: step.number)

    def close(self) -> None:
        self._map.close()

    def _read(self, slot: int) -> StepRecord | None:
        (number,) = NUMBER.unpack_from(self._map, slot)
        if number == 0:
            return None
        (length,) = LENGTH.unpack_from(self._map, slot + COMPOSITION_LENGTH)
        (result,) = LENGTH.unpack_from(self._map, slot + RESULT_LENGTH)
        start = slot + PAYLOAD
        try:
            made = _decode_composition(self._map[start : start + length])
            sampled = _decode_sampled(self._map[start + length : start + length + result]) if result else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return StepRecord(number, made.num_decodes, made.parts, made.num_omitted, sampled)


def _parts(step: Step) -> list[RequestPart]:
    decodes = [RequestPart(r.rid, r.arrival, r.num_computed, 1, True) for r in step.decodes]
    return decodes + [RequestPart(r.rid, r.arrival, start, count, samples) for r, start, count, samples in step.chunks]
