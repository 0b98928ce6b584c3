# SPDX-License-Identifier: Apache-2.0
"""AMD code objects: ELF, metadata note, kernel descriptor, kernel arguments, initial scalar registers.

Source: LLVM's "User Guide for AMDGPU Backend", code object V4 to V6.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

WAVE_SIZE = 64
_NOTE_METADATA = 32  # NT_AMDGPU_METADATA
_FLOAT_MODE = 0xF0  # round to nearest even, denormals on for all types


class LoadError(RuntimeError):
    """A code object that the emulator cannot run."""


@dataclass(frozen=True)
class Argument:
    """One kernel argument of the metadata; offset and size in bytes."""

    offset: int
    size: int
    kind: str
    name: str = ""


@dataclass(frozen=True)
class Kernel:
    """What the loader knows of one kernel."""

    name: str
    arch: str
    arguments: tuple[Argument, ...]
    kernarg_size: int
    lds_size: int
    scratch_size: int
    max_threads: int
    num_vgprs: int
    num_agprs: int
    accum_offset: int
    preload_length: int
    preload_offset: int
    rsrc1: int
    rsrc2: int
    properties: int

    @property
    def user_arguments(self) -> list[Argument]:
        return [a for a in self.arguments if not a.kind.startswith("hidden_")]


@dataclass
class CodeObject:
    """A loaded code object: kernels by name, constants in memory."""

    kernels: dict[str, Kernel]
    symbols: dict[str, int] = field(default_factory=dict)
    segments: list[tuple[ctypes.Array[Any], str]] = field(default_factory=list)


def _sections(data: bytes) -> list[dict[str, Any]]:
    if data[:4] != b"\x7fELF" or data[4] != 2:
        raise LoadError("code object: expected a 64-bit ELF file")
    offset, size, count, names = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HHH", data, 58)
    keys = ("name", "type", "flags", "address", "offset", "size", "link", "info", "align", "entry")
    table = [dict(zip(keys, struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size))) for i in range(count)]
    strings = table[names]["offset"]
    for section in table:
        start = strings + section["name"]
        section["name"] = data[start : data.index(b"\0", start)].decode()
    return table


def _metadata(data: bytes, sections: list[dict[str, Any]]) -> dict[str, Any]:
    for section in sections:
        if section["type"] != 7:  # SHT_NOTE
            continue
        at, end = section["offset"], section["offset"] + section["size"]
        while at < end:
            name_size, desc_size, kind = struct.unpack_from("<III", data, at)
            desc = at + 12 + (name_size + 3 & ~3)
            if kind == _NOTE_METADATA:
                return msgspec.msgpack.decode(data[desc : desc + desc_size], type=dict[str, Any])
            at = desc + (desc_size + 3 & ~3)
    raise LoadError("code object: no AMDGPU metadata note")


def _symbols(data: bytes, sections: list[dict[str, Any]]) -> dict[str, int]:
    out = {}
    for section in sections:
        if section["type"] not in (2, 11):  # SHT_SYMTAB, SHT_DYNSYM
            continue
        strings = sections[section["link"]]["offset"]
        for at in range(section["offset"], section["offset"] + section["size"], 24):
            name, _, _, index, value, _ = struct.unpack_from("<IBBHQQ", data, at)
            if name and index:
                start = strings + name
                out[data[start : data.index(b"\0", start)].decode()] = value
    return out


def _file_offset(sections: list[dict[str, Any]], address: int) -> int:
    for s in sections:
        if s["type"] != 8 and s["flags"] & 2 and s["address"] <= address < s["address"] + s["size"]:  # allocated, not .bss
            return int(s["offset"] + address - s["address"])
    raise LoadError(f"code object: address {address:#x} lies in no section")


def _kernel(entry: dict[str, Any], arch: str, descriptor: bytes) -> Kernel:
    lds, scratch, kernarg = struct.unpack_from("<III", descriptor, 0)
    rsrc3, rsrc1, rsrc2 = struct.unpack_from("<III", descriptor, 44)
    properties, preload = struct.unpack_from("<HH", descriptor, 56)
    total_vgprs = ((rsrc1 & 63) + 1) * 8
    accum_offset = ((rsrc3 & 63) + 1) * 4
    arguments = tuple(Argument(a[".offset"], a[".size"], a[".value_kind"], a.get(".name", "")) for a in entry.get(".args", []))
    if properties >> 10 & 1:
        raise LoadError(f"{entry['.name']}: wave size 32 does not exist on {arch}; compile for wave size 64")
    if (rsrc1 >> 12 & 0xFF) != _FLOAT_MODE:
        raise LoadError(
            f"{entry['.name']}: float mode {rsrc1 >> 12 & 0xFF:#x}; only round-to-nearest with denormals is emulated"
        )
    return Kernel(
        name=entry[".name"], arch=arch, arguments=arguments, kernarg_size=max(kernarg, entry[".kernarg_segment_size"]), lds_size=lds,
        scratch_size=scratch, max_threads=entry.get(".max_flat_workgroup_size", 1024), num_vgprs=min(accum_offset, total_vgprs),
        num_agprs=max(0, total_vgprs - accum_offset), accum_offset=accum_offset, preload_length=preload & 127,
        preload_offset=preload >> 7, rsrc1=rsrc1, rsrc2=rsrc2, properties=properties,
    )  # fmt: skip


def load(data: bytes) -> CodeObject:
    """Reads a code object and copies its constant sections to memory. Raises LoadError."""
    sections = _sections(data)
    metadata = _metadata(data, sections)
    arch = metadata["amdhsa.target"].rsplit("-", 1)[-1].split(":")[0]
    symbols = _symbols(data, sections)
    code = CodeObject({})
    for entry in metadata["amdhsa.kernels"]:
        at = _file_offset(sections, symbols[entry[".symbol"]])
        code.kernels[entry[".name"]] = _kernel(entry, arch, data[at : at + 64])
    for s in sections:
        if s["flags"] & 2 and not s["flags"] & 4 and s["name"].startswith((".rodata", ".data", ".bss")) and s["size"]:
            content = bytes(s["size"]) if s["type"] == 8 else data[s["offset"] : s["offset"] + s["size"]]
            buffer = ctypes.create_string_buffer(content, s["size"])
            base = ctypes.addressof(buffer)
            code.segments.append((buffer, f"constants {s['name']}"))
            code.symbols.update(
                {n: base + v - s["address"] for n, v in symbols.items() if s["address"] <= v < s["address"] + s["size"]}
            )
    return code


def pack_arguments(
    kernel: Kernel, values: Sequence[bytes], grid: Sequence[int], block: Sequence[int], lds_dynamic: int
) -> bytearray:
    """The kernel argument block: user arguments in order (little-endian bytes), then the hidden ones the metadata asks for."""
    user = kernel.user_arguments
    if len(values) != len(user):
        raise LoadError(f"{kernel.name}: expected {len(user)} arguments, got {len(values)}")
    out = bytearray(max(kernel.kernarg_size, 8))
    for argument, value in zip(user, values):
        if len(value) != argument.size:
            raise LoadError(
                f"{kernel.name}: argument at offset {argument.offset}: expected {argument.size} bytes, got {len(value)}"
            )
        out[argument.offset : argument.offset + argument.size] = value
    dims = {f"hidden_block_count_{d}": g for d, g in zip("xyz", grid)}
    dims |= {f"hidden_group_size_{d}": b for d, b in zip("xyz", block)}
    dims |= {f"hidden_remainder_{d}": 0 for d in "xyz"}
    dims |= {f"hidden_global_offset_{d}": 0 for d in "xyz"}
    dims |= {"hidden_grid_dims": 3, "hidden_dynamic_lds_size": lds_dynamic, "hidden_none": 0}
    for argument in kernel.arguments:
        if argument.kind.startswith("hidden_"):
            hidden = dims.get(argument.kind, 0)  # queues, hostcall buffers and the like: null, so that a use is out of bounds
            out[argument.offset : argument.offset + argument.size] = hidden.to_bytes(argument.size, "little")
    return out


def initial_sgprs(kernel: Kernel, kernarg: bytes, kernarg_address: int, dispatch_address: int) -> tuple[list[int], list[int]]:
    """User scalar registers, and the registers of the workgroup id in x, y, z (-1: not asked for)."""
    p = kernel.properties
    out: list[int] = []
    if p & 1:
        raise LoadError(f"{kernel.name}: asks for a private segment buffer, which {kernel.arch} does not have")
    for bit, value in ((1, dispatch_address), (2, 0), (3, kernarg_address), (4, 0), (5, 0)):
        if p >> bit & 1:
            out += [value & 0xFFFFFFFF, value >> 32]
    if p >> 6 & 1:
        out.append(kernel.scratch_size)
    start = 4 * kernel.preload_offset
    padded = kernarg + bytes(4 * kernel.preload_length + start)
    out += struct.unpack_from(f"<{kernel.preload_length}I", padded, start)
    count = kernel.rsrc2 >> 1 & 31
    if len(out) > count:
        raise LoadError(f"{kernel.name}: {len(out)} user registers needed, {count} allocated")
    out += [0] * (count - len(out))
    ids, at = [-1, -1, -1], count
    for axis in range(3):
        if kernel.rsrc2 >> 7 + axis & 1:
            ids[axis] = at
            at += 1
    return out, ids


def dispatch_packet(grid: Sequence[int], block: Sequence[int], lds: int, scratch: int, kernarg_address: int) -> bytes:
    """The 64-byte AQL packet a kernel may read its sizes from."""
    threads = [g * b for g, b in zip(grid, block)]
    return struct.pack("<HHHHHHIIIIIQQQQ", 2, 3, *block, 0, *threads, scratch, lds, 0, kernarg_address, 0, 0)
