# SPDX-License-Identifier: Apache-2.0
"""The figures of compiled kernels: what is read, what is refused, and that our kernels pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import isa
from bench.isa import Case, Compiled, complaints, figures, occupancy, quick, record, recorded
from bench.shapes import MODELS, TP_SIZES, variants
from rocm_infer.ops._op import registry

ROOT = Path(__file__).parents[2]
GOOD = {"scratch_bytes": 0, "vgpr_spills": 0, "sgpr_spills": 0, "lds_bytes": 1024, "occupancy": 2.0, "vgpr": 200,
        "matrix": {"mfma_f32_16x16x16_bf16": 8}}  # fmt: skip
ASSEMBLY = """
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_dword v1, v2, s[4:5]
	buffer_load_dwordx4 v5, s[0:3], 0 offen lds
	global_load_b128 v[0:3], v4, s[0:1]
	global_load_ushort v1, v2, s[4:5]
	global_load_lds_dwordx4 v1, s[4:5]
	buffer_store_byte v1, v2, s[0:3], 0 offen
	scratch_load_dwordx4 v[0:3], off, s0
	ds_read_b128 v[0:3], v4
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]
; codeLenInByte = 2776
    .agpr_count:     114
    .private_segment_fixed_size: 32
    .sgpr_count:     93
    .sgpr_spill_count: 3
    .vgpr_count:     370
    .vgpr_spill_count: 7
"""


def compiled(**changed: object) -> Compiled:
    return Compiled(Case("gfx942", "some_kernel", variants("rms_norm")[0], ["rms_norm a", "rms_norm b"]), GOOD | changed, [])


def kept(version: str = isa.triton.__version__, **changed: object) -> dict[str, object]:
    return {"triton": version, "kernels": {"some_kernel": {"rms_norm b": GOOD | changed}}}


def test_figures_are_read_from_the_assembly():
    found = figures("gfx942", ASSEMBLY, 32768, 4)
    assert (found["vgpr"], found["agpr"], found["sgpr"], found["code_bytes"]) == (370, 114, 93, 2776)
    assert (found["scratch_bytes"], found["vgpr_spills"], found["sgpr_spills"]) == (32, 7, 3)
    assert found["matrix"] == {"mfma_f32_16x16x16_bf16": 2, "wmma_f32_16x16x16_bf16": 1}
    assert found["wide_loads"] == round(4 * 16 / (4 * 16 + 4 + 2), 2)
    assert found["wide_stores"] == 0.0
    assert found["occupancy"] == 1.0


@pytest.mark.parametrize(
    ("arch", "vgpr", "sgpr", "lds", "waves", "expected"),
    [
        ("gfx942", 64, 50, 0, 4, 8.0),
        ("gfx942", 65, 50, 0, 4, 7.0),  # granules of 8
        ("gfx942", 64, 102, 0, 4, 7.0),  # scalar registers
        ("gfx942", 256, 50, 0, 8, 2.0),
        ("gfx942", 300, 50, 0, 8, 0.0),  # 8 waves need 2 on each SIMD: does not fit
        ("gfx942", 128, 50, 33 << 10, 4, 1.0),  # one workgroup's LDS
        ("gfx950", 128, 50, 33 << 10, 4, 4.0),
        ("gfx942", 32, 50, 0, 2, 8.0),  # 16 workgroups of several waves
        ("gfx1100", 97, 50, 0, 8, 12.0),  # granules of 24
        ("gfx1201", 256, 50, 64 << 10, 8, 4.0),
    ],
)
def test_occupancy(arch, vgpr, sgpr, lds, waves, expected):
    assert occupancy(arch, vgpr, sgpr, lds, waves) == expected


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"scratch_bytes": 4}, "scratch_bytes 4, expected 0"),
        ({"vgpr_spills": 1}, "vgpr_spills 1, expected 0"),
        ({"sgpr_spills": 6}, "sgpr_spills 6, expected 0"),
        ({"lds_bytes": (64 << 10) + 1}, "lds_bytes 65537, the arch has 65536"),
        ({"occupancy": 1.0}, "occupancy 1.0, recorded 2.0"),
        ({"matrix": {"mfma_f32_16x16x16_bf16": 7}}, "matrix instructions 7, recorded 8"),
    ],
)
def test_what_is_worse_is_told_with_kernel_call_and_arch(changed, told):
    assert complaints(compiled(), kept()) == []
    assert complaints(compiled(**changed), kept()) == [f"gfx942 some_kernel [rms_norm a]: {told}"]


def test_other_complaints():
    wide = Compiled(compiled().case, dict(GOOD), ["moe_gemm.py:98"])
    assert "32-bit product feeds a pointer at moe_gemm.py:98" in complaints(wide, kept())[0]
    assert "not recorded" in complaints(compiled(), {"triton": isa.triton.__version__, "kernels": {}})[0]
    failed = Compiled(compiled().case, {}, [], "does not compile: RuntimeError")
    assert complaints(failed, kept()) == ["gfx942 some_kernel [rms_norm a]: does not compile: RuntimeError"]
    # Figures of another compiler are no measure; what no kernel may need is still told.
    assert complaints(compiled(occupancy=1.0), kept("0.0")) == []
    assert complaints(compiled(scratch_bytes=4), kept("0.0"))


def test_recording_and_differences(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    record(one, "gfx942", [compiled()], ())
    record(two, "gfx942", [compiled(vgpr=210)], ())
    assert recorded(one, "gfx942")["kernels"] == {"some_kernel": {"rms_norm a": GOOD}}
    assert isa.diff(one, one) == []
    assert isa.diff(one, two) == ["gfx942 some_kernel [rms_norm a]: vgpr 200 -> 210"]
    record(one, "gfx942", [], ["rope"])  # nothing of another op is lost
    assert recorded(one, "gfx942")["kernels"] == {"some_kernel": {"rms_norm a": GOOD}}
    record(one, "gfx942", [], ["rms_norm"])
    assert recorded(one, "gfx942")["kernels"] == {}


def test_quick_takes_the_tightest_call_of_each_kernel():
    loose, tight = Case("gfx942", "k", variants("rms_norm")[0], ["a"]), Case("gfx942", "k", variants("rms_norm")[0], ["b"])
    kernels = {"k": {"a": {"occupancy": 4.0, "vgpr": 99}, "b": {"occupancy": 2.0, "vgpr": 200}}}
    assert quick([loose, tight], {"triton": "", "kernels": kernels}) == [tight]


def test_variants_cover_every_kernel_and_model():
    known = variants()
    assert {variant.op for variant in known} == registry().keys() & {
        path.stem for path in (ROOT / "triton_kernels").glob("*.py")
    }
    assert {(variant.model, variant.tp) for variant in known} == {(model.name, tp) for model in MODELS for tp in TP_SIZES}
    names = [(variant.op, variant.name) for variant in known]
    assert len(set(names)) == len(names)
    assert all(variant.cost().bytes > 0 for variant in known)


def test_deepseek_at_tp8_has_the_published_sizes():
    """seed: 2112x7168, 3072x1536, 7168x2048, 4608x7168, 7168x2304 and experts of 512x7168, 7168x256."""
    mine = [variant for variant in variants() if variant.model == "deepseek-v3" and variant.tp == 8 and variant.fp8]
    dense = {(v.dims["N"], v.dims["K"]) for v in mine if v.op == "gemm_fp8"}
    assert {(2112, 7168), (3072, 1536), (7168, 2048), (4608, 7168), (7168, 2304)} <= dense
    assert {(v.dims["N"], v.dims["K"]) for v in mine if v.op == "moe_gemm"} == {(512, 7168), (7168, 256)}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process where Triton compiles: here it interprets."""
    env = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.parametrize("cases", ["isa_cases.py", "capture_cases.py"])
def test_cases_that_need_the_compiler(cases):
    done = run("pytest", "--noconftest", "-p", "no:cacheprovider", "-x", str(Path(__file__).with_name(cases)))
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.timeout(1200)  # two to three minutes of compiling, unless Triton's cache has the kernels
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_every_kernel_keeps_its_budget(arch):
    done = run("bench.isa", "--check", "--arch", arch, "--processes", "1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert " 0 complaints" in done.stdout
