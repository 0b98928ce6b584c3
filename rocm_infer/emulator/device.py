# SPDX-License-Identifier: Apache-2.0
"""An emulated AMD device: kernels run over CPU tensors, checked and counted."""

from __future__ import annotations

import ctypes
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rocm_infer.emulator import decoder, loader
from rocm_infer.emulator.build import core

LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
_MAX_THREADS = 1024
_LARGEST_COPY = 1 << 30  # bytes of writable tensors up to which a launch is run twice
_KEPT_LAUNCHES = 100_000  # a server makes them without end
_POISONS = (0x7FC5A5A5, 0x5A3C3C5A)  # NaN as f32; every byte differs between the two


@dataclass(frozen=True)
class Checks:
    """Which checks a launch makes. Bounds, permissions and resource limits are always checked.

    races: two waves touch one LDS dword between barriers, one of them writing. undefined: a second run with other contents in
    fresh registers, LDS and scratch must give the same bits (not where writable tensors are larger than 1 GiB). lines: count unique 128-byte lines. bank_conflicts: count LDS bank
    conflicts. step_limit: instructions of one wave before the launch is called endless.
    """

    races: bool = True
    undefined: bool = True
    lines: bool = True
    bank_conflicts: bool = False
    step_limit: int = 1 << 40


FAST = Checks(races=False, undefined=False, lines=False)


@dataclass
class LaunchRecord:
    """Counters of one launch; see docs/emulator.md for their meaning."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    counters: dict[str, int]


@dataclass
class Watch:
    """Bookkeeping of `Device.watch`: which bytes of which storages kernels have written."""

    read_only: set[int]
    shadows: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)  # storages must not be reused while watched

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.shadows:
            self.shadows[storage.data_ptr()] = torch.from_numpy(np.zeros(storage.nbytes(), np.uint8))  # pages appear on use
            self.kept.append(tensor)
        return self.shadows[storage.data_ptr()]

    def check_written(self, tensor: torch.Tensor, name: str = "output") -> None:
        """Raises AssertionError if some element of tensor was not written by any watched launch."""
        if tensor.numel() == 0:
            return
        shadow = self.shadows.get(tensor.untyped_storage().data_ptr())
        if shadow is None:
            raise AssertionError(f"{name}: no kernel received it")
        n = tensor.element_size()
        strides = [s * n for s in tensor.stride()]
        view = shadow.as_strided([*tensor.shape, n], [*strides, 1], tensor.storage_offset() * n)
        missing = (view == 0).any(-1)
        if missing.any():
            first = missing.nonzero()[0].tolist()
            raise AssertionError(
                f"{name}: {int(missing.sum())} of {tensor.numel()} elements never written, the first at {first}"
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes from the first to the last element of a (possibly strided) tensor."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _merge(extents: list[tuple[int, int, str, bool, int]]) -> list[tuple[int, int, str, bool, int]]:
    """Sorted and disjoint: overlapping views become one region, writable if one of them is."""
    out: list[tuple[int, int, str, bool, int]] = []
    for base, size, name, writable, shadow in sorted(extents):
        if out and base < out[-1][0] + out[-1][1]:
            start, length, before, allowed, first_shadow = out[-1]
            first_shadow = first_shadow or (shadow and shadow - (base - start))
            joined = before if name in before.split("+") else f"{before}+{name}"
            out[-1] = (start, max(length, base + size - start), joined, allowed or writable, first_shadow)
        elif size:
            out.append((base, size, name, writable, shadow))
    return out


def pack(value: Any, size: int) -> bytes:
    """One kernel argument as bytes: tensors as pointers, None as a null pointer, bytes as they are."""
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", value.data_ptr())
    if value is None:
        return bytes(size)
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return struct.pack({4: "<f", 8: "<d", 2: "<e"}[size], value)
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


@dataclass
class LoadedKernel:
    """A kernel ready to run on a device."""

    device: Device
    kernel: loader.Kernel
    code: loader.CodeObject
    program: Any

    def launch(self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, lds: int = 0,
               tensors: Sequence[torch.Tensor] = (), names: Sequence[str] = ()) -> LaunchRecord:  # fmt: skip
        """Runs the kernel over grid workgroups of block work-items.

        arguments: tensors, ints, floats or raw bytes, in the kernel's order. lds: dynamic LDS in bytes. tensors: memory the kernel
        may reach beyond its tensor arguments (for callers that pass addresses as ints). names: of the arguments, for messages.
        Raises EmulationError.
        """
        return self.device.run(self, grid, block, arguments, lds=lds, tensors=tensors, names=names)


class Device:
    """An emulated GPU of one architecture.

    arch: gfx942 or gfx950. threads: host threads workgroups are spread over (default: torch's). trace: (workgroup, wave) whose
    instructions are recorded in `trace_lines`; break_at: only dump all registers of that wave before this instruction.
    """

    def __init__(self, arch: str, *, checks: Checks | None = None, threads: int | None = None,
                 trace: tuple[int, int] | None = None, break_at: int | None = None) -> None:  # fmt: skip
        if arch not in LDS_BYTES:
            raise ValueError(f"emulated architecture: expected one of {sorted(LDS_BYTES)}, got {arch!r}")
        self.arch = arch
        self.checks = checks or Checks()
        self.threads = threads or torch.get_num_threads()
        self.trace = trace
        self.break_at = break_at
        self.trace_lines: list[str] = []
        self.launches: deque[LaunchRecord] = deque(maxlen=_KEPT_LAUNCHES)
        self._watch: Watch | None = None

    def load(self, code_object: bytes, assembly: str, name: str) -> LoadedKernel:
        """A kernel of a code object; assembly: its text from the compiler or from llvm-objdump."""
        code = loader.load(code_object)
        if name not in code.kernels:
            raise loader.LoadError(f"no kernel {name} in the code object; it has {sorted(code.kernels)}")
        kernel = code.kernels[name]
        if kernel.arch != self.arch:
            raise loader.LoadError(f"{name}: compiled for {kernel.arch}, the device is {self.arch}")
        instructions = decoder.decode(assembly, name, symbols=code.symbols, preload=kernel.preload_length > 0)
        program = core().make_program(self.arch, name, instructions, kernel.num_vgprs, kernel.num_agprs)
        return LoadedKernel(self, kernel, code, program)

    @contextmanager
    def watch(self, read_only: Sequence[torch.Tensor] = ()) -> Iterator[Watch]:
        """Within, writing to a read_only tensor is an error, and `check_written` of the yielded Watch finds forgotten outputs."""
        previous, self._watch = self._watch, Watch({t.data_ptr() for t in read_only if t.numel()})
        try:
            yield self._watch
        finally:
            self._watch = previous

    def _regions(
        self, named: list[tuple[str, torch.Tensor]], raw: list[tuple[int, int, str]]
    ) -> list[tuple[int, int, str, bool, int]]:
        extents = []
        for name, tensor in named:
            base, size = _extent(tensor)
            shadow, writable = 0, True
            if self._watch is not None and size:
                writable = base not in self._watch.read_only
                if writable:
                    shadow = self._watch.shadow(tensor).data_ptr() + base - tensor.untyped_storage().data_ptr()
            extents.append((base, size, name, writable, shadow))
        return _merge(extents + [(base, size, name, False, 0) for base, size, name in raw])

    def run(self, loaded: LoadedKernel, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, lds: int,
            tensors: Sequence[torch.Tensor], names: Sequence[str]) -> LaunchRecord:  # fmt: skip
        kernel = loaded.kernel
        grid3, block3 = _three(grid), _three(block)
        threads = block3[0] * block3[1] * block3[2]
        if not 0 < threads <= min(_MAX_THREADS, kernel.max_threads):
            raise loader.LoadError(
                f"{kernel.name}: {threads} work-items per workgroup, at most {min(_MAX_THREADS, kernel.max_threads)}"
            )
        if kernel.lds_size + lds > LDS_BYTES[self.arch]:
            raise loader.LoadError(
                f"{kernel.name}: {kernel.lds_size + lds} bytes of LDS, {self.arch} has {LDS_BYTES[self.arch]}"
            )
        values = [pack(v, a.size) for v, a in zip(arguments, kernel.user_arguments)]
        if len(arguments) != len(values):
            raise loader.LoadError(f"{kernel.name}: expected {len(kernel.user_arguments)} arguments, got {len(arguments)}")
        block_bytes = loader.pack_arguments(kernel, values, grid3, block3, lds)
        kernarg = (ctypes.c_char * len(block_bytes)).from_buffer(block_bytes)
        address = ctypes.addressof(kernarg)
        packet = ctypes.create_string_buffer(loader.dispatch_packet(grid3, block3, lds, kernel.scratch_size, address), 64)
        sgprs, ids = loader.initial_sgprs(kernel, bytes(block_bytes), address, ctypes.addressof(packet))
        labels = [names[i] if i < len(names) else f"argument {i}" for i in range(len(arguments))]
        named = [(labels[i], v) for i, v in enumerate(arguments) if isinstance(v, torch.Tensor)]
        named += [(f"tensor {i}", t) for i, t in enumerate(tensors)]
        raw = [(address, len(block_bytes), "the kernel arguments"), (ctypes.addressof(packet), 64, "the dispatch packet")]
        raw += [(ctypes.addressof(b), len(b), name) for b, name in loaded.code.segments]
        options: dict[str, Any] = {
            "tensors": self._regions(named, raw), "grid": grid3, "block": block3, "lds_size": kernel.lds_size + lds,
            "scratch_size": kernel.scratch_size, "num_vgprs": kernel.num_vgprs + kernel.num_agprs,
            "accum_offset": kernel.accum_offset, "mode": 0xF0, "user_sgprs": sgprs, "group_id_sgprs": ids,
            "races": self.checks.races, "count_lines": self.checks.lines, "bank_conflicts": self.checks.bank_conflicts,
            "step_limit": self.checks.step_limit, "threads": self.threads, "poison": _POISONS[0],
            "trace": [] if self.trace is None else [*self.trace, -1 if self.break_at is None else self.break_at],
        }  # fmt: skip
        twice = self.checks.undefined and sum(r[1] for r in options["tensors"] if r[3]) <= _LARGEST_COPY
        counters = self._run_twice(kernel, loaded.program, options) if twice else core().launch(loaded.program, options)
        if traced := counters.pop("trace"):
            self.trace_lines += [f"{kernel.name}:", *traced]
        counters.pop("executed")
        record = LaunchRecord(kernel.name, grid3, block3, counters)
        self.launches.append(record)
        return record

    def _run_twice(self, kernel: loader.Kernel, program: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Two runs from the same memory with different contents of registers, LDS and scratch; their results must agree."""
        regions = [r for r in options["tensors"] if r[3]]
        views = [np.frombuffer((ctypes.c_char * size).from_address(base), dtype=np.uint8) for base, size, *_ in regions]
        before = [v.copy() for v in views]
        core().launch(program, options)
        first = [v.copy() for v in views]
        for view, old in zip(views, before):
            view[:] = old
        counters: dict[str, Any] = core().launch(program, {**options, "poison": _POISONS[1]})
        for view, other, region in zip(views, first, regions):
            if not np.array_equal(view, other):
                at = int((view != other).argmax())
                raise core().EmulationError(
                    f"{kernel.name}: undefined data: byte {at} of {region[2]} depends on what registers, LDS or scratch held before"
                )
        return counters


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z
