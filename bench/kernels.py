# SPDX-License-Identifier: Apache-2.0
"""Kernels one by one on the GPU present: checked against the reference, then timed, then held against what the device can do.

python -m bench.kernels [--op mla_decode,gemm_fp8] [--backend triton] [--quick] [--peer] [--json FILE] [--plot FILE]

A time is the median over replays of a captured graph of launches, divided by their number; the launches take turns on copies of
their arguments that together exceed every cache. What cannot be captured is timed launch by launch, which includes the host, and
marked *. Shares are of the published peaks in rocm_infer/arch.py, where the board is known, else of a copy and a matrix product
measured in the same run; both are printed. Without a GPU the floors that follow from the costs are printed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.peers import READS_DEVICE, composition, peers
from bench.shapes import Variant, variants
from rocm_infer import arch as archs
from rocm_infer.engine.memory import available_bytes
from rocm_infer.ops import _op
from rocm_infer.tools.explain import backends as written

BACKENDS = ("triton", "hip")
ORDER = (
    "mla_decode",
    "moe_gemm",
    "gemm_fp8",
    "attn_decode",
    "attn_prefill",
    "sample",
    "moe_route",
    "moe_align",
    "add_rms_norm",
)
ROTATED_BYTES = 1 << 29  # beyond the 256 MB Infinity Cache, with as much again between two uses of a copy
MEMORY_SHARE = 0.3  # of free memory for one set of arguments: the reference and the random numbers take as much again
QUICK_MODELS = (("llama-3.1-8b", 1), ("deepseek-v3", 8))
QUICK_ROWS = (64, 2048)
FLOAT_ERROR = 0.02  # of the root mean square: two roundings to bf16, or one to fp8 on top of fp32 sums
FP8_ERROR = 0.05
INTEGER_ERROR = 0.01  # share of differing integers: choices between numbers that are equal up to rounding


@dataclass(frozen=True)
class Limits:
    """What a device can do per second. `published`: from the data sheet, else measured here."""

    bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    published: bool


@dataclass(frozen=True)
class Row:
    """One kernel, or one competitor, on one call. seconds is None where `note` says why nothing was timed.

    error: the largest over the outputs, root mean square relative to the reference's, or the share of differing integers.
    share, limit: how near the nearest limit is; own_share: the same of what a copy and a matrix product reached in this run.
    """

    op: str
    variant: str
    what: str
    bytes: int
    flops: int
    seconds: float | None = None
    error: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    share: float | None = None
    own_share: float | None = None
    limit: str = ""
    captured: bool = True
    note: str = ""


class Lost(RuntimeError):
    """The device answers no more: a kernel faulted."""


class Wrong(RuntimeError):
    """A kernel's result is not the reference's."""


class RandomOnDevice(torch.overrides.TorchFunctionMode):
    """Within, random numbers that a CPU generator would make come from a generator of the device: inputs of gigabytes in no time."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        super().__init__()
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("generator"), torch.Generator):
            kwargs |= {"generator": self.generator, "device": self.device}
        return func(*args, **kwargs)


def copy_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in memory of their own, strides kept."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def num_bytes(arguments: dict[str, Any]) -> int:
    return sum(value.nbytes for value in arguments.values() if isinstance(value, torch.Tensor))


def effects(op: _op.Op[..., Any], call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a call returns, by number, and what it leaves in the tensors it writes, by name."""
    values = copy_of(arguments)
    found = call(**values)
    made = [] if found is None else list(found) if isinstance(found, (tuple, list)) else [found]
    written = {spec.name: values[spec.name] for spec in op.tensors if spec.written and values.get(spec.name) is not None}
    return {f"output {place}": tensor for place, tensor in enumerate(made)} | written


def check(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], before: dict[str, Any]) -> float:
    """The largest error of all tensors. Of a tensor that was written in place the rows that should change are compared, and
    that nothing else did. Raises Wrong beyond what roundings explain; tests/ops has the strict laws."""
    worst = 0.0
    for name, theirs in want.items():
        mine = got[name]
        if name in before:
            # Of a row that is written, values that round to what they were are no reason to complain.
            changed = (bits(theirs) != bits(before[name])).any(-1, keepdim=True).expand_as(theirs)
            if not torch.equal(bits(mine)[~changed], bits(before[name])[~changed]):
                raise Wrong(f"{name}: changed where the reference leaves it alone")
            mine, theirs = mine.float()[changed], theirs.float()[changed]
        if not theirs.numel():
            continue
        error, allowed = difference(mine, theirs)
        if not error <= allowed:
            raise Wrong(f"{name}: error {error:.3g} of the reference's size, allowed {allowed}")
        worst = max(worst, error)
    return worst


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that equality knows nothing of NaN, and fp8 has it at all."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(error, what is allowed): of floats the root mean square by that of the reference, of integers the share that differs."""
    if not theirs.is_floating_point():
        return float((mine != theirs).float().mean()), INTEGER_ERROR
    a, b = mine.float(), theirs.float()
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-20))
    return error, FP8_ERROR if theirs.dtype.itemsize == 1 else FLOAT_ERROR


def measure(call: Callable[..., Any], arguments: dict[str, Any], rounds: int, *, capture: bool) -> tuple[float, bool]:
    """(median seconds of one call, whether a graph was captured)."""
    num_copies = max(1, min(64, ROTATED_BYTES // max(num_bytes(arguments), 1)))
    copies = [copy_of(arguments) for _ in range(num_copies)]  # ops that write in place leave the arguments alone
    calls = [lambda values=values: call(**values) for values in copies * -(-8 // num_copies)]
    return timing.device_seconds(calls, rounds, capture=capture)


def own_limits(device: torch.device, arch: archs.Arch) -> Limits:
    """What a copy and matrix products reach on this device, in this run."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = timing.device_seconds([lambda: target.copy_(source)], 9)
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, _ = timing.device_seconds([lambda: a @ b.T], 9)
    fp8_flops = 0.0
    try:
        one = torch.ones((), device=device)
        a8, b8 = (x.to(arch.fp8_dtype) for x in (a, b))
        fp8, _ = timing.device_seconds([lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16)], 9)
        fp8_flops = 2 * size**3 / fp8
    except (RuntimeError, ValueError):
        pass  # no fp8 product on this device
    return Limits(2 * source.nbytes / seconds, 2 * size**3 / product, fp8_flops, published=False)


def published_limits(arch: archs.Arch) -> Limits | None:
    return Limits(arch.bytes_per_s, arch.bf16_flops, arch.fp8_flops, published=True) if arch.bytes_per_s else None


def floor(cost: _op.Cost, limits: Limits, *, fp8: bool) -> tuple[float, str]:
    """(seconds that the device needs at least, what it then waits for)."""
    peak = limits.fp8_flops if fp8 and limits.fp8_flops else limits.bf16_flops
    memory, products = cost.bytes / limits.bytes_per_s, cost.flops / peak
    return (memory, "memory") if memory >= products else (products, "products")


class Bench:
    """The device with its limits, and the rows measured so far."""

    def __init__(self, device: torch.device, own: Limits, rounds: int) -> None:
        self.device = device
        self.arch = archs.current(device)
        self.rounds = rounds
        self.own = own
        self.limits = published_limits(self.arch) or self.own
        self.rows: list[Row] = []

    def run(self, variant: Variant, backends: Sequence[str], *, with_peers: bool) -> list[Row]:
        """All kernels and competitors on one call."""
        made: list[Row] = []
        try:
            with RandomOnDevice(self.device):
                arguments = variant.arguments(self.arch, device=str(self.device))
            if num_bytes(arguments) > MEMORY_SHARE * available_bytes(self.device):
                raise torch.cuda.OutOfMemoryError("the arguments fill the memory")
            op = variant.contract()
            want = effects(op, op.using("reference"), arguments)
        except RuntimeError as error:  # out of memory for the most part
            self._alive(f"{variant.op} {variant.name} reference")
            return [self._row(variant, "all", note=f"left out: {str(error).splitlines()[0][:160]}")]
        for backend in backends:
            if backend in written(op):
                made.append(self._one(variant, backend, op.using(backend), arguments, want))
        try:
            name, compose = composition(variant.op, arguments)
        except RuntimeError as error:
            made.append(self._row(variant, "torch", note=str(error).splitlines()[0][:160]))
        else:
            made.append(self._one(variant, name, compose or op.fn, arguments, None))
        if with_peers:
            made += [self._one(variant, name, call, arguments, want) for name, call in peers(variant.op)]
        self.rows += made
        return made

    def _one(
        self,
        variant: Variant,
        what: str,
        call: Callable[..., Any],
        arguments: dict[str, Any],
        want: dict[str, torch.Tensor] | None,
    ) -> Row:
        """want None: torch itself, which is the reference, or computes the same on a layout of its own."""
        error = None
        try:
            if want is not None:
                error = check(effects(variant.contract(), call, arguments), want, arguments)
            seconds, captured = measure(call, arguments, self.rounds, capture=what != READS_DEVICE)
        except Exception as problem:
            self._alive(f"{variant.op} {variant.name} {what}")
            return self._row(variant, what, error=error, note=f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}")
        return self._row(variant, what, seconds=seconds, error=error, captured=captured)

    def _alive(self, what: str) -> None:
        """Raises Lost if the device answers no more."""
        try:
            timing.wait()
        except RuntimeError as error:
            raise Lost(f"{what}: {error}") from error

    def _row(self, variant: Variant, what: str, seconds: float | None = None, **values: Any) -> Row:
        cost = variant.cost()
        if seconds is not None:
            least, limit = floor(cost, self.limits, fp8=variant.fp8)
            own, _ = floor(cost, self.own, fp8=variant.fp8)
            values |= {"share": least / seconds, "own_share": own / seconds, "limit": limit}
            values |= {"gb_per_s": cost.bytes / seconds / 1e9, "tflop_per_s": cost.flops / seconds / 1e12}
        return Row(variant.op, variant.name, what, cost.bytes, cost.flops, seconds, **values)


def chosen(args: argparse.Namespace) -> list[Variant]:
    """The calls to measure, each set of sizes once, the ops that serving spends its time in first."""
    wanted = args.op.split(",") if args.op else sorted(_op.registry())
    unknown = sorted(set(wanted) - set(_op.registry()))
    if unknown:
        raise SystemExit(f"--op: no op named {', '.join(unknown)}; there are {', '.join(sorted(_op.registry()))}")
    found: dict[Any, Variant] = {}
    for variant in variants():
        if variant.op not in wanted or (args.model and args.model not in variant.model):
            continue
        if args.quick and not _is_quick(variant):
            continue
        key = (
            variant.op,
            tuple(variant.dims.items()),
            variant.fp8,
            variant.fp8_cache,
            str(variant.options),
            str(variant.scalars),
        )
        found.setdefault(key, variant)
    return sorted(found.values(), key=lambda variant: ORDER.index(variant.op) if variant.op in ORDER else len(ORDER))


def _is_quick(variant: Variant) -> bool:
    rows = next((variant.dims[name] for name in ("T", "M", "B") if name in variant.dims), 0)
    rows = variant.dims["T"] if variant.op == "attn_prefill" else rows
    return (variant.model, variant.tp) in QUICK_MODELS and rows in QUICK_ROWS


def table(rows: Iterable[Row]) -> str:
    """Rows as text."""
    lines = []
    for row in rows:
        head = f"{row.op:<13} {row.variant:<44} {row.what:<22}"
        if row.seconds is None:
            lines.append(f"{head} not timed: {row.note}")
            continue
        assert row.gb_per_s is not None
        assert row.tflop_per_s is not None
        error = "        " if row.error is None else f"{row.error:8.1e}"
        star = " " if row.captured else "*"
        lines.append(
            f"{head} {row.seconds * 1e6:9.1f}{star}us {row.gb_per_s:7.0f} GB/s {row.tflop_per_s:7.1f} TF/s "
            f"{row.share:6.1%} {row.own_share:6.1%} of {row.limit:<8} {error}"
        )
    return "\n".join(lines)


def floors(found: Sequence[Variant], arch_names: Sequence[str]) -> str:
    """What costs and published peaks say without a GPU: bytes, operations, and the least time on each architecture."""
    arches = [archs.of(name) for name in arch_names]
    head = f"{'op':<13} {'call':<44} {'MB':>9} {'GFLOP':>9}  " + "  ".join(
        f"{arch.name + ' us at least':>24}" for arch in arches
    )
    lines = [head]
    for variant in found:
        cost = variant.cost()
        cells = []
        for arch in arches:
            limits = published_limits(arch)
            assert limits is not None
            seconds, limit = floor(cost, limits, fp8=variant.fp8)
            cells.append(f"{seconds * 1e6:12.2f} {'(' + limit + ')':<11}")
        lines.append(
            f"{variant.op:<13} {variant.name:<44} {cost.bytes / 1e6:9.2f} {cost.flops / 1e9:9.2f}  " + "  ".join(cells)
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], title: str, file: Path) -> None:
    """A bar per kernel and call: its share of the nearest limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.share is not None]
    whats = list(dict.fromkeys(row.what for row in timed))
    calls = list(dict.fromkeys((row.op, row.variant) for row in timed))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(timed)))
    height = 0.8 / max(len(whats), 1)
    for place, what in enumerate(whats):
        of = {(row.op, row.variant): row.share for row in timed if row.what == what}
        axes.barh([i + place * height for i in range(len(calls))], [of.get(call, 0) or 0 for call in calls], height, label=what)
    axes.set_yticks([i + 0.4 for i in range(len(calls))], [f"{op}  {call}" for op, call in calls], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the device's limit")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--op", help="ops, comma separated, default: all")
    add("--backend", default=",".join(BACKENDS), help="kernels, comma separated")
    add("--model", help="only calls of models whose name contains this")
    add("--quick", action="store_true", help="two models, two numbers of rows")
    add("--peer", action="store_true", help="also kernels of other projects that can be imported here")
    add("--rounds", type=int, default=15, help="replays of which the median counts")
    add("--seconds", type=float, help="start no further call after this time; what is left out is said")
    add("--arch", default="gfx942,gfx950", help="architectures of the floors, where there is no GPU")
    add("--json", type=Path, help="write everything there")
    add("--plot", type=Path, help="write a bar chart there (png, svg)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if a kernel's result was wrong or it could not run."""
    args = parse_args(argv)
    found = chosen(args)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was timed. Floors from costs and published peaks:")
        print(floors(found, args.arch.split(",")))
        return 0
    start, device = time.monotonic(), torch.device("cuda")
    bench = Bench(device, own_limits(device, archs.current(device)), args.rounds)
    about = timing.about_gpu(device)
    own, limits = bench.own, bench.limits
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"copy {own.bytes_per_s / 1e9:.0f} GB/s, bf16 {own.bf16_flops / 1e12:.0f}, fp8 {own.fp8_flops / 1e12:.0f} TFLOP/s measured"
    )
    source = "published" if limits.published else "not known, so the measured figures stand in for them"
    print(f"limits {source}; shares: of the limit, of what was measured, and the error against the reference")
    left_out, lost = 0, ""
    for place, variant in enumerate(found):
        if args.seconds and time.monotonic() - start > args.seconds:
            left_out = len(found) - place
            break
        try:
            print(table(bench.run(variant, args.backend.split(","), with_peers=args.peer)), flush=True)
        except Lost as error:
            lost, left_out = str(error), len(found) - place
            break
        gc.collect()
    if left_out:
        print(f"{left_out} of {len(found)} calls left out: {lost or f'{args.seconds:.0f} s are over'}")
    if args.json:
        made = {"about": about, "limits": asdict(limits), "measured": asdict(own), "left_out": left_out, "lost": lost}
        args.json.write_text(json.dumps({**made, "rows": [asdict(row) for row in bench.rows]}, indent=1) + "\n")
    if args.plot:
        plot(bench.rows, f"{about['device']}, {'published' if limits.published else 'measured'} limits", args.plot)
    broken = [row for row in bench.rows if row.seconds is None and row.what in BACKENDS]
    if broken:
        print(f"{len(broken)} calls were wrong or could not run:\n{table(broken)}")
    return 1 if broken or lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
