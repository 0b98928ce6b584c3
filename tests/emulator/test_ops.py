# SPDX-License-Identifier: Apache-2.0
"""The op tests that say most, as machine code: every op, both architectures, Triton and HIP. All of them: `pytest tests/ops --emulate`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_SELECTED = "agrees or fp8 or penalties or slots_are_sorted or plain_rows or real_sizes"


@pytest.mark.timeout(1200)  # Triton compiles, unless its cache has the kernels
@pytest.mark.parametrize("kernels", ["triton", "hip"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_ops_on_machine_code(arch, kernels, request):
    """In a process of its own: the other tests interpret Triton kernels, and Triton knows one mode per process."""
    env = os.environ | {"HYPOTHESIS_PROFILE": "brief", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    chosen = f"{kernels} and ({_SELECTED})"
    options = ["--emulate", arch, "-k", chosen, "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "tests/ops", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=_ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    rows = re.findall(r"^ops on .*", done.stdout, re.MULTILINE)
    assert len(rows) == 1, done.stdout[-3000:]
    request.node.user_properties.append(("closing rows", rows))
