# SPDX-License-Identifier: Apache-2.0
"""The embedded model answers with every kernel executed as machine code, in bf16 and in fp8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rocm_infer.config import EMBEDDED_MODEL, EngineConfig
from rocm_infer.hub import resolve_model
from rocm_infer.models import load_model
from training import quantise, tasks

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = """
import sys
from rocm_infer import LLM, SamplingParams
from rocm_infer.hip import _library
device, model, cache, prompt = sys.argv[1:]
llm = LLM(model, device, kv_cache_dtype=cache, max_total_tokens=1024)
print(llm.chat([{"role": "user", "content": prompt}], SamplingParams(temperature=0, max_tokens=8)).text)
launched = {record.kernel for record in _library.host_settings.emulator.device.launches}
print(*sorted(launched))
"""
_KERNELS = ("rms_norm", "add_rms_norm", "silu_mul", "store_mla", "attn_prefill", "mla_decode", "moe_route", "moe_gemm", "moe_sum", "sample")  # fmt: skip


@pytest.mark.timeout(1200)  # the first run on a machine compiles the kernels
@pytest.mark.parametrize(("device", "fp8"), [("emulated:gfx942", True), ("emulated:gfx950", False)])
def test_the_embedded_model_answers(device, fp8, tmp_path):
    model, cache, kernels = EMBEDDED_MODEL, "auto", _KERNELS
    if fp8:
        model, cache, kernels = str(tmp_path / "fp8"), "fp8_e4m3", (*_KERNELS, "quant_fp8", "gemm_fp8")
        quantise.convert(resolve_model(EMBEDDED_MODEL), Path(model))
    exercise = tasks.held_out_exercises("sum", 1, 0, (0, 0))[0]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _SCRIPT, device, model, cache, exercise.prompt]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=_ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    answer, launched = done.stdout.splitlines()[-2:]
    assert answer == exercise.answer
    missing = [op for op in kernels if op not in launched]
    assert not missing, f"not executed as machine code: {missing}; executed: {launched}"


@pytest.mark.parametrize("device", ["emulated:gfx90a", "emulated:", "emulated:gfx1100"])
def test_unknown_emulated_devices_are_named(device):
    with pytest.raises(ValueError, match=f"device: expected emulated:gfx942 or emulated:gfx950, got '{device}'"):
        load_model(EngineConfig(device=device))


def test_misspelt_devices_are_told_the_choices():
    with pytest.raises(
        ValueError, match=r"device: expected auto, cpu, .* emulated:gfx942 or emulated:gfx950, got 'emulate:gfx942'"
    ):
        load_model(EngineConfig(device="emulate:gfx942"))
