# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer explain`: which op has which kernels, which one a model's calls would get on a GPU, and why."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from rocm_infer import arch as archs
from rocm_infer.config import EngineConfig
from rocm_infer.hub import resolve_model
from rocm_infer.models import read_config
from rocm_infer.models.dry_run import DryRun, StepSize, shard
from rocm_infer.ops._op import CPU_ORDER, FOLDERS, Op, registry
from rocm_infer.platform import has_gpu

COLUMNS = ("reference", *FOLDERS)
ROOT = Path(__file__).resolve().parent.parent.parent


def backends(op: Op) -> list[str]:
    """The reference, and every backend that has a kernel of the op's name."""
    found = ["reference"]
    for name, folder in FOLDERS.items():
        package = f"rocm_infer.{folder}"
        if importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.{op.name}"):
            found.append(name)
    return found


def compiled_for(op: str) -> dict[str, set[str]]:
    """{backend: AMD architectures whose machine code is recorded in this checkout}, from the figures of bench.isa and csrc/hip."""
    found: dict[str, set[str]] = {"triton": set(), "hip": set()}
    for file in ROOT.glob("bench/isa/gfx*.json"):
        calls = {call for kernel in json.loads(file.read_text())["kernels"].values() for call in kernel}
        if any(call.split()[0] == op for call in calls):
            found["triton"].add(file.stem)
    source, figures = ROOT / f"csrc/hip/{op}.hip", ROOT / "csrc/hip/resources.json"
    if source.exists() and figures.exists():
        kernels = set(re.findall(r"\b\w+_kernel\b", source.read_text()))
        for arch, symbols in json.loads(figures.read_text())["kernels"].items():
            if any(re.search(rf"(?:^|\d){kernel}", symbol) for kernel in kernels for symbol in symbols):
                found["hip"].add(arch)
    return found


def support_table() -> str:
    """Markdown: one row per op, one column per backend. For kernels of GPUs the architectures they are compiled for."""
    every = {arch.name for arch in archs.ARCHS.values() if arch.vendor == "amd"}
    lines = [f"| op | {' | '.join(COLUMNS)} | what |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    for name, op in sorted(registry().items()):
        served, compiled = backends(op), compiled_for(name)
        module = inspect.getmodule(op.fn)
        what = (module.__doc__ or "").strip().split("\n")[0].rstrip(".") if module else ""
        cells = []
        for column in COLUMNS:
            known = compiled.get(column, set())
            cells.append("" if column not in served else "all" if known == every else " ".join(sorted(known)) or "yes")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {what} |")
    return "\n".join(
        [*lines, "", f"GPU kernels: *all* is {', '.join(sorted(every))}; *yes* is written, with no machine code recorded."]
    )


def order_table() -> str:
    """Plain text: for each op the backends in the order in which a call here tries them."""
    lines = []
    for name, op in sorted(registry().items()):
        served = backends(op)
        order = [backend for backend in (op.order if has_gpu() else CPU_ORDER) if backend in served]
        lines.append(f"{name:<14} {' > '.join(order)}")
    place = "GPU" if has_gpu() else "CPU"
    return f"tensors on the {place}: the first that accepts the call's sizes and types serves it\n" + "\n".join(lines)


def model_table(settings: EngineConfig, arch: archs.Arch) -> str:
    """Plain text: what serves each op in a decode and in a prefill step of a model on an architecture, and why."""
    whole = read_config(resolve_model(settings.model))
    with archs.played_by_meta(arch):
        run = DryRun(shard(whole, settings.tensor_parallel_size), settings, vocab_size=whole.vocab_size)
        for size in (StepSize(min(16, settings.max_running_requests), (), 8), StepSize(0, (settings.chunked_prefill_size,), 8)):
            run.step(size)
        run.sample(1, num_logprobs=-1, is_penalised=False, has_bias=False, has_mask=False)
    lines = [f"{settings.model} on {arch.name}, tensor parallel {settings.tensor_parallel_size}"]
    return "\n".join([*lines, *(f"{found.op:<14} {found.backend or 'none':<10} {found.reason}" for found in run.served())])


def main(settings: EngineConfig | None, arch_names: Sequence[str], *, markdown: bool) -> int:
    """settings: of the model to explain, None for the general tables."""
    if markdown:
        print(support_table())
    elif settings is None:
        print(order_table())
    else:
        here = (
            [archs.current(torch.device("cuda"))]
            if has_gpu()
            else [arch for arch in archs.ARCHS.values() if arch.vendor == "amd"]
        )
        for arch in [archs.of(name) for name in arch_names] or here:
            print(model_table(settings, arch), end="\n\n")
    return 0
