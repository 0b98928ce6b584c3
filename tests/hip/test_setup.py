# SPDX-License-Identifier: Apache-2.0
"""What setup_rocm.py says where tools are missing, and what it puts into a wheel."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import setup_rocm
from rocm_infer.hip import build
from rocm_infer.hip.build import ALL_TARGETS, ROOT, BuildError, Tools

NOTHING = Tools(cmake="", ninja="", cxx=(), clang=(), lld=(), nvcc="", rocm_headers="")


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with the given tools, on which a build only remembers what it was asked for."""
    for variable in ("AMDGPU_TARGET", "REQUIRE"):
        monkeypatch.delenv(variable, raising=False)
    asked = []

    def with_tools(**tools) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        monkeypatch.setattr(setup_rocm, "find_tools", lambda: dataclasses.replace(NOTHING, **tools))
        monkeypatch.setattr(setup_rocm, "build", lambda goals, *, targets, jobs, tools: asked.append((goals, targets)) or ROOT)
        return asked

    return with_tools


def test_each_missing_tool_is_named_with_the_way_to_get_it():
    said = str(NOTHING)
    assert "host C++: none: install g++, clang++ or `pip install ziglang`" in said
    assert "AMD device code: none: install ROCm, clang >= 19 with AMDGPU, or `pip install ziglang`" in said
    with pytest.raises(BuildError, match="cmake is missing: pip install pybind11 cmake ninja ziglang"):
        build.build(("host",), tools=NOTHING)
    with pytest.raises(BuildError, match=r"a C\+\+ compiler is missing"):
        build.build(("host",), tools=dataclasses.replace(NOTHING, cmake="cmake", ninja="ninja"))


def test_without_a_device_compiler_the_host_kernels_are_built_and_said_so(machine, capsys):
    asked = machine(cxx=("g++",))
    setup_rocm.build_all(1)
    assert asked == [(("host", "bind"), ALL_TARGETS)]
    assert "building: host kernels\n" in capsys.readouterr().out


def test_required_machine_code_without_a_compiler_is_an_error(machine, monkeypatch):
    machine(cxx=("g++",))
    monkeypatch.setenv("REQUIRE", "hip")
    with pytest.raises(BuildError, match="REQUIRE=hip: no clang with AMDGPU was found: pip install ziglang"):
        setup_rocm.build_all(1)


def test_the_chosen_chips_are_those_built(machine, monkeypatch, capsys):
    asked = machine(cxx=("g++",), clang=("clang",))
    monkeypatch.setenv("AMDGPU_TARGET", "gfx942, gfx950")
    setup_rocm.build_all(1)
    assert asked == [(("host", "bind", "code_objects"), ("gfx942", "gfx950"))]
    assert "AMD machine code for gfx942, gfx950" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["gfx94", "mi300x", "gfx942 gfx950", "gfx1030"])
def test_an_unknown_chip_is_named_before_anything_is_built(machine, monkeypatch, wrong):
    asked = machine(cxx=("g++",), clang=("clang",))
    monkeypatch.setenv("AMDGPU_TARGET", wrong)
    with pytest.raises(BuildError, match=f"AMDGPU_TARGET: expected names like gfx90a, .* got '{wrong}'"):
        setup_rocm.build_all(1)
    assert not asked


def test_an_unknown_command_prints_the_usage():
    done = subprocess.run([sys.executable, "setup_rocm.py", "instal"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'instal'" in done.stderr


def test_what_runs_is_packaged_and_nothing_else(tmp_path, monkeypatch):
    folder, package = tmp_path / "build", tmp_path / "lib"
    for file in ("libkernels_w64.so", "_bind.so", "code_objects/gfx942/a.co", "code_objects/gfx942/a.s", "build.ninja"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    monkeypatch.setattr(setup_rocm, "PACKAGED", package)
    setup_rocm.package(folder)
    found = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    assert found == {"libkernels_w64.so", "_bind.so", "code_objects/gfx942/a.co"}


def test_the_wheel_holds_the_libraries_and_says_where_they_run(tmp_path):
    """The real packaging, with stand-ins for what takes minutes to compile."""
    for name in ("rocm_infer", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "lib", "assets"))
    for name in ("setup_rocm.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    libraries = ("libkernels_w64.so", "_bind.so", "code_objects/gfx942/rms_norm.co")
    for file in libraries:
        (tmp_path / "built" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "built" / file).touch()
    make = "import setup_rocm; setup_rocm.package(setup_rocm.ROOT / 'built'); print(setup_rocm.make_wheel())"
    done = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    wheel = Path(done.stdout.split()[-1])
    assert re.fullmatch(rf"rocm_infer-.*-cp3{sys.version_info.minor}-none-\w+_\w+.whl", wheel.name)
    inside = zipfile.ZipFile(wheel).namelist()
    assert {f"rocm_infer/hip/lib/{file}" for file in libraries} <= set(inside)
    assert not [name for name in inside if name.startswith(("tests", "csrc", "bench"))]
