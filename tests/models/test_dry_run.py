# SPDX-License-Identifier: Apache-2.0
"""Dry runs, and kernels compiled ahead: in processes of their own, for here Triton interprets."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from rocm_infer import arch as archs
from rocm_infer.config import ConfigError, EngineConfig, MoeConfig
from rocm_infer.engine.compilations import CompileCounter, install_bundle
from rocm_infer.hub import resolve_model
from rocm_infer.models import check_backend, read_config
from rocm_infer.models.dry_run import META, DryRun, StepSize, one_of_each_layer, shard, step_sizes

SETTINGS = {"max_running_requests": 2, "chunked_prefill_size": 16, "context_length": 64, "max_total_tokens": 256}
STEPS = (StepSize(2, (), 4), StepSize(0, (16,), 1), StepSize(1, (3, 4), 2))


@pytest.fixture(scope="module")
def tiny():
    return read_config(resolve_model("tiny-deepseek"))


@pytest.mark.parametrize("arch", archs.ARCHS)
def test_every_op_of_a_step_is_served_and_told(tiny, arch):
    with archs.played_by_meta(archs.of(arch)):
        run = DryRun(tiny, EngineConfig(kernel_backend="triton", kv_cache_dtype="fp8_e4m3"))
        for size in STEPS:
            run.step(size)
        run.sample(2, num_logprobs=3, is_penalised=True, has_bias=True, has_mask=True)
    served = {found.op: found.backend for found in run.served()}
    assert set(served.values()) == {"triton"}
    assert {
        "mla_decode",
        "attn_prefill",
        "store_mla",
        "moe_route",
        "moe_align",
        "moe_gemm",
        "moe_sum",
        "gemm",
        "sample",
    } <= set(served)
    cache = next(found.call for found in run.served() if found.op == "mla_decode").dtypes["cache"]
    assert cache == (torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_fp8_weights_travel_in_the_dialect_of_the_chip(tiny, arch):
    config = dataclasses.replace(tiny, fp8_block=(128, 128))
    with archs.played_by_meta(archs.of(arch)):
        run = DryRun(config, EngineConfig(kernel_backend="triton"))
        run.step(STEPS[0])
    calls = {found.op: found.call for found in run.served()}
    native = archs.of(arch).fp8_dtype
    assert calls["gemm_fp8"].dtypes["b"] == calls["moe_gemm"].dtypes["w"] == native
    assert calls["quant_fp8"].scalars["out_dtype"] == native


def test_what_cannot_serve_says_why(tiny):
    with pytest.raises(ConfigError, match=r"kernel_backend hip cannot serve this model\. attn_prefill: .* no kernel written"):
        check_backend(tiny, EngineConfig(kernel_backend="hip"), torch.device("cpu"))
    check_backend(tiny, EngineConfig(kernel_backend="reference"), torch.device("cpu"))


def test_a_rank_has_its_share(tiny):
    half = shard(tiny, 2)
    assert (half.num_heads, half.intermediate, half.vocab_size) == (4, 256, 192)
    assert isinstance(half.moe, MoeConfig)
    assert half.moe.intermediate == 64
    assert half.head_dim == tiny.head_dim
    with pytest.raises(ConfigError, match="tensor_parallel_size: 16 do not divide the attention heads 8"):
        shard(tiny, 16)
    assert one_of_each_layer(tiny).num_layers == 2  # a dense one and one of experts


def test_sizes_of_steps_are_those_of_serving():
    settings = EngineConfig(max_running_requests=40, chunked_prefill_size=300)
    sizes = list(step_sizes(settings, 9))
    for size in sizes:
        assert 0 < size.num_decodes + len(size.chunks) <= 40
        assert sum(size.chunks) <= 300
        assert all(size.chunks)
        assert 1 <= size.num_pages <= 9
    assert {size.num_decodes for size in sizes if not size.chunks} == set(range(1, 41))
    assert {1, 2, 64, 65, 256, 257, 300} <= {sum(size.chunks) for size in sizes if not size.num_decodes}


def test_what_a_cache_held_is_not_counted():
    heard = []
    counter = CompileCounter(lambda **event: heard.append(event))
    times = type("Times", (), {"total": 2_000_000})()
    src = type("Source", (), {"name": "kernel"})()
    for cache_hit in (True, False, True, False):
        counter(cache_hit=cache_hit, times=times, src=src, metadata={}, metadata_group={})
    assert counter.count == 2
    assert len(heard) == 4


SERVE = """
import json, sys, torch
from rocm_infer import arch as archs
from rocm_infer.config import EngineConfig, SamplingParams
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest
from rocm_infer.hub import resolve_model
from rocm_infer.models import read_config
from rocm_infer.models.dry_run import META, DryRun, _UpperBounds
from rocm_infer.triton_kernels._compile import compiling

settings = EngineConfig(**json.loads(sys.argv[1]))
config = read_config(resolve_model("tiny-deepseek"))
with compiling(archs.of("gfx950")), _UpperBounds():
    run = DryRun(config, settings, launches=True)
    def sample(logits, *arguments, **options):
        run.ops.sample(logits, *arguments, **options)
        return torch.zeros(len(logits), dtype=torch.int64), torch.zeros(len(logits))
    engine = Engine(settings, run.model, sample)
    lens = [1, 5, 16, 23, 40, 3, 9]
    for number, num_prompt in enumerate(lens):
        params = SamplingParams(max_tokens=3 + number, temperature=0.0, ignore_eos=True)
        engine.add(AddRequest(str(number), [5] * num_prompt, params))
    finished = sum(output.finish_reason == "length" for _ in range(200) if engine.has_work for output in engine.step())
    stats = engine.stats()
    print(json.dumps({"finished": finished, "jit_compiles": stats["jit_compiles"], "failed": stats["finished_error"]}))
"""


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Without an interpreter of Triton, and without HIP kernels, so that Triton serves all but library products."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["ROCM_INFER_HIP_BUILD"] = os.devnull
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**environment, **variables}, check=False, timeout=280
    )


def serve(cache, **settings) -> dict:
    """What an engine tells that serves seven requests dry."""
    done = python("-c", SERVE, json.dumps({**SETTINGS, **settings}), TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compile_bundle(output) -> subprocess.CompletedProcess[str]:
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return python("-m", "rocm_infer.cli", "compile", "--arch", "gfx950", "--output", str(output), *flags)


@pytest.mark.timeout(900)  # compiles some forty kernels
def test_a_bundle_leaves_nothing_to_compile(tmp_path):
    """The dry steps of `compile` against an engine with its scheduler: what it launches is in the bundle, wherever that lies."""
    done = compile_bundle(tmp_path / "made")
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "made/gfx950/manifest.json").read_text())
    count = len(manifest["entries"])
    assert f"gfx950: {count} kernels of " in done.stdout
    assert f", {count} compiled now" in done.stdout

    bundle = shutil.move(tmp_path / "made", tmp_path / "moved")
    assert serve(tmp_path / "cache", kernel_bundle=str(bundle)) == {"finished": 7, "jit_compiles": 0, "failed": 0}

    lost = next(key for key, entry in manifest["entries"].items() if entry["kernel"] == "mla_decode_kernel")
    shutil.rmtree(tmp_path / "cache" / lost)
    assert serve(tmp_path / "cache")["jit_compiles"] == 1

    shutil.rmtree(bundle / "gfx950" / lost)
    with archs.played_by_meta(archs.of("gfx950")):
        with pytest.raises(ConfigError, match="of kernel mla_decode_kernel is missing; compile again"):
            install_bundle(bundle, META)
        shutil.move(bundle / "gfx950", bundle / "gfx942")
        with pytest.raises(ConfigError, match=r"nothing for gfx950 \(it has gfx942\); make it with"):
            install_bundle(bundle, META)


def test_a_bundle_of_another_compiler_or_for_the_cpu_is_refused(tmp_path):
    (tmp_path / "gfx950").mkdir()
    made = {"arch": "gfx950", "triton": "3.4.0", "key": "another", "made_for": {}, "entries": {}}
    (tmp_path / "gfx950/manifest.json").write_text(json.dumps(made))
    with archs.played_by_meta(archs.of("gfx950")), pytest.raises(ConfigError, match=r"compiled by Triton 3\.4\.0, here is"):
        install_bundle(tmp_path, META)
    with pytest.raises(ConfigError, match="the device is the CPU"):
        install_bundle(tmp_path, torch.device("cpu"))
