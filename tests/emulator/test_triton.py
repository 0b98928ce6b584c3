# SPDX-License-Identifier: Apache-2.0
"""Triton kernels through the emulated device; the cases are in triton_cases.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_triton_kernels(arch):
    env = os.environ | {"EMULATE": arch, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-x", str(_CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=_CASES.parents[2])
    assert done.returncode == 0, done.stdout[-6000:]
