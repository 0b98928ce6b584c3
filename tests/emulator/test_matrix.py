# SPDX-License-Identifier: Apache-2.0
"""Matrix instructions: every shape and type, laid out by the rules of AMD's public matrix instruction calculator."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.emulator.assemble import assemble, device

_FP8 = {"gfx942": (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz), "gfx950": (torch.float8_e4m3fn, torch.float8_e5m2)}


def _shapes(arch: str) -> dict[str, tuple[int, int, int, str, str]]:
    """mnemonic: (M, K, blocks, type of A, type of B)."""
    out = {}
    for t in ("f16", "bf16"):
        out |= {f"f32_{s}_{t}": (m, k, b, t, t) for s, m, k, b in (
            ("32x32x4_2b", 32, 4, 2), ("16x16x4_4b", 16, 4, 4), ("4x4x4_16b", 4, 4, 16), ("32x32x8", 32, 8, 1), ("16x16x16", 16, 16, 1))}  # fmt: skip
        if arch == "gfx950":
            out |= {f"f32_32x32x16_{t}": (32, 16, 1, t, t), f"f32_16x16x32_{t}": (16, 32, 1, t, t)}
    out |= {f"f32_{s}_f32": (m, k, b, "f32", "f32") for s, m, k, b in (
        ("32x32x1_2b", 32, 1, 2), ("16x16x1_4b", 16, 1, 4), ("4x4x1_16b", 4, 1, 16), ("32x32x2", 32, 2, 1), ("16x16x4", 16, 4, 1))}  # fmt: skip
    out |= {f"i32_{s}_i8": (m, k, b, "i8", "i8") for s, m, k, b in (
        ("32x32x4_2b", 32, 4, 2), ("16x16x4_4b", 16, 4, 4), ("4x4x4_16b", 4, 4, 16), ("32x32x16", 32, 16, 1), ("16x16x32", 16, 32, 1))}  # fmt: skip
    for a in ("fp8", "bf8"):
        for b in ("fp8", "bf8"):
            out |= {f"f32_16x16x32_{a}_{b}": (16, 32, 1, a, b), f"f32_32x32x16_{a}_{b}": (32, 16, 1, a, b)}
    if arch == "gfx942":
        out |= {"f32_16x16x8_xf32": (16, 8, 1, "f32", "f32"), "f32_32x32x4_xf32": (32, 4, 1, "f32", "f32")}
    else:
        out |= {"i32_32x32x32_i8": (32, 32, 1, "i8", "i8"), "i32_16x16x64_i8": (16, 64, 1, "i8", "i8")}
    return out


def _torch_type(name: str, arch: str) -> torch.dtype:
    fp8, bf8 = _FP8[arch]
    return {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "i8": torch.int8, "fp8": fp8, "bf8": bf8}[name]


def _source_place(M: int, K: int, blocks: int, row: int, k: int, block: int) -> tuple[int, int]:
    """(lane, element within the lane) of A[row][k], and of B[k][row]: the calculator's rule."""
    lanes_along_k = 64 // M // blocks
    per_lane = K // lanes_along_k
    return row + M * (k // per_lane) + M * lanes_along_k * block, k % per_lane


def _result_place(M: int, blocks: int, row: int, column: int, block: int) -> tuple[int, int]:
    """(lane, register) of D[row][column]: the calculator's rule."""
    if M == 4:
        return column + 4 * block, row
    groups = 64 // M
    return column + M * (row // 4 % groups), 4 * (row // (4 * groups)) + row % 4 + M * M // 64 * block


def _pack(values: torch.Tensor, M: int, K: int, blocks: int, dtype: torch.dtype) -> np.ndarray:
    """[blocks, M, K] to dwords per lane, [64, 16]."""
    n = max(4 // dtype.itemsize, K // (64 // M // blocks))
    lanes = torch.zeros(64, n, dtype=torch.float32)
    for block in range(blocks):
        for row in range(M):
            for k in range(K):
                lane, element = _source_place(M, K, blocks, row, k, block)
                lanes[lane, element] = values[block, row, k]
    raw = lanes.to(dtype).view(torch.uint8).numpy().view(np.uint32)
    return np.pad(raw, ((0, 0), (0, 16 - raw.shape[1])))


def _body(mnemonic: str, a: int, b: int, results: int, agprs: bool) -> str:
    loads = "".join(f"\tglobal_load_dwordx4 v[{4 + 4 * i}:{7 + 4 * i}], v1, s[4:5] offset:{16 * i}\n" for i in range(16))
    d = f"v[36:{35 + results}]"
    move = "".join(f"\tv_accvgpr_write_b32 a{i}, v{36 + i}\n" for i in range(results)) if agprs else ""
    back = "".join(f"\tv_accvgpr_read_b32 v{36 + i}, a{i}\n" for i in range(results)) if agprs else ""
    acc = f"a[0:{results - 1}]" if agprs else d
    multiply = f"\tv_mfma_{mnemonic} {acc}, v[4:{3 + a}], v[20:{19 + b}], {acc}\n".replace("v[4:4]", "v4").replace(
        "v[20:20]", "v20"
    )
    stores = "".join(f"\tglobal_store_dwordx4 v2, v[{36 + 4 * i}:{39 + 4 * i}], s[6:7] offset:{16 * i}\n" for i in range(8))
    head = "\ts_load_dwordx4 s[4:7], s[0:1], 0x0\n\tv_lshlrev_b32_e32 v1, 8, v0\n\tv_lshlrev_b32_e32 v2, 7, v0\n\ts_waitcnt lgkmcnt(0)\n"
    return head + loads + "\ts_waitcnt vmcnt(0)\n" + move + multiply + "\ts_nop 15\n" + back + stores


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def programs(request):
    arch = request.param
    bodies = {}
    for i, (name, (M, K, blocks, ta, tb)) in enumerate(_shapes(arch).items()):
        per_lane = K // (64 // M // blocks)
        a, b = (max(1, per_lane * _torch_type(t, arch).itemsize // 4) for t in (ta, tb))
        bodies[f"case_{i}"] = _body(name, a, b, M * M * blocks // 64, agprs=i % 2 == 1)
    return arch, device(arch, undefined=False), assemble(arch, bodies)


@pytest.mark.parametrize("index", range(max(len(_shapes(a)) for a in _FP8)))
def test_layout(programs, index):
    arch, target, (code, text) = programs
    if index >= len(_shapes(arch)):
        return
    name, (M, K, blocks, ta, tb) = list(_shapes(arch).items())[index]
    torch.manual_seed(index)
    a, b = (torch.randint(-4, 5, (blocks, M, K)).float() for _ in range(2))
    c = torch.randint(-9, 9, (blocks, M, M)).float()
    results = M * M * blocks // 64
    packed_c = np.zeros((64, 32), np.uint32)
    dtype = np.int32 if name.startswith("i32") else np.float32
    for block, row, column in np.ndindex(blocks, M, M):
        lane, register = _result_place(M, blocks, row, column, block)
        packed_c[lane, register] = np.array(float(c[block, row, column]), dtype).view(np.uint32)
    data = np.concatenate(
        [_pack(a, M, K, blocks, _torch_type(ta, arch)), _pack(b, M, K, blocks, _torch_type(tb, arch)), packed_c], 1
    )
    out = torch.zeros(64, 32, dtype=torch.int32)
    target.load(code, text, f"case_{index}").launch([1], [64], [torch.from_numpy(data.view(np.int32)), out])
    expected = c + a @ b.transpose(1, 2)
    got = out.numpy().view(dtype)
    assert results == len({_result_place(M, blocks, r, 0, k)[1] for k in range(blocks) for r in range(M)})
    for block, row, column in np.ndindex(blocks, M, M):
        lane, register = _result_place(M, blocks, row, column, block)
        assert got[lane, register] == expected[block, row, column], f"{name}: D[{row}][{column}] of block {block}"


def test_known_entries():
    """Entries as the calculator prints them."""
    assert _result_place(32, 1, 13, 5, 0) == (37, 5)
    assert _result_place(16, 1, 6, 3, 0) == (19, 2)
    assert _source_place(32, 8, 1, 7, 6, 0) == (39, 2)
    assert _source_place(16, 16, 1, 2, 9, 0) == (34, 1)


def test_unknown_modifier_is_refused():
    code, text = assemble(
        "gfx942", {"k": _body("f32_16x16x16_f16", 2, 2, 4, False).replace("v[36:39]\n", "v[36:39] blgp:1\n", 1)}
    )
    with pytest.raises(RuntimeError, match="modifier blgp is not known"):
        device("gfx942").load(code, text, "k")


@pytest.mark.parametrize(
    ("modifiers", "bytes_chosen"),
    [("", (0, 0)), ("op_sel_hi:[0,0,0]", (0, 0)), ("op_sel_hi:[1,1,0]", (2, 2)), ("op_sel:[0,1,0] op_sel_hi:[1,0,0]", (2, 1))],
)
def test_scale_byte(modifiers, bytes_chosen):
    """Unlike in packed math, an omitted op_sel_hi means zeros."""
    name = "v_mfma_scale_f32_16x16x128_f8f6f4"
    body = _body("f32_16x16x16_f16", 2, 2, 4, False)
    one = re.search(r".*v_mfma.*\n", body).group()
    ones = "".join(f"\tv_mov_b32_e32 v{4 + i}, 0x38383838\n" for i in range(16))
    scales = "\tv_mov_b32_e32 v20, 0x8a87837f\n\tv_mov_b32_e32 v21, 0x7e7d7c7b\n"
    product = f"\t{name} v[36:39], v[4:11], v[12:19], 0, v20, v21 {modifiers}\n"
    code, text = assemble("gfx950", {"k": body.replace(one, ones + scales + product)})
    out = torch.zeros(64, 32, dtype=torch.int32)
    device("gfx950", undefined=False).load(code, text, "k").launch([1], [64], [torch.zeros(64, 64, dtype=torch.int32), out])
    a, b = (0, 4, 8, 11)[bytes_chosen[0]], (-4, -3, -2, -1)[bytes_chosen[1]]
    assert (out[:, :4].contiguous().view(torch.float32) == 128 * 2.0 ** (a + b)).all()
