# SPDX-License-Identifier: Apache-2.0
"""A Triton that the kernels do not know is refused by name, where a call is planned and by the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from rocm_infer import arch as archs
from rocm_infer import triton_kernels
from rocm_infer.triton_kernels.common import options

PLAN = """
import torch
from rocm_infer import arch
from rocm_infer.ops.silu_mul import silu_mul
with arch.played_by_meta(arch.of("gfx942")):
    try:
        silu_mul.plan("triton", torch.empty(4, 256, device="meta", dtype=torch.bfloat16))
    except NotImplementedError as error:
        print("refused:", error)
"""
COMPILE = ["-m", "rocm_infer.cli", "compile", "--model", "tiny-deepseek", "--arch", "gfx942"]


@pytest.mark.parametrize("version", ["2.3.1", "3.3.1", "3.3.1+rocm6.4"])
def test_too_old(version):
    assert triton_kernels.is_before(version, triton_kernels.OLDEST_TRITON)


@pytest.mark.parametrize("version", ["3.4.0", "3.4.0+gitf9e5bf54", "3.9.0", "3.10.0", "4.0.0", "unknown"])
def test_not_too_old(version):
    assert not triton_kernels.is_before(version, triton_kernels.OLDEST_TRITON)


@pytest.mark.parametrize(("version", "shallow", "kpack"), [("3.7.1", True, None), ("3.7.1", False, 2), ("3.8.0", True, 2)])
def test_products_of_16_terms_before_triton_3_8(
    monkeypatch: pytest.MonkeyPatch, version: str, shallow: bool, kpack: int | None
):
    """kpack=2 made them wrong: seen on emulated gfx942 with 3.4.0, 3.6.0 and 3.7.1."""
    monkeypatch.setattr(triton, "__version__", version)
    made = options(archs.of("gfx942"), num_warps=4, matrix=True, shallow=shallow)
    assert made.get("kpack") == kpack


@pytest.mark.parametrize("command", [["-c", PLAN], COMPILE])
def test_a_triton_before_the_first_that_serves_is_refused(tmp_path: Path, command: list[str]):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text('__version__ = "3.3.1"\n')
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": paths}
    )
    told = done.stdout + done.stderr
    assert "expected Triton 3.4 or later, got 3.3.1" in told, told
    assert "Traceback" not in told
