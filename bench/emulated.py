# SPDX-License-Identifier: Apache-2.0
"""Counts, not times: every op's machine code run by the emulator, its instructions, traffic and matrix work written down.

python -m bench.emulated --arch gfx942 [--op rms_norm] [--backend triton] [--brief]
python -m bench.emulated --arch gfx942 --write     # keep the figures in bench/emulated/gfx942.json
python -m bench.emulated --arch gfx942 --check     # fail if instructions or bytes grew by more than 2 %
python -m bench.emulated --op rms_norm --backend hip --trace 0,1 [--break 17]    # what wave 1 of workgroup 0 does
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.shapes import Variant, variants
from rocm_infer import arch as archs
from rocm_infer.emulator.device import Checks, Device, LaunchRecord
from rocm_infer.emulator.session import emulated_device

TOLERANCE = 0.02
FOLDER = Path(__file__).parent / "emulated"
SUMMED = ("instructions", "valu", "salu", "smem", "vmem", "lds", "mfma", "barriers", "bytes_read", "bytes_written", "wide_bytes",
          "lines_read", "lines_written", "lds_bytes", "lds_conflicts", "mfma_flops", "mfma_cycles")  # fmt: skip
WATCHED = ("instructions", "bytes_read", "bytes_written", "lines_read", "lines_written")


class Case(NamedTuple):
    """A call of bench.shapes by its name, with fewer tokens, columns, heads or experts where an emulator needs it."""

    op: str
    variant: str
    scaled: dict[str, int]


# The first case of each op is the one of --brief.
CASES = (
    Case("rms_norm", "deepseek-v3 tp8 hidden T16 bf16", {"T": 8}),
    Case("rms_norm", "deepseek-v3 tp8 hidden T16 fp8", {"T": 8}),
    Case("rms_norm", "deepseek-v3 tp8 kv_norm T16 bf16", {}),
    Case("add_rms_norm", "llama-3.1-8b tp1 hidden T16 bf16", {}),
    Case("add_rms_norm", "deepseek-v3 tp8 hidden T16 fp8", {"T": 8}),
    Case("silu_mul", "llama-3.1-8b tp8 T16 bf16", {}),
    Case("silu_mul", "llama-3.1-8b tp8 T16 fp8", {}),
    Case("quant_fp8", "deepseek-v3 tp8 q_a+kv_a T16 fp8", {}),
    Case("rope", "llama-3.1-8b tp1 T16 bf16", {}),
    Case("gemm", "llama-3.1-8b tp8 qkv M2048 bf16", {"M": 128, "N": 256, "K": 1024}),
    Case("gemm", "llama-3.1-8b tp8 qkv M16 bf16", {"N": 128}),
    Case("gemm_fp8", "deepseek-v3 tp8 q_b M2048 fp8", {"M": 128, "N": 256, "K": 1024}),
    Case("gemm_fp8", "deepseek-v3 tp8 q_b M16 fp8", {"N": 256}),
    Case("store_kv", "llama-3.1-8b tp1 T16 bf16", {}),
    Case("store_kv", "llama-3.1-8b tp1 T16 bf16, fp8 cache", {}),
    Case("store_mla", "deepseek-v3 tp8 T16 bf16", {}),
    Case("store_mla", "deepseek-v3 tp8 T16 bf16, fp8 cache", {}),
    Case("attn_prefill", "llama-3.1-8b tp8 T2048 bf16", {"B": 1, "T": 128, "L": 256}),
    Case("attn_prefill", "llama-3.1-8b tp8 T2048 bf16, fp8 cache", {"B": 1, "T": 128, "L": 256}),
    Case("attn_prefill", "deepseek-v3 tp8 T2048 bf16", {"B": 1, "T": 128, "L": 128, "H": 2, "G": 2}),
    Case("attn_decode", "llama-3.1-8b tp8 B16 bf16", {"B": 2, "L": 1024}),
    Case("attn_decode", "llama-3.1-8b tp8 B16 bf16, fp8 cache", {"B": 2, "L": 1024}),
    Case("mla_decode", "deepseek-v3 tp8 B16 S1 P16 bf16", {"B": 1, "K": 512}),
    Case("mla_decode", "deepseek-v3 tp8 B16 S1 P64 bf16, fp8 cache", {"B": 1, "K": 512}),
    Case("mla_decode", "deepseek-v3 tp8 B16 S2 P16 bf16", {"B": 1, "K": 512}),
    Case("moe_route", "deepseek-v3 tp8 T16 bf16", {}),
    Case("moe_route", "mixtral-8x7b tp1 T16 bf16", {}),
    Case("moe_align", "deepseek-v3 tp8 T16 bf16", {}),
    Case("moe_align", "deepseek-v3 tp8 T2048 bf16", {"T": 512}),
    Case("moe_gemm", "deepseek-v3 tp8 w13 T16 fp8", {"E": 16, "K": 1024}),
    Case("moe_gemm", "deepseek-v3 tp8 w13 T16 bf16", {"E": 16, "K": 1024}),
    Case("moe_gemm", "deepseek-v3 tp8 w2 T16 bf16", {"E": 16, "N": 1024}),
    Case("moe_gemm", "deepseek-v3 tp8 w13 T2048 bf16", {"T": 64, "E": 4, "K": 1024}),
    Case("moe_sum", "deepseek-v3 tp8 T16 bf16", {"T": 8}),
    Case("sample", "llama-3.1-8b tp8 B16 bf16", {"B": 2}),
    Case("sample", "llama-3.1-8b tp8 B16 greedy bf16", {"B": 2}),
)  # fmt: skip


def find(case: Case) -> Variant:
    found = next((v for v in variants(case.op) if v.name == case.variant), None)
    if found is None:
        raise LookupError(f"bench.emulated: {case.op} has no variant {case.variant!r} in bench/shapes.py")
    return found.scaled(**case.scaled)


def label(variant: Variant) -> str:
    return f"{variant.name} " + ",".join(f"{name}={size}" for name, size in variant.dims.items())


def summary(launches: Sequence[LaunchRecord], variant: Variant, arch: archs.Arch) -> dict[str, float]:
    """Counters of one op call. See docs/emulator.md for what each figure means and does not mean."""
    cost = variant.cost()
    total: dict[str, float] = {key: sum(record.counters[key] for record in launches) for key in SUMMED}
    moved = total["bytes_read"] + total["bytes_written"]
    vector_cycles = 4 * total["valu"]  # a SIMD of 16 lanes needs four cycles for a wave of 64
    peak = arch.fp8_flops if variant.fp8 else arch.bf16_flops
    return total | {
        "launches": len(launches),
        "traffic_ratio": round(moved / max(cost.bytes, 1), 3),
        "lines_ratio": round(128 * (total["lines_read"] + total["lines_written"]) / max(cost.bytes, 1), 3),
        "wide_share": round(total["wide_bytes"] / max(moved, 1), 3),
        "mfma_bound": round(total["mfma_cycles"] / max(total["mfma_cycles"], vector_cycles, 1), 3),
        "floor_us": round(1e6 * max(cost.bytes / arch.bytes_per_s, cost.flops / peak), 4),
    }


def measure(variant: Variant, backend: str, device: Device) -> dict[str, float] | str:
    """Counters of one call, or the reason why the backend does not serve it."""
    arch = archs.of(device.arch)
    arguments = variant.arguments(arch)
    device.launches.clear()
    try:
        variant.contract().using(backend)(**arguments)
    except NotImplementedError as error:
        return str(error)
    return summary(device.launches, variant, arch)


def run(
    arch: str, cases: list[Case], backends: list[str], trace: tuple[int, int] | None = None, break_at: int | None = None
) -> Iterator[tuple[str, dict[str, float] | str]]:
    """(case, counters or the reason of a refusal) of the cases on all backends; traces go to stdout."""
    checks = Checks(races=False, undefined=False, bank_conflicts=True)  # the tests look for faults, this counts
    with emulated_device(arch, checks=checks, trace=trace, break_at=break_at) as device:
        for case in cases:
            variant = find(case)
            for backend in backends:
                yield f"{case.op}/{backend}/{label(variant)}", measure(variant, backend, device)
                print("".join(f"{line}\n" for line in device.trace_lines), end="")
                device.trace_lines.clear()


def chosen(op: str | None, brief: bool) -> list[Case]:
    """The cases of one op or all, or only the first of each op."""
    cases = [case for case in CASES if op in (None, case.op)]
    return [case for i, case in enumerate(cases) if not brief or case.op not in [c.op for c in cases[:i]]]


def worse(case: str, old: dict[str, float] | None, new: dict[str, float]) -> list[str]:
    """What a case does more than it did."""
    if old is None:
        return [f"{case}: no figures are kept"]
    return [f"{case}: {key} {old[key]:.0f} -> {new[key]:.0f}" for key in WATCHED if new[key] > old[key] * (1 + TOLERANCE)]


def row(case: str, figures: dict[str, float] | str) -> str:
    if isinstance(figures, str):
        return f"{case}: not served: {figures}"
    return (
        f"{case}: {figures['instructions']:.0f} wave instructions, traffic {figures['traffic_ratio']:.2f} (lines "
        f"{figures['lines_ratio']:.2f}), 16-byte share {figures['wide_share']:.2f}, LDS conflicts {figures['lds_conflicts']:.0f}, "
        f"MFMA bound {figures['mfma_bound']:.2f}, floor {figures['floor_us']:.3f} us"
    )


def wave_of(text: str) -> tuple[int, int]:
    workgroup, wave = text.split(",")
    return int(workgroup), int(wave)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("gfx942", "gfx950"), default="gfx942")
    parser.add_argument("--op", choices=sorted({case.op for case in CASES}))
    parser.add_argument("--backend", choices=("triton", "hip"))
    parser.add_argument("--brief", action="store_true", help="one case of each op")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("--check", action="store_true", help="compare with the kept figures")
    parser.add_argument("--trace", type=wave_of, metavar="WORKGROUP,WAVE", help="print the instructions of one wave")
    parser.add_argument("--break", type=int, dest="break_at", metavar="N", help="only its registers, before instruction N")
    args = parser.parse_args(argv)
    if args.trace and not args.op:
        parser.error("--trace: say --op, and best --backend too")
    if args.break_at is not None and not args.trace:
        parser.error("--break: say --trace WORKGROUP,WAVE too")
    path = FOLDER / f"{args.arch}.json"
    kept: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    now: dict[str, Any] = {}
    complaints: list[str] = []
    backends = [args.backend] if args.backend else ["triton", "hip"]
    for case, figures in run(args.arch, chosen(args.op, args.brief or bool(args.trace)), backends, args.trace, args.break_at):
        print(row(case, figures), flush=True)
        if not isinstance(figures, str):
            now[case] = figures
            complaints += worse(case, kept.get(case), figures) if args.check else []
    if args.write:
        whole = not (args.op or args.backend or args.brief)
        path.parent.mkdir(exist_ok=True)
        rows = sorted((now if whole else kept | now).items())
        path.write_text("{\n" + ",\n".join(f"{json.dumps(case)}: {json.dumps(figures)}" for case, figures in rows) + "\n}\n")
    if complaints:
        print(
            "more than 2 % over the kept figures; if that is meant: "
            f"python -m bench.emulated --arch {args.arch} --write\n" + "\n".join(complaints)
        )
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
