# SPDX-License-Identifier: Apache-2.0
"""AMD assembly text to instructions for the emulator's core.

Reads what compilers print (Triton's `asm["amdgcn"]`, clang's `-S` output) and what `llvm-objdump -d` prints. Every token must be
understood: an unknown operand or modifier is an error, never a guess. Syntax: LLVM's AMDGPU operand and modifier syntax.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

VECTOR, SCALAR, LITERAL, OFF = range(4)
Decoded = tuple[Any, ...]  # an operand or an instruction as the core takes it
_AGPR = 256

_NAMED_SCALARS = {
    "vcc": (106, 2), "vcc_lo": (106, 1), "vcc_hi": (107, 1), "exec": (126, 2), "exec_lo": (126, 1), "exec_hi": (127, 1),
    "m0": (124, 1), "flat_scratch": (102, 2), "flat_scratch_lo": (102, 1), "flat_scratch_hi": (103, 1), "xnack_mask": (104, 2),
    "src_scc": (255, 1), "scc": (255, 1),
}  # fmt: skip
_APERTURES = {"src_shared_base": 1 << 62, "src_private_base": 1 << 61}
_SELECTS = {"BYTE_0": 0, "BYTE_1": 1, "BYTE_2": 2, "BYTE_3": 3, "WORD_0": 4, "WORD_1": 5, "DWORD": 6}
_UNUSED = {"UNUSED_PAD": 0, "UNUSED_SEXT": 1, "UNUSED_PRESERVE": 2}
_FLAGS = {"offen", "lds", "clamp", "sc0", "sc1", "nt"}
_INTEGERS = {"offset", "offset0", "offset1", "cbsz", "blgp", "bitop3"}
_LISTS = {"op_sel", "op_sel_hi", "neg_lo", "neg_hi"}
_NO_OPERANDS = {"s_waitcnt", "s_nop", "s_sleep", "s_setprio", "s_endpgm", "s_barrier", "s_sched_barrier", "s_inst_prefetch"}
_ENCODINGS = re.compile(r"_(e32|e64|dpp|sdwa|e64_dpp)$")
_REGISTER = re.compile(r"([vsa])(?:(\d+)|\[(\d+)(?::(\d+))?\])$")
_MODIFIER = re.compile(r"([a-z_]\w*):(\[[^\]]*\]|\S+)$")
_DPP_CONTROL = re.compile(r"quad_perm:\[|row_(shl|shr|ror|bcast|newbcast):|row_(mirror|half_mirror)$|wave_(shl|shr|rol|ror):1$")


class DecodeError(RuntimeError):
    """A line of assembly that the emulator does not understand."""


class Symbol(NamedTuple):
    """One half of the address of a symbol in the code object (`name@rel32@lo+4`)."""

    name: str
    addend: int
    high: bool


class Line(NamedTuple):
    mnemonic: str
    text: str
    operands: list[Decoded]
    modifiers: dict[str, Any]
    label: str | None


def _literal_bits(text: str, double: bool) -> tuple[int, int, int, bool]:
    """The constant as 64, 32 and 16 bit operands see it, and whether it was written as a real number."""
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        whole = int(text, 0)
        wide = whole << 32 if double and "0x" in text else whole
        return wide & (1 << 64) - 1, whole & 0xFFFFFFFF, whole & 0xFFFF, False
    value = float(text)
    if text.lstrip("-").startswith("0.15915494"):  # 1 / (2 pi), the one inline constant that is not exact
        sign = text.startswith("-")
        return 0x3FC45F306DC9C882 | sign << 63, 0x3E22F983 | sign << 31, 0x3118 | sign << 15, True
    half = struct.unpack("<H", struct.pack("<e", value))[0] if abs(value) <= 65504 else 0
    return struct.unpack("<Q", struct.pack("<d", value))[0], struct.unpack("<I", struct.pack("<f", value))[0], half, True


def _hwreg(text: str) -> int:
    name, *rest = [part.strip() for part in text[text.index("(") + 1 : -1].split(",")]
    if name not in ("HW_REG_MODE", "1"):
        raise DecodeError(f"hardware register {name}")
    offset, size = (int(rest[0], 0), int(rest[1], 0)) if rest else (0, 32)
    return 1 | offset << 6 | (size - 1) << 11


def _operand(text: str, mnemonic: str) -> Decoded:
    """(kind, register, dwords, signs, literal bits): signs bit 0 negate, 1 absolute value, 2 sign-extend."""
    signs, inner = 0, text
    if inner.startswith("sext(") and inner.endswith(")"):
        signs, inner = 4, inner[5:-1]
    if inner.startswith("neg(") and inner.endswith(")"):
        signs, inner = signs | 1, inner[4:-1]
    if re.match(r"-[vsa|]", inner):
        signs, inner = signs | 1, inner[1:]
    if inner.startswith("|") and inner.endswith("|"):
        signs, inner = signs | 2, inner[1:-1]
    elif inner.startswith("abs(") and inner.endswith(")"):
        signs, inner = signs | 2, inner[4:-1]
    if match := _REGISTER.match(inner):
        bank, single, first, last = match.groups()
        start = int(single if single is not None else first)
        count = int(last) - start + 1 if last is not None else 1
        if bank == "s":
            return SCALAR, start, count, signs, None
        return VECTOR, start + (_AGPR if bank == "a" else 0), count, signs, None
    if inner in _NAMED_SCALARS:
        return SCALAR, *_NAMED_SCALARS[inner], signs, None
    if inner == "off":
        return OFF, 0, 0, 0, None
    if inner in _APERTURES:
        value = _APERTURES[inner]
        return LITERAL, 0, 2, 0, (value, value >> 32, 0, False)
    if inner.startswith("hwreg("):
        value = _hwreg(inner)
        return LITERAL, 0, 1, 0, (value, value, value, False)
    if match := re.fullmatch(r"([\w.$]+)@rel32@(lo|hi)\+(\d+)", inner):
        name, half, _ = match.groups()
        return LITERAL, 0, 1, 0, Symbol(name, 0, half == "hi")
    if signs and not re.fullmatch(r"-?[\d.x]+[\da-fA-F.]*", inner):
        raise DecodeError(f"operand {text!r}")
    try:
        return LITERAL, 0, 0, signs, _literal_bits(inner, "_f64" in mnemonic)
    except ValueError:
        raise DecodeError(f"operand {text!r}") from None


def _dpp_sources(control: str) -> list[int]:
    """The lane each lane reads, -1 where there is none. Rows have 16 lanes."""
    name, _, argument = control.partition(":")
    lanes = range(64)
    if name == "quad_perm":
        perm = [int(x) for x in argument.strip("[]").split(",")]
        return [lane // 4 * 4 + perm[lane % 4] for lane in lanes]
    if name == "row_mirror":
        return [lane ^ 15 for lane in lanes]
    if name == "row_half_mirror":
        return [lane ^ 7 for lane in lanes]
    n = int(argument)
    within: dict[str, Callable[[int], int]] = {
        "row_shl": lambda i: i + n if i + n < 16 else -1,
        "row_shr": lambda i: i - n,
        "row_ror": lambda i: (i - n) % 16,
        "row_newbcast": lambda i: n,
    }
    if name in within:
        return [lane // 16 * 16 + at if (at := within[name](lane % 16)) >= 0 else -1 for lane in lanes]
    if name == "row_bcast" and n == 15:  # lane 15 of the row before
        return [lane // 16 * 16 - 1 for lane in lanes]
    if name == "row_bcast" and n == 31:  # lane 31 to the upper half
        return [31 if lane >= 32 else -1 for lane in lanes]
    across: dict[str, Callable[[int], int]] = {"wave_shl": lambda i: i + 1 if i < 63 else -1, "wave_shr": lambda i: i - 1,
              "wave_rol": lambda i: (i + 1) % 64, "wave_ror": lambda i: (i - 1) % 64}  # fmt: skip
    return [across[name](lane) for lane in lanes]


def _dpp(control: str, row_mask: int, bank_mask: int, bound: bool) -> tuple[list[int], int, bool]:
    write = sum(1 << lane for lane in range(64) if row_mask >> lane // 16 & 1 and bank_mask >> lane // 4 % 4 & 1)
    return _dpp_sources(control), write, bound


def _swizzle(text: str) -> int:
    """The offset of ds_swizzle_b32, which LLVM prints by name: a choice within four lanes, or masks over the lane's number."""
    mode, _, argument = text.removeprefix("swizzle(").removesuffix(")").partition(",")
    if mode == "BITMASK_PERM":
        masks = [{"0": (0, 0, 0), "1": (0, 1, 0), "p": (1, 0, 0), "i": (1, 0, 1)}[bit] for bit in argument.strip('"')]
        keep, put, flip = (sum(mask[kind] << 4 - i for i, mask in enumerate(masks)) for kind in range(3))
        return keep | put << 5 | flip << 10
    numbers = [int(number) for number in argument.split(",")]
    if mode == "QUAD_PERM":
        return 0x8000 | sum(lane << 2 * i for i, lane in enumerate(numbers))
    if mode == "BROADCAST":
        return 32 - numbers[0] | numbers[1] << 5
    if mode in ("SWAP", "REVERSE"):
        return 31 | (numbers[0] - (mode == "REVERSE")) << 10
    raise DecodeError(f"swizzle {text!r}")


def _modifiers(tokens: list[str], mnemonic: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    control, masks, bound = None, {"row_mask": 15, "bank_mask": 15}, False
    for token in tokens:
        match = _MODIFIER.match(token)
        key, value = match.groups() if match else (token, "")
        if _DPP_CONTROL.match(token):
            control = token.replace(" ", "")
        elif token in _FLAGS:
            out[token] = True
        elif key in masks and match:
            masks[key] = int(value, 0)
        elif key == "bound_ctrl" and match:
            bound = True  # LLVM prints 0 or 1 for the same bit, by version
        elif key in ("mul", "div") and match:
            out["omod"] = float(value) if key == "mul" else 1 / float(value)
        elif key in _INTEGERS and match:
            out[key] = _swizzle(value) if value.startswith("swizzle(") else int(value, 0)
        elif key in _LISTS and match:
            out[key] = [int(x) for x in value.strip("[]").split(",")]
        elif key in ("src0_sel", "src1_sel", "dst_sel") and value in _SELECTS:
            out[key] = _SELECTS[value]
        elif key == "dst_unused" and value in _UNUSED:
            out[key] = _UNUSED[value]
        else:
            raise DecodeError(f"modifier {token!r}")
    if control is not None:
        out["dpp"] = _dpp(control, masks["row_mask"], masks["bank_mask"], bound)
    return out


def _split(text: str) -> tuple[list[str], list[str]]:
    """Operands (separated by commas) and modifiers (separated by blanks, after the last operand)."""
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)", lambda m: m.group().replace(",", ";").replace(" ", ""), text)
    parts = [p.strip().replace(";", ",") for p in text.split(",")]
    last, *tokens = parts[-1].split() if parts[-1] else [""]
    return [p for p in [*parts[:-1], last] if p], tokens


def parse_line(text: str) -> Line:
    """One instruction without label or comment."""
    head, _, rest = text.partition(" ")
    mnemonic = _ENCODINGS.sub("", head)
    if mnemonic in _NO_OPERANDS:
        return Line(mnemonic, text, [], {}, None)
    if mnemonic == "s_branch" or mnemonic.startswith("s_cbranch_"):
        return Line(mnemonic, text, [], {}, rest.strip())
    operands, tokens = _split(rest)
    if operands and (operands[0] in _FLAGS or _MODIFIER.match(operands[0])):  # no operands at all, such as buffer_wbl2 sc1
        tokens = [*operands, *tokens]
        operands = []
    return Line(mnemonic, text, [_operand(o, mnemonic) for o in operands], _modifiers(tokens, mnemonic), None)


def _strip(line: str) -> str:
    return re.sub(r"\s+", " ", re.split(r";|//", line, maxsplit=1)[0]).strip()


def _from_assembly(text: str, kernel: str) -> list[tuple[str, str]]:
    """(label or "", instruction or "") of the function named kernel in compiler output."""
    out: list[tuple[str, str]] = []
    inside = False
    for raw in text.splitlines():
        line = _strip(raw)
        if match := re.fullmatch(r'"?([\w.$]+)"?:', line):
            label = match.group(1)
            inside = label == kernel or (inside and not label.startswith(".Lfunc_end"))
            if inside:
                out.append((label, ""))
        elif inside and line.startswith(".p2align 8"):
            out.append(("", ".p2align"))
        elif inside and line and not line.startswith("."):
            out.append(("", line))
        elif inside and line.startswith((".section", ".size")):
            break
    return out


def _from_objdump(text: str, kernel: str) -> list[tuple[str, str]]:
    """The same from `llvm-objdump -d`: addresses serve as labels, branch targets stand in the comment."""
    out: list[tuple[str, str]] = []
    inside, start = False, 0
    for line in text.splitlines():
        if match := re.fullmatch(r"([0-9a-fA-F]+) <(.+)>:", line.strip()):
            inside = match.group(2) == kernel or (inside and match.group(2).startswith(("L", ".L")))
            start = int(match.group(1), 16) if match.group(2) == kernel else start
            continue
        match = re.match(r"\s+(\S.*?)\s*//\s*([0-9A-Fa-f]+):(.*)", line)
        if not inside or not match:
            continue
        body, address, comment = match.groups()
        if body.startswith(("s_branch", "s_cbranch")):
            target = re.search(r"<.+?\+0x([0-9a-fA-F]+)>|<([^>+]+)>", comment)
            if target is None:
                raise DecodeError(f"branch without a target: {line.strip()}")
            body = f"{body.split()[0]} @{start + int(target.group(1) or '0', 16):x}"
        out.append((f"@{int(address, 16):x}", ""))
        if (int(address, 16) - start) == 256:
            out.append(("", ".p2align"))
        out.append(("", _strip(body)))
    return out


def decode(text: str, kernel: str, *, symbols: dict[str, int] | None = None, preload: bool = False) -> list[Decoded]:
    """Instructions of one kernel, as `make_program` of the core takes them: (mnemonic, text, operands, modifiers, target).

    symbols: addresses of the code object's constants. preload: kernel arguments already sit in registers, so the prologue that
    loads them for old firmware is skipped. Raises DecodeError naming the line.
    """
    objdump = re.search(r"^[0-9a-fA-F]+ <.+>:$", text, re.MULTILINE) is not None
    items = (_from_objdump if objdump else _from_assembly)(text, kernel)
    if not items:
        raise DecodeError(f"no function named {kernel} in the assembly text")
    if preload and ("", ".p2align") in items:
        items = items[items.index(("", ".p2align")) :]
    labels: dict[str, int] = {}
    lines: list[Line] = []
    for label, body in items:
        if label:
            labels[label] = len(lines)
        elif body != ".p2align":
            try:
                lines.append(parse_line(body))
            except DecodeError as error:
                raise DecodeError(f"{kernel}: unknown {error} in: {body}") from None
    while lines and lines[-1].mnemonic in ("s_code_end", "s_nop"):
        lines.pop()
    return [_resolve(line, labels, symbols or {}, kernel) for line in lines]


def _resolve(line: Line, labels: dict[str, int], symbols: dict[str, int], kernel: str) -> Decoded:
    target = -1
    if line.label is not None:
        if line.label not in labels:
            raise DecodeError(f"{kernel}: unknown label in: {line.text}")
        target = labels[line.label]
    operands = []
    for kind, reg, count, signs, bits in line.operands:
        if isinstance(bits, Symbol):  # s_getpc_b64 gives 0 in the emulator, so the distance is the address itself
            if bits.name not in symbols:
                raise DecodeError(f"{kernel}: unknown symbol in: {line.text}")
            half = symbols[bits.name] >> 32 if bits.high else symbols[bits.name] & 0xFFFFFFFF
            bits = (half, half, half & 0xFFFF, False)
        operands.append((kind, reg, count, signs, bits))
    return line.mnemonic, line.text, operands, line.modifiers, target
