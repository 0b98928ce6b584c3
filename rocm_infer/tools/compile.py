# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer compile`: compile, on any machine, the Triton kernels that serving a model on a GPU will launch.

The model's steps run dry: tensors have shapes and no data, and a Triton driver compiles each launch for the architecture asked
for and runs nothing. Only config.json of the checkpoint is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rocm_infer import arch as archs
from rocm_infer.config import ConfigError, EngineConfig
from rocm_infer.engine.compilations import compile_counter, write_manifest
from rocm_infer.hub import resolve_model
from rocm_infer.models import read_config
from rocm_infer.models.dry_run import DryRun, Served, shard, step_sizes

CACHE_VARIABLE = "TRITON_CACHE_DIR"
BINARY_VARIABLE = "TRITON_STORE_BINARY_ONLY"


@dataclass(frozen=True)
class Result:
    """kernels: name by entry of Triton's cache. num_compiled: those that were not in the cache before."""

    arch: str
    kernels: dict[str, str]
    num_compiled: int
    num_steps: int
    served: list[Served] = field(default_factory=list)


def compile_model(settings: EngineConfig, arch: str, output: Path | None, *, num_jobs: int = 1) -> Result:
    """Compile for one architecture, into Triton's cache or a bundle. Raises ConfigError for what cannot be served."""
    from rocm_infer.triton_kernels._compile import cache_folder

    folder = None if output is None else output.resolve() / arch
    with _cache_in(folder):
        before = {entry.name for entry in cache_folder().glob("*/")}
        if num_jobs > 1:
            _compile_shares(settings, arch, num_jobs)
        kernels, num_steps, served = _dry_run(settings, arch)
    if folder is not None:
        write_manifest(folder, arch, kernels, _made_for(settings))
    return Result(arch, kernels, len(kernels.keys() - before), num_steps, served)


def _dry_run(settings: EngineConfig, arch: str) -> tuple[dict[str, str], int, list[Served]]:
    """(kernel by cache entry, number of steps, what served) of all steps that serving can take."""
    from rocm_infer.triton_kernels._compile import compiling

    whole = read_config(resolve_model(settings.model))
    kernels: dict[str, str] = {}
    num_steps = 0
    with compiling(archs.of(arch)) as launches:
        compile_counter(torch.device("meta"))

        def take() -> None:
            for launch in launches:
                kernels[next(iter(launch.files.values())).parent.name] = launch.kernel
            launches.clear()

        run = DryRun(shard(whole, settings.tensor_parallel_size), settings, vocab_size=whole.vocab_size, launches=True)
        for num_pages in run.cache_sizes(settings.max_total_tokens):
            for size in step_sizes(settings, run.max_pages):
                run.step(size, num_pages)
                take()
                num_steps += 1
        for arguments in sampler_calls():
            run.sample(min(2, settings.max_running_requests), **arguments)
            take()
    return kernels, num_steps, run.served()


def sampler_calls() -> Iterator[dict[str, Any]]:
    """The kinds of sampling that requests can ask for."""
    flags = (False, True)
    for num_logprobs, is_penalised, has_bias, has_mask in itertools.product((-1, 0, 1), flags, flags, flags):
        yield {"num_logprobs": num_logprobs, "is_penalised": is_penalised, "has_bias": has_bias, "has_mask": has_mask}


def _compile_shares(settings: EngineConfig, arch: str, num_jobs: int) -> None:
    """Fill the cache by num_jobs processes, each of which takes the kernels of its share of hash values."""
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_compile_share, args=(settings, arch, index, num_jobs)) for index in range(num_jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise RuntimeError(f"compile: {arch}: a compiler process failed, see above")


def _compile_share(settings: EngineConfig, arch: str, index: int, num_jobs: int) -> None:
    from triton import knobs

    torch.set_num_threads(1)
    # Triton asks this hook before it compiles, and leaves the launch alone where it says True.
    knobs.runtime.jit_cache_hook = lambda *, repr, **_: zlib.crc32(repr.encode()) % num_jobs != index
    _dry_run(settings, arch)


@contextmanager
def _cache_in(folder: Path | None) -> Iterator[None]:
    """Within, here and in processes started here, Triton's cache is the folder, and keeps only what a launch needs."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = {name: os.environ.get(name) for name in (CACHE_VARIABLE, BINARY_VARIABLE)}
    os.environ.update({CACHE_VARIABLE: str(folder), BINARY_VARIABLE: "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _made_for(settings: EngineConfig) -> dict[str, Any]:
    """The settings that kernels depend on."""
    names = (
        *("model", "dtype", "kv_cache_dtype", "kernel_backend", "context_length", "page_size", "max_running_requests"),
        *("max_total_tokens", "chunked_prefill_size", "tensor_parallel_size"),
    )
    return {name: value for name, value in dataclasses.asdict(settings).items() if name in names}


def report(result: Result) -> str:
    """The kernels by name with the number of their variants, and which ops need no compilation."""
    variants = Counter(result.kernels.values())
    lines = [
        f"{result.arch}: {len(result.kernels)} kernels of {result.num_steps} dry steps, {result.num_compiled} compiled now"
    ]
    lines += [f"  {count:>4} {name}" for name, count in sorted(variants.items())]
    others = sorted({f"{found.op} ({found.backend})" for found in result.served if found.backend != "triton"})
    return "\n".join([*lines, f"  nothing to compile for: {', '.join(others)}"] if others else lines)


def main(settings: EngineConfig, arch_names: Sequence[str], output: Path | None, num_jobs: int) -> int:
    for name in arch_names:
        archs.of(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("arch", "TRITON_INTERPRET=1 is set: Triton then interprets kernels and compiles nothing; unset it")
    for name in arch_names:
        result = compile_model(settings, name, output, num_jobs=num_jobs)
        refused = [found.reason for found in result.served if not found.backend]
        if refused:
            print(f"{name}: {'; '.join(refused)}", file=sys.stderr)
            return 1
        print(report(result), flush=True)
    if output is not None:
        print(f"bundle: {output}; start the server with --kernel-bundle {output}")
    return 0
