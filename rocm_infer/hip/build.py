# SPDX-License-Identifier: Apache-2.0
"""Builds the kernel libraries of a checkout: finds the tools, runs CMake and ninja. Used by setup_rocm.py and by the tests."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ALL_TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
RESOURCES = ROOT / "csrc" / "hip" / "resources.json"
KNOWN_TARGET = re.compile(r"gfx(90a|942|950|11\d\d|12\d\d)")  # those with matrix instructions that grid/mma.h knows
KEPT_FIGURES = ("vgpr", "agpr", "sgpr", "lds_bytes", "scratch_bytes", "occupancy")
OLDEST_CLANG, NEWEST_CLANG = 19, 23


class BuildError(RuntimeError):
    """A tool is missing, or a compiler refused; the text says which and what it said."""


@dataclass(frozen=True)
class Tools:
    """Commands of the tools found on this machine; empty where there is none."""

    cmake: str
    ninja: str
    cxx: tuple[str, ...]
    clang: tuple[str, ...]
    lld: tuple[str, ...]
    nvcc: str
    rocm_headers: str

    def __str__(self) -> str:
        rows = {
            "host C++": " ".join(self.cxx) or "none: install g++, clang++ or `pip install ziglang`",
            "AMD device code": " ".join(self.clang) or "none: install ROCm, clang >= 19 with AMDGPU, or `pip install ziglang`",
            "NVIDIA device code": self.nvcc or "none (only needed for development on NVIDIA GPUs)",
            "check against real HIP headers": self.rocm_headers or "no, there is no ROCm",
        }
        return "\n".join(f"  {name}: {found}" for name, found in rows.items())


def _zig() -> str:
    spec = importlib.util.find_spec("ziglang")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return str(folder / "zig") if folder and (folder / "zig").exists() else ""


def _program(name: str) -> str:
    """Of the running interpreter's environment first, then of PATH."""
    own = Path(sys.executable).parent / name
    return str(own) if own.exists() else shutil.which(name) or ""


def _has_amdgpu(clang: str) -> bool:
    told = subprocess.run([clang, "--print-targets"], capture_output=True, text=True, check=False)
    return "amdgcn" in told.stdout


def _device_clang(rocm: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(clang, lld): ROCm's own, else a system clang that knows AMDGPU, else the one in the ziglang wheel."""
    named = [str(rocm / "llvm/bin/clang++")] + [
        found for version in range(NEWEST_CLANG, OLDEST_CLANG - 1, -1) if (found := shutil.which(f"clang++-{version}"))
    ]
    for clang in named:
        lld = Path(clang).resolve().parent / "ld.lld"
        if Path(clang).exists() and lld.exists() and _has_amdgpu(clang):
            return (clang,), (str(lld),)
    zig = _zig()
    return ((zig, "clang"), (zig, "ld.lld")) if zig else ((), ())


def hip_headers() -> str:
    """Folder with hip/hip_runtime.h: of ROCm, else of the Triton wheel, else ""."""
    triton = importlib.util.find_spec("triton")
    folders = [
        _rocm() / "include",
        *([Path(triton.origin).parent / "backends/amd/include"] if triton and triton.origin else []),
    ]
    return next((str(folder) for folder in folders if (folder / "hip/hip_runtime.h").exists()), "")


def _rocm() -> Path:
    return Path(os.environ.get("ROCM_PATH", "/opt/rocm"))


def find_tools() -> Tools:
    rocm = _rocm()
    system = next(
        ((found,) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name and (found := shutil.which(name))), None
    )
    zig = _zig()
    clang, lld = _device_clang(rocm)
    headers = rocm / "include" if (rocm / "include/hip/hip_runtime.h").exists() else ""
    cxx = system or ((zig, "c++") if zig else ())
    return Tools(_program("cmake"), _program("ninja"), cxx, clang, lld, shutil.which("nvcc") or "", str(headers))


def visible_targets() -> tuple[str, ...]:
    """AMDGPU_TARGET, else the AMD GPU in front of us, else all. Errors: BuildError for a chip that no kernel is written for."""
    named = tuple(part.strip() for part in os.environ.get("AMDGPU_TARGET", "").replace(";", ",").split(",") if part.strip())
    for name in named:
        if not KNOWN_TARGET.fullmatch(name):
            raise BuildError(
                f"AMDGPU_TARGET: expected names like {', '.join(ALL_TARGETS)}, separated by commas, got {name!r}; "
                "`rocminfo | grep gfx` tells that of a GPU"
            )
    if named:
        return named
    try:
        import torch

        if torch.version.hip and torch.cuda.is_available():
            return (str(torch.cuda.get_device_properties(0).gcnArchName).split(":")[0],)
    except ImportError:
        pass
    return ALL_TARGETS


def _settings(tools: Tools, sanitize: str, targets: tuple[str, ...], sources: tuple[Path, ...]) -> dict[str, str]:
    import pybind11

    compiler = {"CMAKE_CXX_COMPILER": ";".join(tools.cxx)}
    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    return compiler | {
        "CMAKE_MAKE_PROGRAM": tools.ninja,
        "SANITIZE": sanitize,
        "AMDGPU_TARGETS": ";".join(targets) if tools.clang else "",
        "DEVICE_CLANG": ";".join(tools.clang),
        "DEVICE_LLD": ";".join(tools.lld),
        "ROCM_HEADERS": tools.rocm_headers,
        "NVCC": tools.nvcc,
        "PYTHON": sys.executable,
        "SOURCES": ";".join(map(str, sources)),
        "BIND_INCLUDES": ";".join(includes),
        "BIND_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command[:4])} ... failed:\n{(done.stdout + done.stderr)[-6000:]}")


def build(
    goals: tuple[str, ...],
    folder: Path = ROOT / "build" / "hip",
    *,
    sanitize: str = "",
    targets: tuple[str, ...] = ALL_TARGETS,
    sources: tuple[Path, ...] = (),
    jobs: int = 1,
    tools: Tools | None = None,
) -> Path:
    """Bring `goals` (host, kernels_w64, kernels_w32, bind, code_objects, cuda) up to date in `folder`, and return it.

    Processes that build the same folder wait for each other. Errors: BuildError with the compiler's own words.
    """
    tools = tools or find_tools()
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("pybind11 is missing: pip install pybind11 cmake ninja")
    for name, found in (("cmake", tools.cmake), ("ninja", tools.ninja), ("a C++ compiler", tools.cxx)):
        if not found:
            raise BuildError(f"{name} is missing: pip install pybind11 cmake ninja ziglang")
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(tools, sanitize, targets, sources)
    stamp = folder / "settings.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or json.loads(stamp.read_text()) != settings:
            shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
            (folder / "CMakeCache.txt").unlink(missing_ok=True)
            _run(
                [
                    tools.cmake,
                    "-S",
                    str(ROOT),
                    "-B",
                    str(folder),
                    "-G",
                    "Ninja",
                    *(f"-D{name}={value}" for name, value in settings.items()),
                ]
            )
            stamp.write_text(json.dumps(settings, indent=1))
        _run([tools.ninja, "-C", str(folder), "-j", str(jobs), *goals])
    return folder


def clang_version(tools: Tools) -> str:
    """The first line of what the device compiler says of itself, without its place on disk."""
    told = subprocess.run([*tools.clang, "--version"], capture_output=True, text=True, check=True).stdout
    return told.splitlines()[0].split(" (")[0]


def resources(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """What each kernel of a build's code objects needs of the chip: {gfx: {symbol: figures}}."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for file in sorted((folder / "code_objects").glob("*/*.json")):
        for symbol, figures in json.loads(file.read_text()).items():
            found.setdefault(file.parent.name, {})[symbol] = {name: figures.get(name, 0) for name in KEPT_FIGURES}
    return found


def write_resources(folder: Path, tools: Tools) -> None:
    """Bring csrc/hip/resources.json up to what the build in `folder` needs: one line per kernel.

    Format: {"compiler": first line of `clang --version`, "kernels": {gfx: {mangled name: {figure: count}}}} with the KEPT_FIGURES:
    registers per lane, bytes of LDS per block and of scratch per lane, waves per SIMD that the registers allow.
    """
    chips = []
    for gfx, kernels in resources(folder).items():
        rows = ",\n".join(f"   {json.dumps(symbol)}: {json.dumps(figures)}" for symbol, figures in kernels.items())
        chips.append(f'  "{gfx}": {{\n{rows}\n  }}')
    text = f'{{\n "compiler": {json.dumps(clang_version(tools))},\n "kernels": {{\n' + ",\n".join(chips) + "\n }\n}\n"
    RESOURCES.write_text(text)
