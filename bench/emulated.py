# SPDX-License-Identifier: Apache-2.0
"""Counts, not times: every op's machine code run by the emulator, its instructions, traffic and matrix work written down.

python -m bench.emulated --arch gfx942 [--op rms_norm] [--backend triton]
python -m bench.emulated --arch gfx942 --write     # keep the figures in bench/emulated_counts/gfx942.json
python -m bench.emulated --arch gfx942 --check     # fail if instructions or bytes grew by more than 2 %
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rocm_infer import arch as archs
from rocm_infer.emulator.device import Checks, Device, LaunchRecord
from rocm_infer.emulator.session import emulated_device
from rocm_infer.ops import _op

TOLERANCE = 0.02
FOLDER = Path(__file__).parent / "emulated_counts"
_SUMMED = ("instructions", "valu", "salu", "vmem", "lds", "mfma", "barriers", "bytes_read", "bytes_written", "wide_bytes",
           "lines", "lds_bytes", "lds_conflicts", "mfma_flops", "mfma_cycles")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of real models, with fewer tokens, heads, experts or layers where an emulator needs it."""

    dims: dict[str, int]
    inputs: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, list[Shape]] = {
    "rms_norm": [Shape({"T": 16, "C": 4096}), Shape({"T": 8, "C": 7168})],
    "add_rms_norm": [Shape({"T": 16, "C": 4096})],
    "silu_mul": [Shape({"T": 16, "I": 2048})],
    "quant_fp8": [Shape({"T": 16, "K": 7168})],
    "rope": [Shape({"T": 16, "H": 32, "G": 8, "D": 128, "R": 128})],
    "gemm": [Shape({"M": 128, "N": 256, "K": 1024}), Shape({"M": 8, "N": 512, "K": 1024})],
    "gemm_fp8": [Shape({"M": 128, "N": 256, "K": 1024})],
    "store_kv": [Shape({"T": 32, "H": 32, "G": 8, "D": 128, "P": 16, "R": 128})],
    "store_mla": [Shape({"T": 32, "H": 16, "L": 512, "R": 64, "P": 16})],
    "attn_prefill": [Shape({"B": 1, "T": 128, "L": 128, "H": 8, "G": 2, "D": 128, "Dv": 128, "P": 16})],
    "attn_decode": [Shape({"B": 2, "H": 8, "G": 2, "D": 128, "P": 16, "L": 600})],
    "mla_decode": [Shape({"B": 2, "S": 1, "H": 16, "K": 300, "L": 512, "R": 64, "P": 16})],
    "moe_route": [Shape({"T": 32, "E": 256, "top_k": 8, "num_groups": 8, "top_groups": 4})],
    "moe_align": [Shape({"T": 32, "E": 64, "K": 8, "block": 16})],
    "moe_gemm": [Shape({"T": 16, "E": 8, "N": 512, "K": 512, "top_k": 2, "block": 16}, {"silu": True}, {"silu": True})],
    "moe_sum": [Shape({"T": 16, "K": 8, "C": 4096})],
    "sample": [Shape({"B": 4, "V": 32000})],
}


def _label(dims: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in dims.items())


def _summary(launches: list[LaunchRecord], cost: _op.Cost, arch: archs.Arch, fp8: bool) -> dict[str, float]:
    """Counters of one op call. See docs/emulator.md for what each figure means and does not mean."""
    total: dict[str, float] = {key: sum(record.counters[key] for record in launches) for key in _SUMMED}
    moved = total["bytes_read"] + total["bytes_written"]
    vector_cycles = 4 * total["valu"]  # a SIMD of 16 lanes needs four cycles for a wave of 64
    peak = arch.fp8_flops if fp8 else arch.bf16_flops
    return total | {
        "launches": len(launches),
        "traffic_ratio": round(moved / max(cost.bytes, 1), 3),
        "lines_ratio": round(128 * total["lines"] / max(cost.bytes, 1), 3),
        "wide_share": round(total["wide_bytes"] / max(moved, 1), 3),
        "mfma_bound": round(total["mfma_cycles"] / max(total["mfma_cycles"], vector_cycles, 1), 3),
        "floor_us": round(1e6 * max(cost.bytes / arch.bytes_per_s, cost.flops / peak), 4),
    }


def _arguments(op: _op.Op[..., Any], shape: Shape, arch: archs.Arch) -> dict[str, Any]:
    """The op's example arguments, fp8 in the dialect of the architecture."""
    native = torch.float8_e4m3fnuz if arch.fp8 == "e4m3fnuz" else torch.float8_e4m3fn
    extra = dict(shape.inputs)
    if op.name == "gemm_fp8":
        extra["dtype"] = native
    made = op.inputs(shape.dims, **extra)
    if made.get("out_dtype") in _op.FP8:
        made["out_dtype"] = native
    return made


def measure(op: _op.Op[..., Any], backend: str, shape: Shape, device: Device) -> dict[str, float] | str:
    """Counters of one call, or the reason why the backend does not serve it."""
    arch = archs.of(device.arch)
    arguments = _arguments(op, shape, arch)
    device.launches.clear()
    try:
        op.using(backend)(**arguments)
    except NotImplementedError as error:
        return str(error)
    cost = op.cost(shape.dims, **shape.cost)
    fp8 = any(isinstance(a, torch.Tensor) and a.dtype in _op.FP8 for a in arguments.values())
    return _summary(device.launches, cost, arch, fp8)


def run(arch: str, only_op: str | None, backends: list[str]) -> Iterator[tuple[str, dict[str, float] | str]]:
    """(case, counters or the reason of a refusal) of all ops on all backends."""
    with emulated_device(arch, checks=Checks(bank_conflicts=True)) as device:
        for name, op in _op.registry().items():
            for shape in SHAPES.get(name, []) if only_op in (None, name) else []:
                for backend in backends:
                    yield f"{name}/{backend}/{_label(shape.dims)}", measure(op, backend, shape, device)


def _worse(case: str, old: dict[str, float], new: dict[str, float]) -> list[str]:
    return [
        f"{case}: {key} {old[key]:.0f} -> {new[key]:.0f}"
        for key in ("instructions", "bytes_read", "bytes_written", "lines")
        if new[key] > old[key] * (1 + TOLERANCE)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("gfx942", "gfx950"), default="gfx942")
    parser.add_argument("--op", choices=sorted(SHAPES))
    parser.add_argument("--backend", choices=("triton", "hip"))
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("--check", action="store_true", help="compare with the kept figures")
    args = parser.parse_args()
    path = FOLDER / f"{args.arch}.json"
    kept: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    complaints: list[str] = []
    for case, figures in run(args.arch, args.op, [args.backend] if args.backend else ["triton", "hip"]):
        if isinstance(figures, str):
            print(f"{case}: not served: {figures}")
            continue
        print(
            f"{case}: {figures['instructions']:.0f} wave instructions, traffic {figures['traffic_ratio']:.2f} (lines "
            f"{figures['lines_ratio']:.2f}), 16-byte share {figures['wide_share']:.2f}, LDS conflicts {figures['lds_conflicts']:.0f}, "
            f"MFMA bound {figures['mfma_bound']:.2f}, floor {figures['floor_us']:.3f} us"
        )
        if args.check and case in kept:
            complaints += _worse(case, kept[case], figures)
        kept[case] = figures
    if args.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    if complaints:
        sys.exit("grew by more than 2 %:\n" + "\n".join(complaints))


if __name__ == "__main__":
    main()
