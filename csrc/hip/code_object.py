# SPDX-License-Identifier: Apache-2.0
"""Compile one kernel file to an AMD code object, and write down what its kernels need of the chip.

Used by CMake, once per file and chip. Three steps (compile to assembly, assemble, link), because the one-step driver of the
`ziglang` wheel cannot start its linker. The assembly text stays: it is what a disassembler would print.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

# Metadata of the code object, and two figures that the compiler only writes as comments.
METADATA = {
    "vgpr": r"\.vgpr_count:\s+(\d+)",
    "agpr": r"\.agpr_count:\s+(\d+)",
    "sgpr": r"\.sgpr_count:\s+(\d+)",
    "lds_bytes": r"\.group_segment_fixed_size:\s+(\d+)",
    "scratch_bytes": r"\.private_segment_fixed_size:\s+(\d+)",
    "vgpr_spills": r"\.vgpr_spill_count:\s+(\d+)",
    "sgpr_spills": r"\.sgpr_spill_count:\s+(\d+)",
    "params_bytes": r"\.kernarg_segment_size:\s+(\d+)",
    "max_threads": r"\.max_flat_workgroup_size:\s+(\d+)",
}


def resources(assembly: str) -> dict[str, dict[str, int]]:
    """Figures of each kernel by its symbol, from the assembly text."""
    block = assembly.split(".amdgpu_metadata")[1].split(".end_amdgpu_metadata")[0]
    kernels = block.split("amdhsa.kernels:")[1].split("amdhsa.target:")[0]
    occupancy = dict(re.findall(r"^(\w+):\s*; @\w+.*?^; Occupancy: (\d+)", assembly, re.MULTILINE | re.DOTALL))
    found = {}
    for entry in re.split(r"^  - ", kernels, flags=re.MULTILINE)[1:]:
        symbol = re.search(r"\.symbol:\s+'?([\w.]+)\.kd", entry)
        assert symbol is not None, f"metadata without a symbol: {entry[:200]}"
        name = symbol.group(1)
        figures = {key: int(match.group(1)) for key, pattern in METADATA.items() if (match := re.search(pattern, entry))}
        found[name] = figures | {"occupancy": int(occupancy.get(name, 0))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, help="the .co; .s, .json and .d are written beside it")
    parser.add_argument("--gfx", required=True)
    parser.add_argument("--clang", nargs="+", required=True, help="command of a clang with AMDGPU")
    parser.add_argument("--lld", nargs="+", required=True, help="command of ld.lld")
    parser.add_argument("--rocm-headers", type=Path, help="also check against this folder's hip/hip_runtime.h")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    assembly, object_file = args.output.with_suffix(".s"), args.output.with_suffix(".o")
    device_only = ["-x", "hip", "-std=c++20", f"--offload-arch={args.gfx}", "-nogpuinc", "-nogpulib", "--cuda-device-only"]
    compile_to = [
        *args.clang,
        *device_only,
        "--no-gpu-bundle-output",
        "-O3",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-S",
        str(args.source),
    ]
    # -MD is ignored when only the device is compiled.
    depfile = [
        "-Xclang",
        "-dependency-file",
        "-Xclang",
        str(args.output.with_suffix(".d")),
        "-Xclang",
        "-MT",
        "-Xclang",
        str(args.output),
    ]
    subprocess.run([*compile_to, *depfile, "-o", str(assembly)], check=True)
    if args.rocm_headers:
        real = ["-DGRID_USE_ROCM_HEADERS", "-isystem", str(args.rocm_headers), "-fsyntax-only"]
        subprocess.run([*args.clang, *device_only, "-Wall", "-Wextra", "-Werror", *real, str(args.source)], check=True)
    assemble = ["-target", "amdgcn-amd-amdhsa", f"-mcpu={args.gfx}", "-c", "-x", "assembler"]
    subprocess.run([*args.clang, *assemble, str(assembly), "-o", str(object_file)], check=True)
    subprocess.run([*args.lld, "-shared", str(object_file), "-o", str(args.output)], check=True)
    object_file.unlink()
    args.output.with_suffix(".json").write_text(json.dumps(resources(assembly.read_text()), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
