# SPDX-License-Identifier: Apache-2.0
"""What each op's machine code executes and moves has not grown since the figures in bench/emulated/ were kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import emulated
from rocm_infer.ops._op import registry

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1200)  # Triton compiles, unless its cache has the kernels
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_nothing_grew(arch):
    """One case of each op. In a process of its own: Triton interprets in this one."""
    env = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.emulated", "--arch", arch, "--brief", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=_ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for op in (case.op for case in emulated.CASES):
        assert f"\n{op}/" in "\n" + done.stdout


def test_growth_is_told():
    old = dict.fromkeys(emulated.WATCHED, 1000.0)
    assert emulated.worse("case", old, old | {"instructions": 1020.0}) == []
    assert emulated.worse("case", old, old | {"instructions": 1021.0}) == ["case: instructions 1000 -> 1021"]
    assert emulated.worse("case", old, old | {"bytes_read": 2000.0}) == ["case: bytes_read 1000 -> 2000"]
    assert emulated.worse("case", None, old) == ["case: no figures are kept"]


def test_every_op_has_a_case():
    for case in emulated.CASES:
        emulated.find(case)
    assert {case.op for case in emulated.CASES} == set(registry()) - {
        "all_reduce",  # needs several ranks' memory
        "bmm_packed",  # these three run on the CPU alone
        "gemm_packed",
        "moe_gemm_packed",
    }
