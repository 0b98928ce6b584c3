# SPDX-License-Identifier: Apache-2.0
"""Assembly text to instructions: golden lines, labels, the three sources of text."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from rocm_infer.emulator.decoder import LITERAL, OFF, SCALAR, VECTOR, decode, parse_line
from tests.emulator.assemble import assemble, compile_hip
from tests.emulator.test_hip import _KERNELS


def _reg(kind: int, first: int, count: int = 1, signs: int = 0) -> tuple:
    return kind, first, count, signs, None


def _int(value: int) -> tuple:
    return LITERAL, 0, 0, 0, (value & (1 << 64) - 1, value & 0xFFFFFFFF, value & 0xFFFF, False)


GOLDEN = {
    "v_add_f32_e32 v6, v6, v7": ("v_add_f32", [_reg(VECTOR, 6), _reg(VECTOR, 6), _reg(VECTOR, 7)], {}),
    "v_fma_f32 v26, -v23, |v24|, -|s3|": ("v_fma_f32", [_reg(VECTOR, 26), _reg(VECTOR, 23, 1, 1), _reg(VECTOR, 24, 1, 2), _reg(SCALAR, 3, 1, 3)], {}),
    "v_cndmask_b32_e32 v10, v9, v6, vcc": ("v_cndmask_b32", [_reg(VECTOR, 10), _reg(VECTOR, 9), _reg(VECTOR, 6), _reg(SCALAR, 106, 2)], {}),
    "s_mov_b64 exec, -1": ("s_mov_b64", [_reg(SCALAR, 126, 2), _int(-1)], {}),
    "s_and_b32 s11, s10, 0xc0": ("s_and_b32", [_reg(SCALAR, 11), _reg(SCALAR, 10), _int(0xC0)], {}),
    "v_pk_mul_f32 v[2:3], v[0:1], v[2:3] op_sel_hi:[0,1]": ("v_pk_mul_f32", [_reg(VECTOR, 2, 2), _reg(VECTOR, 0, 2), _reg(VECTOR, 2, 2)], {"op_sel_hi": [0, 1]}),
    "buffer_load_ushort v2, v10, s[12:15], 0 offen offset:16": ("buffer_load_ushort", [_reg(VECTOR, 2), _reg(VECTOR, 10), _reg(SCALAR, 12, 4), _int(0)], {"offen": True, "offset": 16}),
    "global_store_dwordx4 v[0:1], v[4:7], off offset:-64 sc0 sc1": ("global_store_dwordx4", [_reg(VECTOR, 0, 2), _reg(VECTOR, 4, 4), (OFF, 0, 0, 0, None)], {"offset": -64, "sc0": True, "sc1": True}),
    "v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]": ("v_mfma_f32_32x32x8_bf16", [_reg(VECTOR, 256, 16), _reg(VECTOR, 0, 2), _reg(VECTOR, 2, 2), _reg(VECTOR, 256, 16)], {}),
    "ds_read2st64_b32 v[0:1], v13 offset1:1": ("ds_read2st64_b32", [_reg(VECTOR, 0, 2), _reg(VECTOR, 13)], {"offset1": 1}),
    "v_and_b32_sdwa v1, v2, sext(v3) dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_2 src1_sel:DWORD": ("v_and_b32", [_reg(VECTOR, 1), _reg(VECTOR, 2), _reg(VECTOR, 3, 1, 4)], {"dst_sel": 5, "dst_unused": 2, "src0_sel": 2, "src1_sel": 6}),
    "v_mul_f32_e64 v1, v2, v3 clamp mul:4": ("v_mul_f32", [_reg(VECTOR, 1), _reg(VECTOR, 2), _reg(VECTOR, 3)], {"clamp": True, "omod": 4.0}),
    "s_waitcnt vmcnt(0) lgkmcnt(0)": ("s_waitcnt", [], {}),
    "buffer_wbl2 sc1": ("buffer_wbl2", [], {"sc1": True}),
    "scratch_store_dword off, v1, s32 offset:4": ("scratch_store_dword", [(OFF, 0, 0, 0, None), _reg(VECTOR, 1), _reg(SCALAR, 32)], {"offset": 4}),
}  # fmt: skip


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_lines(text):
    line = parse_line(text)
    assert (line.mnemonic, line.operands, line.modifiers) == GOLDEN[text]


@pytest.mark.parametrize(("text", "bits"), [
    ("v_mul_f32_e32 v0, 0.15915494, v1", (0x3FC45F306DC9C882, 0x3E22F983, 0x3118, True)),
    ("v_mul_f32_e32 v0, -4.0, v1", (0xC010000000000000, 0xC0800000, 0xC400, True)),
    ("v_mul_f64 v[0:1], 0x3fe00000, v[2:3]", (0x3FE0000000000000, 0x3FE00000, 0, False)),
    ("v_and_b32_e32 v0, -16, v1", (0xFFFFFFFFFFFFFFF0, 0xFFFFFFF0, 0xFFF0, False)),
    ("s_and_b64 s[0:1], 0xffffffff, s[2:3]", (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFF, False)),
])  # fmt: skip
def test_constants_by_operand_type(text, bits):
    literal = next(o for o in parse_line(text).operands if o[0] == LITERAL)
    assert literal[4] == bits


def test_dpp_controls():
    lanes = parse_line("v_mov_b32_dpp v0, v1 row_shr:8 row_mask:0xa bank_mask:0x3 bound_ctrl:1").modifiers["dpp"]
    assert lanes[0][:10] == [-1] * 8 + [0, 1]
    assert lanes[1] == sum(0xFF << 16 * row for row in (1, 3))
    assert lanes[2] is True
    assert parse_line("v_mov_b32_dpp v0, v1 quad_perm:[2,3,0,1] row_mask:0xf bank_mask:0xf").modifiers["dpp"][0][:4] == [
        2,
        3,
        0,
        1,
    ]


SWIZZLES = ("SWAP,16", "REVERSE,8", "BROADCAST,8,5", 'BITMASK_PERM, "01pi0"', "QUAD_PERM,2,3,0,1")


@pytest.mark.parametrize("mode", SWIZZLES)
def test_swizzles_are_the_assemblers(mode):
    text = f"ds_swizzle_b32 v1, v2 offset:swizzle({mode})"
    offset = parse_line(text).modifiers["offset"]
    assert assemble("gfx942", {"k": text})[0] == assemble("gfx942", {"k": f"ds_swizzle_b32 v1, v2 offset:{offset}"})[0]


def test_labels_and_preload():
    text = "k:\n\ts_load_dword s0, s[0:1], 0x0\n\ts_branch .LBB0_0\n\t.p2align 8\n.LBB0_0:\n\ts_cbranch_scc1 .LBB0_0\n\ts_endpgm\n.Lfunc_end0:\n\tjunk\n"
    assert [(i[0], i[4]) for i in decode(text, "k")] == [
        ("s_load_dword", -1),
        ("s_branch", 2),
        ("s_cbranch_scc1", 2),
        ("s_endpgm", -1),
    ]
    assert [(i[0], i[4]) for i in decode(text, "k", preload=True)] == [("s_cbranch_scc1", 0), ("s_endpgm", -1)]


_OBJDUMP = """
k.co:\tfile format elf64-amdgpu

Disassembly of section .text:

0000000000001900 <k>:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0                         // 000000001900: C0060080 00000000
\ts_cmp_lt_i32 s2, 5                                         // 000000001908: BF048502
\ts_cbranch_scc1 65534                                       // 00000000190C: BF85FFFE <k+0x8>
\ts_branch 0                                                 // 000000001910: BF820000 <L1>

0000000000001914 <L1>:
\ts_endpgm                                                   // 000000001914: BF810000
"""


def test_objdump_text_gives_the_same_program():
    text = "k:\n\ts_load_dwordx2 s[2:3], s[0:1], 0x0\n.L0:\n\ts_cmp_lt_i32 s2, 5\n\ts_cbranch_scc1 .L0\n\ts_branch .L1\n.L1:\n\ts_endpgm\n"
    listing = _OBJDUMP.replace("<L1>\n\n", "<k+0x14>\n\n")
    strip = [(i[0], i[2], i[3], i[4]) for i in decode(text, "k")]
    assert strip == [(i[0], i[2], i[3], i[4]) for i in decode(listing, "k")]


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_real_objdump(arch, tmp_path):
    """With an llvm-objdump that knows the architecture: every test kernel decodes to the same program from both texts."""
    tool = next((t for t in ("/opt/rocm/llvm/bin/llvm-objdump", "llvm-objdump") if shutil.which(t)), None)
    known = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout if tool else ""
    version = next((int(w.split(".")[0]) for w in known.split() if w[:2].isdigit()), 0)
    if "amdgcn" not in known or version < 19:
        pytest.skip("no llvm-objdump 19 or newer with AMDGPU")
    code, text = compile_hip(arch, _KERNELS)
    (tmp_path / "k.co").write_bytes(code)
    listing = subprocess.run(
        [tool, "-d", f"--mcpu={arch}", str(tmp_path / "k.co")], capture_output=True, text=True, check=True
    ).stdout
    for kernel in ("block_sum", "atomics", "math", "ballots"):
        assert [i[:1] + i[2:] for i in decode(listing, kernel)] == [i[:1] + i[2:] for i in decode(text, kernel)]
