# SPDX-License-Identifier: Apache-2.0
"""Machine code of all kernels for all chips: it compiles without ROCm, and needs no more of a chip than is written down."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest

from rocm_infer.hip import build
from rocm_infer.hip.build import ALL_TARGETS, ROOT
from tests.hip.conftest import built

OPS = sorted(file.stem for file in (ROOT / "csrc/hip").glob("*.hip"))
# Those that do nothing but move bytes, with the smallest element they move in vectors of 16 bytes.
MEMORY_BOUND = (
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "quant_fp8",
    "moe_sum",
    "store_kv",
    "store_mla",
    "attn_decode",
    "mla_decode",
)
WIDE_LOAD = {"gfx9": "global_load_dwordx4", "gfx1": "global_load_b128"}


@pytest.fixture(scope="session")
def code_objects() -> Path:
    if not build.find_tools().clang:
        pytest.skip("no clang with AMDGPU here: pip install ziglang")
    return built(("code_objects",), "hip") / "code_objects"


def kernels(folder: Path, gfx: str, op: str) -> dict[str, dict[str, int]]:
    return json.loads((folder / gfx / f"{op}.json").read_text())


@pytest.mark.parametrize("gfx", ALL_TARGETS)
def test_every_kernel_compiles(code_objects, gfx):
    for op in OPS:
        code = (code_objects / gfx / f"{op}.co").read_bytes()
        assert code[:4] == b"\x7fELF"
        assert f"amdgcn-amd-amdhsa--{gfx}".encode() in code
        assert kernels(code_objects, gfx, op)


# Headers of clang's own that hip_runtime.h includes and the ziglang wheel leaves out; they declare mathematics that no kernel uses.
LEFT_OUT = (
    "__clang_cuda_math_forward_declares.h",
    "__clang_cuda_complex_builtins.h",
    "__clang_hip_cmath.h",
    "include/cuda_wrappers/algorithm",
    "include/cuda_wrappers/complex",
    "include/cuda_wrappers/new",
)


@pytest.mark.parametrize("op", OPS)
def test_kernels_agree_with_the_real_hip_headers(op, tmp_path):
    """The prelude stands in for hip_runtime.h; with the real one (HIP 7.1, of the Triton wheel) the same sources are accepted."""
    tools, headers = build.find_tools(), build.hip_headers()
    if not tools.clang or not headers:
        pytest.skip("no clang with AMDGPU, or no HIP headers: pip install ziglang triton")
    for name in LEFT_OUT if len(tools.clang) > 1 else ():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    own = [f"-isystem{Path(tools.clang[0]).parent / 'lib/include'}", f"-isystem{tmp_path}"] if len(tools.clang) > 1 else []
    device_only = ["-x", "hip", "-std=c++20", "--offload-arch=gfx942", "-nogpuinc", "-nogpulib", "--cuda-device-only"]
    asked = [*tools.clang, *device_only, "-fsyntax-only", "-Werror", "-DGRID_USE_ROCM_HEADERS", *own, f"-isystem{headers}"]
    done = subprocess.run([*asked, str(ROOT / f"csrc/hip/{op}.hip")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("gfx", ALL_TARGETS)
def test_nothing_spills_to_scratch(code_objects, gfx):
    for op in OPS:
        for name, needs in kernels(code_objects, gfx, op).items():
            assert needs["scratch_bytes"] == 0, f"{gfx} {name}: {needs['scratch_bytes']} bytes of scratch per lane"
            assert needs["vgpr_spills"] == 0, f"{gfx} {name}: {needs}"  # scalars may spill to lanes of a vector register


@pytest.mark.parametrize("gfx", ALL_TARGETS)
def test_needs_stay_within_what_is_written_down(code_objects, gfx):
    """More scratch or lower occupancy is a change somebody has to make on purpose: python setup_rocm.py build --update-resources."""
    written = json.loads(build.RESOURCES.read_text())
    if written["compiler"] != build.clang_version(build.find_tools()):
        pytest.skip(f"figures are of {written['compiler']}; this compiler is another")
    found, kept = build.resources(code_objects.parent)[gfx], written["kernels"][gfx]
    assert found.keys() == kept.keys()
    for name, needs in found.items():
        assert needs["scratch_bytes"] <= kept[name]["scratch_bytes"], (
            f"{gfx} {name}: scratch {needs}, written down {kept[name]}"
        )
        assert needs["occupancy"] >= kept[name]["occupancy"], f"{gfx} {name}: occupancy {needs}, written down {kept[name]}"


@pytest.mark.parametrize("gfx", ALL_TARGETS)
def test_bytes_move_in_vectors_of_16(code_objects, gfx):
    for op in MEMORY_BOUND:
        text = (code_objects / gfx / f"{op}.s").read_text()
        assert WIDE_LOAD[gfx[:4]] in text, f"{gfx} {op}: no {WIDE_LOAD[gfx[:4]]}"
        assert not re.search(r"\bflat_(load|store)", text), f"{gfx} {op}: an address whose memory the compiler did not know"


@pytest.mark.parametrize(("gfx", "wave"), [("gfx942", 64), ("gfx1201", 32)])
def test_the_host_half_knows_every_kernel_by_its_symbol(code_objects, bind_folder, gfx, wave):
    """A launch finds its machine code by the name that the plain C++ compiler gave the same function."""
    library = ctypes.CDLL(str(bind_folder / f"libkernels_w{wave}.so"))
    for op in OPS:
        for name in kernels(code_objects, gfx, op):
            assert hasattr(library, name), f"{op}: {name} is not exported by the host library"
