# SPDX-License-Identifier: Apache-2.0
"""What a wrong call of a HIP kernel is told, and how a launch reaches a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rocm_infer.hip import _library, build
from rocm_infer.hip.build import ROOT
from rocm_infer.ops.attn_decode import attn_decode
from rocm_infer.ops.moe_route import moe_route
from rocm_infer.ops.rms_norm import rms_norm

# libamdhip64 as far as a launch needs it, which writes down what it is asked for.
STUB = """
#include <cstdio>
extern "C" {
int hipGetDevice(int* device) { *device = 0; return RESULT; }
int hipModuleLoad(void** module, const char* path) { std::printf("load %s\\n", path); *module = (void*)1; return 0; }
int hipModuleGetFunction(void** function, void*, const char* name) { std::printf("function %s\\n", name); *function = (void*)2; return 0; }
int hipModuleLaunchKernel(void*, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned lds, void* stream, void** params, void**) {
    std::printf("launch %u %u %u of %u, LDS %u, stream %p, no residual %d\\n", x, y, z, threads, lds, stream, ((int**)params[0])[1] == nullptr);
    return 0;
}
const char* hipGetErrorString(int code) { return code == 100 ? "no ROCm-capable device is detected" : "?"; }
}
"""
CALL = """
import array, sys
from pathlib import Path
from tests.hip.planted import load_bind
folder = Path(sys.argv[1])
library = load_bind(folder).Library(str(folder / "libkernels_w64.so"))
library.use_hip("/code")
x = array.array("f", [1.0] * 64)
row = (x.buffer_info()[0], 2, (4, 16), (16, 1))
for _ in range(2):
    library.call("rms_norm", [row, None, row, (row[0], 2, (16,), (1,))], [1e-6, 0, 0], 7)
"""


@pytest.fixture
def library(bind_folder):
    return _library.host_library(64)


def rows(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(sizes, dtype=dtype)


def test_a_gap_between_neighbours_is_named(library):
    with pytest.raises(
        ValueError, match=r"rms_norm: x: expected neighbouring elements in the last dimension \(stride 1\), got stride 2"
    ):
        rms_norm.using("hip")(rows(3, 16)[:, ::2], rows(8), eps=1e-6)


def test_an_address_between_elements_is_named(library):
    x = rows(2, 8)
    given = (x.data_ptr() + 1, 2, (2, 8), (8, 1))
    with pytest.raises(ValueError, match=r"rms_norm: y: expected an address that is a multiple of 4, got 0x"):
        library.call("rms_norm", [given, None, given, (x.data_ptr(), 2, (8,), (1,))], [1e-6, 0, 0], 0)


def test_a_wrong_number_of_tensors_is_named(library):
    with pytest.raises(ValueError, match="rms_norm: expected 4 tensors, got 1"):
        library.call("rms_norm", [None], [], 0)


def test_an_unknown_op_is_named(library):
    with pytest.raises(RuntimeError, match="has no ri_nothing; build it again"):
        library.call("nothing", [], [], 0)


def test_sizes_that_do_not_fit_the_tiles_are_refused_before_the_launch(library):
    cache = rows(2, 4, 1, 40)
    call = attn_decode.using("hip")
    with pytest.raises(
        NotImplementedError,
        match="attn_decode: backend 'hip' cannot serve this call: D: expected a multiple of 16 and at most 256, got 40",
    ):
        call(rows(1, 1, 40), cache, cache, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), scale=1.0)


def test_too_many_experts_are_refused(library):
    with pytest.raises(ValueError, match="moe_route: logits: expected at most 1024 experts on this chip, got 2000"):
        moe_route.using("hip")(rows(1, 2000), top_k=2, renormalise=False)
    with pytest.raises(ValueError, match="moe_route: score: expected softmax or sigmoid, got 'relu'"):
        moe_route.using("hip")(rows(1, 8), top_k=2, renormalise=False, score="relu")


def test_the_host_build_is_never_chosen_by_itself(library):
    assert rms_norm.plan("auto", rows(2, 8), rows(8), eps=1e-6)[1] != "hip"


def test_without_a_library_the_reason_says_how_to_build_one(tmp_path, monkeypatch):
    monkeypatch.setenv(_library.BUILD_VARIABLE, str(tmp_path))
    _library.host_library.cache_clear()
    with pytest.raises(
        NotImplementedError, match=r"libkernels_w64.so does not exist; build them with: python setup_rocm.py build"
    ):
        rms_norm.using("hip")(rows(2, 8), rows(8), eps=1e-6)
    _library.host_library.cache_clear()


def run_on_stub(folder: Path, place: Path, result: int) -> subprocess.CompletedProcess[str]:
    (place / "stub.cpp").write_text(STUB.replace("RESULT", str(result)))
    compile_stub = [*build.find_tools().cxx, "-shared", "-fPIC", str(place / "stub.cpp"), "-o", str(place / "libamdhip64.so")]
    subprocess.run(compile_stub, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(place)}
    return subprocess.run(
        [sys.executable, "-c", CALL, str(folder)], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def test_a_launch_on_a_gpu(bind_folder, tmp_path):
    """The code object is loaded once, the kernel is found by its symbol, the launch goes to the caller's stream."""
    done = run_on_stub(bind_folder, tmp_path, 0)
    assert done.returncode == 0, done.stderr
    launch = "launch 4 1 1 of 64, LDS 0, stream 0x7, no residual 1"
    assert done.stdout.splitlines() == [
        "load /code/rms_norm.co",
        "function _Z15rms_norm_kernelIfLi4EEvN4grid10NormParamsE",
        launch,
        launch,
    ]


def test_no_device_is_one_clear_error(bind_folder, tmp_path):
    done = run_on_stub(bind_folder, tmp_path, 100)
    assert "RuntimeError: rms_norm: no AMD GPU can be used: no ROCm-capable device is detected" in done.stderr


def test_no_rocm_is_one_clear_error(library):
    if build.find_tools().rocm_headers:
        pytest.skip("there is a ROCm here")
    with pytest.raises(RuntimeError, match=r"hip: libamdhip64.so was not found; install ROCm, or a ROCm build of torch"):
        library.use_hip("/code")
