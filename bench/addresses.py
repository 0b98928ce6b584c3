# SPDX-License-Identifier: Apache-2.0
"""Whether 32-bit products can overflow on their way into a pointer: intervals over Triton's IR, from declared maxima.

A cache of 200 GB holds more than 2^31 elements, so a page, slot, expert or row index times a stride needs 64 bits. Every
`arith.muli` of 32 bits whose product may leave 32 bits, and that an address depends on, is reported with its source line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LIMIT = 1 << 31
Range = tuple[int, int]
ANY: Range = (-LIMIT, LIMIT - 1)
NOTHING: Range = (0, 0)

# What may grow beyond the sizes of a launch, and how far: 2048 tokens of a step to 2^20, 64 sequences to 2^15.
HEADROOM = 512
GROWING = ("M", "T", "B", "num_slots", "num_blocks", "split_size")
# Rows of a matrix tile: `common.check_tile` refuses longer strides.
TILE_STRIDES = {"x_stride": 1 << 24, "weight_stride": 1 << 24, "a_stride": 1 << 24, "b_stride": 1 << 24, "w_stride": 1 << 24}
# Integers in memory that count tokens of a sequence or of a step. All others, pages and slots among them, may be anything.
TOKEN_COUNTS = {"kv_len_ptr": 1 << 22, "query_start_ptr": 1 << 22, "num_padded_ptr": 1 << 24}

_LOCATION = re.compile(r" loc\([^()]*(?:\([^()]*\)[^()]*)*\)")
_PLACE = re.compile(r'^(#loc\d*) = loc\((?:"[^"]*"\()?(?:"([^"]+)":(\d+):\d+|callsite\((#loc\d*) .*|(#loc\d*))')
# A reduction with a body of one operation, put on one line with the operation's name in front.
_REDUCTION = re.compile(r"""= "tt\.(?:reduce|scan)"\((%[\w$.#-]+)\).*\(\{\n.*\n.* = ([\w.]+) .*\n.*\n\s*\}\)( : .*)""")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_SAME = (
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "ttg.convert_layout",
    "arith.extsi",
    "arith.index_cast",
)


@dataclass
class _Values:
    """What is known of each SSA value: its range, the function argument a pointer points into, the products it depends on."""

    ranges: dict[str, Range] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    products: dict[str, frozenset[str]] = field(default_factory=dict)


def overflows(ttir: str, arguments: Mapping[str, Any], grid: tuple[int, int, int]) -> list[str]:
    """Source lines of 32-bit products that may overflow and feed a pointer. arguments, grid: those of one real launch."""
    lines = _REDUCTION.sub(lambda match: f"= reduce.{match[2]} {match[1]}{match[3]}", ttir).splitlines()
    values = _Values()
    found: dict[str, None] = {}
    for _ in range(2):  # the second time values that a loop carries are known
        loops: list[list[str]] = []
        for line in lines:
            _read(line, values, loops, arguments, grid, found)
    places = {match[1]: match for line in lines if (match := _PLACE.match(line))}
    return sorted({_where(place, places) for place in found})


def _where(place: str, places: Mapping[str, Any]) -> str:
    for _ in range(16):
        match = places.get(place)
        if match is None:
            break
        if match[2]:
            return f"{match[2].rsplit('/', 1)[-1]}:{match[3]}"
        place = match[4] or match[5]
    return place


def _read(
    line: str, values: _Values, loops: list[list[str]], arguments: Mapping[str, Any], grid: tuple[int, int, int],
    found: dict[str, None],
) -> None:  # fmt: skip
    location = re.search(r"loc\((#loc\d*)\)\s*$", line)
    text = _LOCATION.sub("", line).strip()
    if text.startswith("tt.func"):
        for name, kind in re.findall(r"%(\w+): (!tt\.ptr|i\d+|f\d+|bf16)", text):
            values.bases["%" + name] = name
            values.ranges["%" + name] = _argument(name, arguments.get(name)) if kind.startswith("i") else ANY
        return
    if text.startswith(("scf.yield", "scf.condition")):
        carried = loops[-1] if loops else []
        for target, source in zip(carried, _VALUE.findall(text.split(" : ")[0].replace("scf.condition", "", 1))):
            _join(values, target, source)
        return
    if text.startswith("}"):
        if loops and not text.startswith("} else"):
            loops.pop()
        return
    result, _, rest = text.partition(" = ") if text.startswith("%") else ("", "", text)
    name = rest.split(" ")[0].split("(")[0].strip('"')
    if name in ("scf.for", "scf.if", "scf.while") or text.endswith(("{", "({")):
        loops.append(_open(result, name, rest, values))
        return
    if not result:
        return
    operands = _VALUE.findall(rest.split(" : ")[0])
    if name == "tt.addptr":
        found.update(dict.fromkeys(values.products.get(operands[1], ())))
    key = result.split(":")[0]
    values.ranges[key] = _range(name, rest, operands, values, grid)
    values.bases[key] = next((values.bases[o] for o in operands if o in values.bases), "")
    if name != "tt.load" and not name.startswith("arith.cmp"):
        passed = operands[1:] if name == "arith.select" else operands
        values.products[key] = frozenset().union(*(values.products.get(o, frozenset()) for o in passed))
    low, high = values.ranges[key]
    if name == "arith.muli" and re.search(r"\bi32>?$|xi32>$", rest) and (low < -LIMIT or high >= LIMIT):
        place = location[1] if location else key
        values.products[key] = values.products[key] | {place}
        values.ranges[key] = ANY


def _argument(name: str, value: Any) -> Range:
    if name.endswith("_stride"):
        return 0, TILE_STRIDES.get(name, LIMIT - 1)
    if not isinstance(value, int):
        return ANY
    return (0, value * HEADROOM) if name in GROWING else (value, value)


def _join(values: _Values, target: str, source: str) -> None:
    values.products[target] = values.products.get(target, frozenset()) | values.products.get(source, frozenset())
    if values.bases.get(source):
        values.bases[target] = values.bases[source]
    if target in values.ranges and values.ranges[target] != ANY:
        (a, b), (c, d) = values.ranges[target], values.ranges.get(source, ANY)
        values.ranges[target] = min(a, c), max(b, d)


def _open(result: str, name: str, rest: str, values: _Values) -> list[str]:
    """The values that the block's yields give, in order; ranges of what a loop carries are not known."""
    base, _, count = result.partition(":")
    results = [f"{base}#{i}" for i in range(int(count))] if count else [base] if base else []
    head = rest.split(" : ")[0]
    if name == "scf.if":
        for target in results:
            values.ranges.setdefault(target, NOTHING)
        return results
    if name == "scf.for":
        induction, start, stop = _VALUE.findall(head)[:3]
        values.ranges[induction] = values.ranges.get(start, ANY)[0], values.ranges.get(stop, ANY)[1]
        values.products[induction] = values.products.get(start, frozenset())
    inner = []
    for target, source in re.findall(
        r"(%[\w$.-]+) = (%[\w$.#-]+)", head.partition("iter_args" if name == "scf.for" else "while")[2]
    ):
        inner.append(target)
        values.ranges[target] = ANY
        _join(values, target, source)
    for target in results:
        values.ranges[target] = ANY
    if inner and len(inner) == len(results):
        for target, source in zip(results, inner):
            _join(values, target, source)
    return inner


def _range(name: str, rest: str, operands: list[str], values: _Values, grid: tuple[int, int, int]) -> Range:
    ranges = [values.ranges.get(operand, ANY) for operand in operands]
    if name == "arith.constant":
        match = re.search(r"(?:constant|dense<)\s*(-?\d+|true|false)\b", rest)
        number = (
            0 if match is None else {"true": 1, "false": 0}.get(match[1]) if match[1] in ("true", "false") else int(match[1])
        )
        return (number or 0, number or 0) if match else ANY
    if name == "tt.make_range":
        bounds = {key: int(value) for key, value in re.findall(r"(start|end) = (\d+)", rest)}
        return bounds["start"], bounds["end"] - 1
    if name in ("tt.get_program_id", "tt.get_num_programs"):
        return 0, grid["xyz".index(rest.split(" ")[1])] * HEADROOM
    if name == "tt.load":
        return 0, TOKEN_COUNTS.get(values.bases.get(operands[0], ""), LIMIT) - 1
    if name.startswith("arith.cmp"):
        return 0, 1
    if name in _SAME and ranges:
        return ranges[0]
    if name == "arith.select":
        return min(ranges[1][0], ranges[2][0]), max(ranges[1][1], ranges[2][1])
    if name.startswith("reduce.") and ranges:
        size = math.prod(map(int, re.findall(r"(\d+)x", rest.partition("tensor<")[2].partition(">")[0])))
        low, high = ranges[0]
        return (min(low * size, low), max(high * size, high)) if name == "reduce.arith.addi" else ranges[0]
    if len(ranges) == 2:
        return _binary(name, *ranges)
    return ANY


def _binary(name: str, a: Range, b: Range) -> Range:
    if name == "arith.addi":
        return a[0] + b[0], a[1] + b[1]
    if name == "arith.subi":
        return a[0] - b[1], a[1] - b[0]
    if name == "arith.muli":
        corners = [x * y for x in a for y in b]
        return min(corners), max(corners)
    if name == "arith.minsi":
        return min(a[0], b[0]), min(a[1], b[1])
    if name == "arith.maxsi":
        return max(a[0], b[0]), max(a[1], b[1])
    if name in ("arith.divsi", "arith.remsi") and b[1] > 0:
        b = max(b[0], 1), b[1]  # what kernels divide by are counts
        if name == "arith.remsi":
            return (0 if a[0] >= 0 else 1 - b[1]), min(max(a[1], 0), b[1] - 1)
        corners = [int(x / y) for x in a for y in b]
        return min(corners), max(corners)
    if name == "arith.andi" and min(a[0], b[0]) >= 0:
        return 0, min(a[1], b[1])
    if name == "arith.shrsi" and b[0] >= 0:
        return min(a[0] >> b[0], a[0] >> b[1]), max(a[1] >> b[0], a[1] >> b[1])
    return ANY
