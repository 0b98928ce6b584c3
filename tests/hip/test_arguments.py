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
from rocm_infer.ops._op import registry
from rocm_infer.ops.attn_decode import attn_decode
from rocm_infer.ops.moe_route import moe_route
from rocm_infer.ops.rms_norm import rms_norm

# libamdhip64 as far as a launch needs it, which writes down what it is asked for. Against the real header, if there is one, its
# definitions are those of the header or do not compile.
STUB = """
#if __has_include(<hip/hip_runtime_api.h>)
#include <hip/hip_runtime_api.h>
#else
typedef int hipError_t;
typedef void *hipModule_t, *hipFunction_t, *hipStream_t;
#define hipSuccess 0
#endif
#include <cstdio>
extern "C" {
hipError_t hipGetDevice(int* device) { *device = 0; return (hipError_t)RESULT; }
hipError_t hipModuleLoad(hipModule_t* module, const char* path) { std::printf("load %s\\n", path); *module = (hipModule_t)1; return hipSuccess; }
hipError_t hipModuleGetFunction(hipFunction_t* function, hipModule_t module, const char* name) {
    std::printf("function %s of %p\\n", name, (void*)module);
    *function = (hipFunction_t)2;
    return hipSuccess;
}
hipError_t hipModuleLaunchKernel(hipFunction_t function, unsigned int x, unsigned int y, unsigned int z, unsigned int threads, unsigned int threads_y,
                                 unsigned int threads_z, unsigned int lds, hipStream_t stream, void** params, void** extra) {
    std::printf("launch %p: %u %u %u of %u %u %u, LDS %u, stream %p, no residual %d, extra %p\\n", (void*)function, x, y, z, threads, threads_y,
                threads_z, lds, (void*)stream, ((void**)params[0])[1] == nullptr, (void*)extra);
    return hipSuccess;
}
const char* hipGetErrorString(hipError_t code) { return code == (hipError_t)100 ? "no ROCm-capable device is detected" : "?"; }
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


# Small sizes for the example arguments of each op.
DIMS = {
    "add_rms_norm": {"T": 2, "C": 16},
    "all_reduce": {"W": 2, "N": 16},
    "attn_decode": {"B": 1, "H": 2, "G": 1, "D": 16, "P": 4, "L": 5},
    "mla_decode": {"B": 1, "S": 1, "H": 2, "K": 5, "L": 512, "R": 64, "P": 4},
    "moe_align": {"T": 3, "E": 4, "K": 2, "block": 16},
    "moe_route": {"T": 2, "E": 8, "top_k": 2, "num_groups": 1, "top_groups": 1},
    "moe_sum": {"T": 2, "K": 2, "C": 16},
    "quant_fp8": {"T": 2, "K": 128},
    "rms_norm": {"T": 2, "C": 16},
    "sample": {"B": 2, "V": 16},
    "silu_mul": {"T": 2, "I": 16},
    "store_kv": {"T": 2, "H": 2, "G": 1, "D": 16, "P": 4, "R": 16},
    "store_mla": {"T": 2, "H": 2, "L": 32, "R": 16, "P": 4},
}
WRONG = {
    "dtype": (lambda t: t.to(torch.float64), r"expected dtype .*, got torch.float64"),
    "dimensions": (lambda t: t[None], r"expected \d dimensions .*, got shape"),
    "stride": (
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        r"expected neighbouring elements in the last dimension \(stride 1\), got stride 2",
    ),
    "device": (lambda t: t.to("meta"), r"expected device (cpu|meta), got (cpu|meta)"),
}


def example(name: str) -> dict[str, object]:
    return registry()[name].inputs(DIMS[name])


def given_tensors(name: str) -> list[str]:
    arguments = example(name)
    return [spec.name for spec in registry()[name].tensors if arguments.get(spec.name) is not None]


def test_sizes_for_every_hip_kernel_are_here():
    assert set(DIMS) == {file.stem for file in (ROOT / "csrc/hip").glob("*.hip")}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", DIMS)
def test_every_wrong_tensor_is_named(library, name, wrong):
    """One sentence: op, tensor, what was expected, what came. Nothing is launched."""
    change, message = WRONG[wrong]
    for tensor in given_tensors(name):
        arguments = example(name)
        arguments[tensor] = change(arguments[tensor])
        if wrong == "stride" and arguments[tensor].shape[-1] < 2:
            continue
        if wrong == "device" and len(given_tensors(name)) == 1:
            continue  # another device, and nothing that differs from it
        who = r"\w+" if wrong == "device" else tensor  # the one that differs from the first
        with pytest.raises(ValueError, match=rf"^{name}: {who}: {message}"):
            registry()[name].using("hip")(**arguments)


@pytest.mark.parametrize("name", DIMS)
def test_every_address_between_elements_is_named(library, name, monkeypatch):
    plain, seen = _library.Kernel.arguments, []

    def remembering(self, tensors):
        seen.append(plain(self, tensors))
        return seen[-1]

    monkeypatch.setattr(_library.Kernel, "arguments", remembering)
    registry()[name].using("hip")(**example(name))
    for place, parts in enumerate(seen[0]):
        if parts is None or _library.TYPES[parts[1]].itemsize == 1:
            continue

        def shifted(self, tensors, place=place):
            found = plain(self, tensors)
            found[place] = (found[place][0] + 1, *found[place][1:])
            return found

        monkeypatch.setattr(_library.Kernel, "arguments", shifted)
        with pytest.raises(ValueError, match=rf"^{name}: \w+: expected an address that is a multiple of \d, got 0x"):
            registry()[name].using("hip")(**example(name))


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
    with pytest.raises(ValueError, match=r"moe_route: logits: expected at most 2048 experts .* got 1 groups of 3000"):
        moe_route.using("hip")(rows(1, 3000), top_k=2, renormalise=False)
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
    headers = build.hip_headers()
    against = [f"-isystem{headers}", "-D__HIP_PLATFORM_AMD__"] if headers else []
    output = ["-o", str(place / "libamdhip64.so")]
    subprocess.run([*build.find_tools().cxx, *against, "-w", "-shared", "-fPIC", str(place / "stub.cpp"), *output], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(place)}
    return subprocess.run(
        [sys.executable, "-c", CALL, str(folder)], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def test_a_launch_on_a_gpu(bind_folder, tmp_path):
    """The code object is loaded once, the kernel is found by its symbol, the launch goes to the caller's stream."""
    done = run_on_stub(bind_folder, tmp_path, 0)
    assert done.returncode == 0, done.stderr
    launch = "launch 0x2: 4 1 1 of 64 1 1, LDS 0, stream 0x7, no residual 1, extra (nil)"
    assert done.stdout.splitlines() == [
        "load /code/rms_norm.co",
        "function _Z15rms_norm_kernelIfLi4EEvN4grid10NormParamsE of 0x1",
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
