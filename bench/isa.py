# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels need of the chip, on a machine without one: registers, LDS, scratch, occupancy, matrix instructions.

python -m bench.isa [--op mla_decode] [--arch gfx942]      compile every kernel for every call of bench.shapes, print the figures
python -m bench.isa --check                                fail on scratch, spills or LDS beyond the arch's, on less than recorded,
                                                           and on 32-bit address products (bench.addresses)
python -m bench.isa --update                               record the figures in bench/isa/
python -m bench.isa --update --folder OTHER                record them elsewhere, say with another version of Triton ...
python -m bench.isa --diff bench/isa OTHER                 ... and tell what changed

Figures are of the compiler's text, not of a run: counts are of instructions, not of how often they are executed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from bench.addresses import overflows
from bench.shapes import Variant, variants
from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._compile import Launch, compiling

AMD = tuple(name for name, arch in archs.ARCHS.items() if arch.vendor == "amd")
STRICT = ("gfx942", "gfx950")  # no scratch and no spills here
FOLDER = Path(__file__).parent / "isa"
HIP_FIGURES = Path(__file__).parent.parent / "csrc" / "hip" / "resources.json"
Figures = dict[str, Any]

_METADATA = {
    "vgpr": r"\.vgpr_count:\s+(\d+)",  # AGPRs included where the file is one
    "agpr": r"\.agpr_count:\s+(\d+)",
    "sgpr": r"\.sgpr_count:\s+(\d+)",
    "scratch_bytes": r"\.private_segment_fixed_size:\s+(\d+)",
    "vgpr_spills": r"\.vgpr_spill_count:\s+(\d+)",
    "sgpr_spills": r"\.sgpr_spill_count:\s+(\d+)",
    "code_bytes": r"codeLenInByte = (\d+)",
}
_MATRIX = re.compile(r"^\s+v_((?:mfma|smfmac|wmma|swmmac)_\w+)", re.MULTILINE)
_MEMORY = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", re.MULTILINE)
_WIDTHS = (
    (16, r"dwordx4|b128"),
    (12, r"dwordx3|b96"),
    (8, r"dwordx2|b64"),
    (4, r"dword|b32"),
    (2, r"u?short|sshort|[iu]16|b16"),
    (1, r"[us]?byte|[iu]8|b8"),
)  # fmt: skip


@dataclass(frozen=True)
class Core:
    """Where waves live. Registers are per lane of a SIMD.

    Sources: CDNA3, CDNA4, RDNA3, RDNA4 instruction set documents; the AMDGPU back end of LLVM. LDS counts for the SIMDs that
    share it: a compute unit of CDNA, a work-group processor of RDNA.
    """

    vgprs: int
    vgpr_granule: int
    waves: int  # per SIMD at most
    lds_bytes: int
    lds_granule: int
    num_simds: int = 4
    workgroups: int = 16  # of more than one wave, per num_simds SIMDs


CORES = {
    "gfx90a": Core(512, 8, 8, 64 << 10, 512),
    "gfx942": Core(512, 8, 8, 64 << 10, 512),
    "gfx950": Core(512, 8, 8, 160 << 10, 1280),
    "gfx1100": Core(1536, 24, 16, 128 << 10, 512, workgroups=32),
    "gfx1201": Core(1536, 24, 16, 128 << 10, 512, workgroups=32),
}


def occupancy(arch: str, vgpr: int, sgpr: int, lds_bytes: int, num_waves: int) -> float:
    """Waves per SIMD: the least of what vector registers, scalar registers, LDS and the limit on workgroups leave room for.

    A workgroup of num_waves waves is resident as a whole or not at all, its waves spread over the SIMDs.
    """
    core = CORES[arch]
    waves = min(core.waves, core.vgprs // _round_up(max(vgpr, 1), core.vgpr_granule))
    if arch.startswith("gfx9") and sgpr > 100:
        waves = min(waves, 7)
    workgroups = waves * core.num_simds // num_waves
    if lds_bytes:
        workgroups = min(workgroups, core.lds_bytes // _round_up(lds_bytes, core.lds_granule))
    if num_waves > 1:
        workgroups = min(workgroups, core.workgroups)
    return workgroups * num_waves / core.num_simds


def _round_up(x: int, granule: int) -> int:
    return -(-x // granule) * granule


def figures(arch: str, assembly: str, lds_bytes: int, num_waves: int) -> Figures:
    """Figures of one kernel from its assembly text."""
    found: Figures = {name: int(match[1]) if (match := re.search(p, assembly)) else 0 for name, p in _METADATA.items()}
    found["lds_bytes"], found["num_waves"] = lds_bytes, num_waves
    found["occupancy"] = occupancy(arch, found["vgpr"], found["sgpr"], lds_bytes, num_waves)
    kinds = _MATRIX.findall(assembly)
    found["matrix"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    moved: dict[str, dict[int, int]] = {"load": {}, "store": {}}
    for direction, suffix in _MEMORY.findall(assembly):
        width = next((width for width, pattern in _WIDTHS if re.search(rf"(?:^|_)(?:{pattern})(?:_|$)", suffix)), 0)
        moved[direction][width] = moved[direction].get(width, 0) + width
    for direction, widths in moved.items():
        found[f"wide_{direction}s"] = round(widths.get(16, 0) / max(sum(widths.values()), 1), 2)
    return found


def launch(variant: Variant, arch: Arch) -> None:
    """Launch one call under `compiling`: the op's own checks, scratch and tiles, on tensors without data."""
    variant.contract().using("triton")(**variant.arguments(arch, device="meta"))


@dataclass
class Case:
    """One kernel to be compiled, and the calls that launch it, by name; the first one stands for all."""

    arch: str
    kernel: str
    variant: Variant
    names: list[str]


def cases(arch: str, chosen: Iterable[Variant]) -> list[Case]:
    """Every kernel that these calls would compile, once: those that differ in no constant are one."""
    found: dict[tuple[str, str], Case] = {}

    def refuse(*, fn: Any, compile: Mapping[str, Any], **_rest: Any) -> bool:
        kernel = fn.name.rsplit(".", 1)[-1]
        case = found.setdefault((kernel, str(compile["key"])), Case(arch, kernel, variant, []))
        case.names.append(f"{variant.op} {variant.name}")
        return True  # nothing is compiled

    with compiling(archs.of(arch)), compile_hook(refuse):
        for variant in chosen:
            launch(variant, archs.of(arch))
    return list(found.values())


@contextmanager
def compile_hook(function: Callable[..., bool]) -> Iterator[None]:
    """Within, Triton asks `function` before it compiles, and does not if that returns True."""
    triton.knobs.runtime.jit_cache_hook = function
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = None


@dataclass(frozen=True)
class Compiled:
    """figures: empty if it did not compile. addresses: source lines of 32-bit products that feed a pointer."""

    case: Case
    figures: Figures
    addresses: list[str]
    error: str = ""


def compile_case(case: Case) -> Compiled:
    """Figures of one kernel; from Triton's cache where it has been compiled before."""
    arch = archs.of(case.arch)
    try:
        with compiling(arch) as launches, compile_hook(lambda *, fn, **_rest: fn.name.rsplit(".", 1)[-1] != case.kernel):
            launch(case.variant, arch)
            mine = next(found for found in launches if found.kernel == case.kernel)
            return Compiled(case, read(case.arch, mine), overflows(mine.files[".ttir"].read_text(), mine.arguments, mine.grid))
    except Exception as error:  # the compiler's own: one kernel that fails must not hide the others
        return Compiled(case, {}, [], f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


def read(arch: str, found: Launch) -> Figures:
    return figures(arch, found.files[".amdgcn"].read_text(), found.lds, found.num_warps)


def compile_all(todo: Sequence[Case], processes: int) -> Iterator[Compiled]:
    """Results as they come, those of one architecture and kernel from one process."""
    if processes < 2 or len(todo) < 2:
        yield from map(compile_case, todo)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(compile_case, todo, chunksize=2)


def recorded(folder: Path, arch: str) -> dict[str, Any]:
    """{"triton": version, "kernels": {kernel: {call: figures}}}; empty if nobody recorded this architecture."""
    path = folder / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {"triton": "", "kernels": {}}


def record(folder: Path, arch: str, results: Iterable[Compiled], ops: Sequence[str]) -> None:
    """Write the figures of an architecture, one line per kernel compiled. With `ops`, those of calls of other ops stay."""
    kernels: dict[str, dict[str, Figures]] = {}
    for kernel, calls in recorded(folder, arch)["kernels"].items() if ops else ():
        kernels[kernel] = {name: found for name, found in calls.items() if name.split(" ")[0] not in ops}
    for result in results:
        kernels.setdefault(result.case.kernel, {})[result.case.names[0]] = result.figures
    rows = []
    for kernel, calls in sorted((kernel, calls) for kernel, calls in kernels.items() if calls):
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(calls.items()))
        rows.append(f"  {json.dumps(kernel)}: {{\n{lines}\n  }}")
    folder.mkdir(parents=True, exist_ok=True)
    text = f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n' + ",\n".join(rows) + "\n }\n}\n"
    (folder / f"{arch}.json").write_text(text)


def faults(arch: str, found: Figures) -> list[str]:
    """What no kernel may need, whatever was recorded."""
    told = []
    if arch in STRICT:
        told += [
            f"{name} {found[name]}, expected 0" for name in ("scratch_bytes", "vgpr_spills", "sgpr_spills") if found.get(name)
        ]
    if found["lds_bytes"] > archs.of(arch).lds_bytes:
        told.append(f"lds_bytes {found['lds_bytes']}, the arch has {archs.of(arch).lds_bytes}")
    return told


def losses(found: Figures, before: Figures) -> list[str]:
    """What got worse than recorded."""
    told = []
    if found["occupancy"] < before["occupancy"]:
        told.append(f"occupancy {found['occupancy']}, recorded {before['occupancy']}")
    now, then = sum(found["matrix"].values()), sum(before["matrix"].values())
    if now < then:
        told.append(f"matrix instructions {now}, recorded {then}")
    return told


def complaints(result: Compiled, kept: Mapping[str, Any]) -> list[str]:
    """Everything wrong with one kernel, each with its kernel, call and architecture."""
    case = result.case
    told = [result.error] if result.error else faults(case.arch, result.figures)
    told += [f"32-bit product feeds a pointer at {place}" for place in result.addresses]
    if kept["triton"] == triton.__version__ and not result.error:
        calls = kept["kernels"].get(case.kernel, {})
        before = [calls[name] for name in case.names if name in calls]
        if not before:
            told.append("not recorded; run python -m bench.isa --update")
        told += [loss for figures in before for loss in losses(result.figures, figures)]
    return [f"{case.arch} {case.kernel} [{case.names[0]}]: {text}" for text in told]


def hip_rows(arch: str) -> dict[str, Figures]:
    """Recorded figures of the HIP kernels by symbol."""
    return json.loads(HIP_FIGURES.read_text())["kernels"].get(arch, {}) if HIP_FIGURES.exists() else {}


def quick(todo: list[Case], kept: Mapping[str, Any]) -> list[Case]:
    """One case per kernel, the one that was recorded with the least occupancy and the most registers."""

    def tight(case: Case) -> tuple[float, int]:
        found = [kept["kernels"].get(case.kernel, {}).get(name) for name in case.names]
        known = [figures for figures in found if figures]
        return min(((figures["occupancy"], -figures["vgpr"]) for figures in known), default=(99.0, 0))

    by_kernel: dict[str, Case] = {}
    for case in sorted(todo, key=tight):
        by_kernel.setdefault(case.kernel, case)
    return list(by_kernel.values())


def row(name: str, found: Figures) -> str:
    def cell(key: str) -> str:
        return str(found.get(key, "-"))

    matrix = " ".join(f"{count} {kind}" for kind, count in found.get("matrix", {}).items()) or "-"
    spills = f"{cell('vgpr_spills')}/{cell('sgpr_spills')}"
    wide = f"{cell('wide_loads')}/{cell('wide_stores')}"
    return (
        f"{cell('vgpr'):>5}{cell('agpr'):>5}{cell('sgpr'):>5}{cell('lds_bytes'):>8}{cell('scratch_bytes'):>8}{spills:>8}"
        f"{cell('occupancy'):>6}{wide:>11}{cell('code_bytes'):>7}  {name}  {matrix}"
    )


HEADER = f"{'VGPR':>5}{'AGPR':>5}{'SGPR':>5}{'LDS':>8}{'scratch':>8}{'v/s sp':>8}{'waves':>6}{'16B ld/st':>11}{'code':>7}  kernel [call]"


def diff(a: Path, b: Path) -> list[str]:
    """What differs between two folders of recorded figures."""
    told = []
    for arch in AMD:
        one, two = recorded(a, arch), recorded(b, arch)
        for kernel in sorted({*one["kernels"], *two["kernels"]}):
            before, after = one["kernels"].get(kernel, {}), two["kernels"].get(kernel, {})
            for name in sorted({*before, *after}):
                if name not in before or name not in after:
                    told.append(f"{arch} {kernel} [{name}]: only with Triton {(one if name in before else two)['triton']}")
                    continue
                changed = [
                    f"{key} {before[name].get(key)} -> {after[name].get(key)}"
                    for key in after[name]
                    if before[name].get(key) != after[name].get(key)
                ]
                if changed:
                    told.append(f"{arch} {kernel} [{name}]: {', '.join(changed)}")
    return told


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", help="only these ops")
    parser.add_argument("--arch", nargs="+", choices=AMD, default=AMD)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one call per kernel, the tightest")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--diff", nargs=2, type=Path, metavar=("A", "B"))
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.diff:
        print("\n".join(diff(*args.diff)) or "no difference")
        return 0
    chosen = [variant for variant in variants() if not args.op or variant.op in args.op]
    kept = {arch: recorded(args.folder, arch) for arch in args.arch}
    todo = {arch: cases(arch, chosen) for arch in args.arch}
    if args.quick:
        todo = {arch: quick(found, kept[arch]) for arch, found in todo.items()}
    told: list[str] = []
    results: dict[str, list[Compiled]] = {arch: [] for arch in args.arch}
    print(f"Triton {triton.__version__}\n{HEADER}")
    for result in compile_all([case for found in todo.values() for case in found], args.processes):
        case = result.case
        results[case.arch].append(result)
        told += complaints(result, kept[case.arch])
        print(row(f"{case.arch} {case.kernel} [{case.names[0]}, {len(case.names)} calls]", result.figures), flush=True)
    for arch in args.arch if not args.op else ():
        for symbol, needs in hip_rows(arch).items():
            told += [f"{arch} {symbol}: {text}" for text in faults(arch, needs)]
            print(row(f"{arch} {symbol} [HIP]", needs))
    if args.update:
        for arch, compiled in results.items():
            record(args.folder, arch, compiled, args.op or ())
        told = [text for text in told if "recorded" not in text]
    print(
        f"{sum(map(len, results.values()))} kernels of {len(chosen)} calls for {', '.join(args.arch)}: {len(told)} complaints"
    )
    if told and (args.check or args.update):
        print("\n".join(told), file=sys.stderr)
    return 1 if told and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
