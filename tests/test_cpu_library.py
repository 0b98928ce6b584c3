# SPDX-License-Identifier: Apache-2.0
"""The library of the CPU kernels: every compiler takes it, threads change nothing, and models run without it."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rocm_infer.config import EngineConfig
from rocm_infer.cpu_kernels import _library
from rocm_infer.models import load_model
from rocm_infer.ops.gemm_packed import gemm_packed, pack
from rocm_infer.ops.rms_norm import rms_norm

COMPILERS = _library._compilers()


@pytest.mark.parametrize("compiler", COMPILERS, ids=[Path(command[0]).name for command in COMPILERS])
@pytest.mark.parametrize("machine", ["native", "x86-64-v3"])
def test_compiler_takes_the_sources(compiler: tuple[str, ...], machine: str, tmp_path: Path) -> None:
    """Without warnings, for this processor and for one with AVX2 alone."""
    if machine != "native" and "zig" in compiler[0]:
        machine = machine.replace("-", "_")
    changes = {"-march=native": f"-march={machine}", "-O3": "-O0", "-shared": "-c"}
    flags = [changes.get(flag, flag) for flag in _library.FLAGS]
    unit = "".join(f'#include "{source}"\n' for source in sorted(_library.SOURCES.glob("*.cpp")))
    made = ["-Wall", "-Wextra", "-x", "c++", "-", "-o", str(tmp_path / "made.o")]
    command = [*compiler, *flags, *made]
    done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning" not in done.stderr, done.stderr[-2000:]


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_library_is_there_and_serves() -> None:
    assert _library.library()[1] is None
    assert rms_norm.plan("auto", torch.ones(3, 8), torch.ones(8), eps=1e-6)[1] == "cpu"


def test_sources_that_do_not_compile_are_an_error_with_the_reason(tmp_path: Path) -> None:
    if not COMPILERS:
        pytest.skip("no C++ compiler")
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    with pytest.raises(OSError, match=r"expected"):
        _library._build([broken], tmp_path / "made.so")
    assert not (tmp_path / "made.so").exists()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail() -> Path:
        raise OSError("no C++ compiler: install g++")

    monkeypatch.setattr(_library, "_built", fail)
    _library.library.cache_clear()
    _library.lanes.cache_clear()
    yield
    _library.library.cache_clear()
    _library.lanes.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_models_run_without_it(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(3, 24)
    _, backend, reason = rms_norm.plan("auto", x, torch.ones(24), eps=1e-7)
    assert backend == "reference"
    assert "no C++ compiler" in reason
    model = load_model(EngineConfig(device="cpu"))
    assert model.head.columns == 0
    assert [record.levelname for record in caplog.records if "no C++ compiler" in record.message] == ["WARNING"]


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
@pytest.mark.parametrize("number", [6, 8])
def test_a_kernel_refuses_a_wrong_number_of_arguments(number: int) -> None:
    kernel = _library.Kernel("rms_norm", "ppp iii d")
    with pytest.raises(struct.error, match=f"expected 7 items for packing \\(got {number}\\)"):
        kernel(torch.float32, *(0,) * number)


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_threads_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(33, 512, generator=generator).bfloat16(), torch.randn(1000, 512, generator=generator).bfloat16()
    packed, threads, found = pack(weight, _library.lanes()), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(gemm_packed(x, packed, columns=1000))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
