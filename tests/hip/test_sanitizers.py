# SPDX-License-Identifier: Apache-2.0
"""The op tests once more in an instrumented host build: memory errors and undefined behaviour, then races in LDS."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rocm_infer.hip.build import ROOT
from tests.hip.conftest import built

# The sizes of real models and the 4 GB of address space are for the plain build: what they add is not memory errors.
SMALL = "hip and not w32 and not 2_to_31 and not real_vocabulary and not real_sizes and not wrong_arguments"
USE_LDS = ("rms_norm", "add_rms_norm", "silu_mul", "quant_fp8", "moe_align", "moe_route", "sample", "attn_decode", "mla_decode")


def op_tests(folder: Path, bind_folder: Path, ops: tuple[str, ...] | list[str]) -> tuple[list[str], dict[str, str]]:
    """(arguments of python, environment) of a run of the op tests on the libraries in `folder`."""
    shutil.copy2(next(bind_folder.glob("_bind.*so")), folder)
    files = [f"tests/ops/test_{op}.py" for op in ops]
    plain = ["-p", "no:cacheprovider", "-p", "no:xdist", "-x", "-k", SMALL, "--timeout=0"]
    return ["-m", "pytest", *files, *plain], {"ROCM_INFER_HIP_BUILD": str(folder), "HYPOTHESIS_PROFILE": "brief"}


def check(done, wanted: str) -> None:
    told = done.stdout[-3000:] + done.stderr[-5000:]
    assert done.returncode == 0, told
    assert wanted in done.stdout, told


@pytest.mark.timeout(900)
def test_no_memory_error_and_no_undefined_behaviour(bind_folder, sanitized):
    folder = built(("kernels_w64",), "hip-address", sanitize="address")
    ops = sorted(file.stem for file in (ROOT / "csrc/hip").glob("*.hip"))
    args, variables = op_tests(folder, bind_folder, ops)
    check(sanitized("address", args, **variables), "ops on hip:")


@pytest.mark.timeout(900)
def test_no_race_in_lds(bind_folder, sanitized):
    """At most 192 threads per block: the race detector loses track of more."""
    folder = built(("kernels_w64",), "hip-thread", sanitize="thread")
    args, variables = op_tests(folder, bind_folder, USE_LDS)
    check(sanitized("thread", args, **variables, HIP_MAX_THREADS="192"), "ops on hip:")
