# SPDX-License-Identifier: Apache-2.0
"""Single instructions as kernels: wraps lines of AMD assembly, assembles them with clang, runs them in the emulator.

A wrapped kernel gets v[8:23] and s[8:23] filled from its workgroup's 16 dwords per lane (scalars: of lane 0), v[24:39] with the
same values once more, vcc = s[20:21]; afterwards v[24:39], then s[24:31], vcc and scc are stored, 32 dwords per lane in all.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from rocm_infer.emulator.device import Checks, Device, LoadedKernel
from rocm_infer.hip.build import find_tools

_LOAD = """
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 6, v0
	s_lshl_b32 s3, s2, 12
	v_add_u32_e32 v1, s3, v1
	v_lshlrev_b32_e32 v2, 7, v0
	s_lshl_b32 s3, s2, 13
	v_add_u32_e32 v2, s3, v2
	s_waitcnt lgkmcnt(0)
"""
_HEAD = _LOAD + "".join(
    f"\tglobal_load_dwordx4 v[{8 + 4 * i}:{11 + 4 * i}], v1, s[4:5] offset:{16 * i}\n"
    f"\tglobal_load_dwordx4 v[{24 + 4 * i}:{27 + 4 * i}], v1, s[4:5] offset:{16 * i}\n"
    for i in range(4)
) + "\ts_waitcnt vmcnt(0)\n" + "".join(f"\tv_readfirstlane_b32 s{8 + i}, v{8 + i}\n\tv_readfirstlane_b32 s{24 + i}, v{8 + i}\n" for i in range(16)) + "\ts_mov_b64 vcc, s[20:21]\n\ts_cmp_eq_u32 s8, s8\n"  # fmt: skip
_TAIL = (
    "\ts_cselect_b32 s34, 1, 0\n\ts_mov_b64 exec, -1\n"
    + "".join(f"\tglobal_store_dwordx4 v2, v[{24 + 4 * i}:{27 + 4 * i}], s[6:7] offset:{16 * i}\n" for i in range(4))
    + "".join(f"\tv_mov_b32_e32 v{24 + i}, s{24 + i}\n" for i in range(8))
    + "\tv_mov_b32_e32 v32, vcc_lo\n\tv_mov_b32_e32 v33, vcc_hi\n\tv_mov_b32_e32 v34, s34\n\tv_mov_b32_e32 v35, 0\n"
    + "".join(f"\tglobal_store_dwordx4 v2, v[{24 + 4 * i}:{27 + 4 * i}], s[6:7] offset:{64 + 16 * i}\n" for i in range(4))
)
_KERNEL = """
	.globl {name}
	.p2align 8
	.type {name},@function
{name}:
{body}
	s_endpgm
.Lfunc_end_{name}:
	.size {name}, .Lfunc_end_{name}-{name}
	.section .rodata,"a",@progbits
	.p2align 6, 0x0
	.amdhsa_kernel {name}
		.amdhsa_group_segment_fixed_size {lds}
		.amdhsa_kernarg_size 16
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_next_free_vgpr 256
		.amdhsa_next_free_sgpr 96
		.amdhsa_accum_offset 128
		.amdhsa_float_denorm_mode_32 3
	.end_amdhsa_kernel
	.text
"""
_METADATA = """  - .args:
      - {{.address_space: global, .offset: 0, .size: 8, .value_kind: global_buffer}}
      - {{.address_space: global, .offset: 8, .size: 8, .value_kind: global_buffer}}
    .group_segment_fixed_size: {lds}
    .kernarg_segment_align: 8
    .kernarg_segment_size: 16
    .max_flat_workgroup_size: 1024
    .name: {name}
    .private_segment_fixed_size: 0
    .sgpr_count: 96
    .symbol: {name}.kd
    .vgpr_count: 128
    .agpr_count: 128
    .wavefront_size: 64
"""


def _link(arch: str, text: str) -> bytes:
    tools = find_tools()
    with tempfile.TemporaryDirectory() as folder:
        source, obj, out = (os.path.join(folder, n) for n in ("k.s", "k.o", "k.co"))
        Path(source).write_text(text)
        assemble = [*tools.clang, "-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", "-x", "assembler", source, "-o", obj]
        done = subprocess.run(assemble, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        subprocess.run([*tools.lld, "-shared", obj, "-o", out], check=True)
        return Path(out).read_bytes()


def assemble(arch: str, bodies: dict[str, str], lds: int = 0) -> tuple[bytes, str]:
    """(code object, assembly text) of kernels given by name; each body is all of its code but s_endpgm."""
    text = f'\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n\t.text\n'
    text += "".join(_KERNEL.format(name=n, body=b, lds=lds) for n, b in bodies.items())
    text += "\t.amdgpu_metadata\n---\namdhsa.version: [1, 2]\n" + f"amdhsa.target: amdgcn-amd-amdhsa--{arch}\namdhsa.kernels:\n"
    text += "".join(_METADATA.format(name=n, lds=lds) for n in bodies) + "...\n\t.end_amdgpu_metadata\n"
    return _link(arch, text), text


@functools.cache
def compile_hip(arch: str, source: str) -> tuple[bytes, str]:
    """(code object, assembly text) of HIP source that includes nothing."""
    tools = find_tools()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "k.hip")
        Path(path).write_text(source)
        command = [*tools.clang, "-x", "hip", "-std=c++20", f"--offload-arch={arch}", "-nogpuinc", "-nogpulib", "--cuda-device-only",
                   "--no-gpu-bundle-output", "-O3", "-S", "-o", "-", path]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
    return _link(arch, done.stdout), done.stdout


def wrap(code: str) -> str:
    return _HEAD + "".join(f"\t{line.strip()}\n" for line in code.strip().splitlines()) + _TAIL


class Result:
    """What one wrapped kernel left: arrays over workgroups (and lanes)."""

    def __init__(self, out: torch.Tensor) -> None:
        self.raw = out.numpy().view(np.uint32)

    def v(self, register: int, dtype: type = np.uint32) -> np.ndarray:
        """v24 and up, [workgroups, lanes]; 64-bit types take a register pair."""
        n = np.dtype(dtype).itemsize // 4
        start = register - 24
        return np.ascontiguousarray(self.raw[:, :, start : start + n]).view(dtype)[..., 0]

    def s(self, register: int | str) -> np.ndarray:
        """s24 to s31, "vcc_lo", "vcc_hi" or "scc", [workgroups]."""
        at = {"vcc_lo": 24, "vcc_hi": 25, "scc": 26}.get(register, register - 8 if isinstance(register, int) else None)
        return self.raw[:, 0, at]

    def s64(self, register: int | str) -> np.ndarray:
        low = {"vcc": 24}.get(register, register - 8 if isinstance(register, int) else None)
        return self.raw[:, 0, low].astype(np.uint64) | self.raw[:, 0, low + 1].astype(np.uint64) << np.uint64(32)


def run_wrapped(loaded: LoadedKernel, data: np.ndarray) -> Result:
    """data: [workgroups, 64, 16] dwords."""
    given = torch.from_numpy(np.ascontiguousarray(data).view(np.int32))
    out = torch.zeros(data.shape[0], 64, 32, dtype=torch.int32)
    loaded.launch([data.shape[0]], [64], [given, out])
    return Result(out)


def device(arch: str, **checks: bool) -> Device:
    return Device(arch, checks=Checks(**checks), threads=1)
