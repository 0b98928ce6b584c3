# SPDX-License-Identifier: Apache-2.0
"""Build and install the package with its HIP kernels, on any machine.

python setup_rocm.py build      kernel libraries in build/hip: host, AMD machine code, CUDA where there is an NVIDIA GPU
python setup_rocm.py install    the same, then installs the package with them inside
python setup_rocm.py wheel      the same, then a wheel in dist/ that needs no compiler where it is installed

AMDGPU_TARGET=gfx942,gfx950 chooses the chips; else the AMD GPU present; else all that are supported.
REQUIRE=hip makes missing AMD machine code an error. REQUIRE=cuda builds the CUDA library without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from rocm_infer.hip.build import ROOT, BuildError, build, find_tools, visible_targets, write_resources

PACKAGED = ROOT / "rocm_infer" / "hip" / "lib"


def build_all(jobs: int) -> Path:
    """Everything this machine can build; says what that is, and what is missing."""
    tools, targets, required = find_tools(), visible_targets(), os.environ.get("REQUIRE", "")
    print(f"tools found\n{tools}")
    goals, parts = ["host", "bind"], ["host kernels"]
    if tools.clang:
        goals.append("code_objects")
        parts.append(f"AMD machine code for {', '.join(targets)}")
    elif required == "hip":
        raise BuildError("REQUIRE=hip: no clang with AMDGPU was found: pip install ziglang")
    if tools.nvcc and (shutil.which("nvidia-smi") or required == "cuda"):
        goals.append("cuda")
        parts.append("CUDA kernels, for development")
    print(f"building: {'; '.join(parts)}")
    return build(tuple(goals), targets=targets, jobs=jobs, tools=tools)


def package(folder: Path) -> None:
    """Copy what runs, and nothing that only the build needs, into the package."""
    shutil.rmtree(PACKAGED, ignore_errors=True)
    PACKAGED.mkdir(parents=True)
    for file in [*folder.glob("*.so"), *folder.glob("code_objects/*/*.co")]:
        place = PACKAGED / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)


def make_wheel() -> Path:
    """A wheel of the package with its libraries. They hold for this Python and this kind of machine, and its name says so."""
    place = ROOT / "dist"
    shutil.rmtree(place, ignore_errors=True)
    options = [f"--python-tag=cp{sys.version_info.major}{sys.version_info.minor}", f"--plat-name={sysconfig.get_platform()}"]
    tags = [f"--config-settings=--build-option={option}" for option in options]
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", *tags, "-w", str(place), str(ROOT)]
    subprocess.run(pip, check=True)
    return next(place.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "install", "wheel"))
    parser.add_argument("--inplace", action="store_true", help="with build: also put the libraries into the checkout's package")
    parser.add_argument(
        "--update-resources", action="store_true", help="write what the kernels need to csrc/hip/resources.json"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    try:
        folder = build_all(args.jobs)
    except BuildError as error:
        sys.exit(f"setup_rocm.py: {error}")
    print(f"built: {folder}")
    if args.update_resources:
        write_resources(folder, find_tools())
    if args.command == "build" and not args.inplace:
        return
    package(folder)
    if args.command == "build":
        return
    try:
        wheel = make_wheel()
    finally:
        shutil.rmtree(PACKAGED)
    print(f"made: {wheel}")
    if args.command == "install":
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", str(wheel)], check=True)


if __name__ == "__main__":
    main()
