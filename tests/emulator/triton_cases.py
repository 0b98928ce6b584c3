# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compiled to AMD code and run by the emulator, against torch.

Run by test_triton.py in a process of its own: the other tests interpret Triton kernels, and Triton knows one mode per process.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

from rocm_infer.emulator.device import Checks
from rocm_infer.emulator.triton_driver import emulated

ARCHS = os.environ.get("EMULATE", "gfx942,gfx950").split(",")


@pytest.fixture(params=ARCHS)
def device(request):
    torch.manual_seed(0)
    with emulated(request.param, checks=Checks(bank_conflicts=True), threads=1) as device:
        yield device


@triton.jit
def rms_norm_kernel(x, w, y, C, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    m = c < C
    v = tl.load(x + row * C + c, mask=m, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v) / C + eps)
    tl.store(y + row * C + c, (v * scale * tl.load(w + c, mask=m, other=0.0).to(tl.float32)).to(y.dtype.element_ty), mask=m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("C", [64, 1000])
def test_rms_norm(device, dtype, C):
    x, w = torch.randn(3, C).to(dtype), torch.randn(C).to(dtype)
    y = torch.full_like(x, float("nan"))
    rms_norm_kernel[(3,)](x, w, y, C, 1e-6, BLOCK=triton.next_power_of_2(C))
    expected = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * w.float()
    torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2, atol=1e-3)


@triton.jit
def unary_kernel(x, y, N, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < N, other=0.0)
    if F == "silu":
        r = v / (1 + tl.exp(-v))
    elif F == "sin":
        r = tl.sin(v)
    elif F == "cos":
        r = tl.cos(v)
    elif F == "log":
        r = tl.log(tl.abs(v) + 1e-3)
    elif F == "sqrt":
        r = tl.sqrt(tl.abs(v))
    elif F == "erf":
        r = tl.erf(v)
    elif F == "floor":
        r = tl.floor(v) + tl.ceil(v)
    else:
        r = tl.div_rn(v, v * v + 1)
    tl.store(y + i, r, mask=i < N)


_UNARY = {
    "silu": torch.nn.functional.silu, "sin": torch.sin, "cos": torch.cos, "log": lambda v: torch.log(v.abs() + 1e-3),
    "sqrt": lambda v: v.abs().sqrt(), "erf": torch.erf, "floor": lambda v: v.floor() + v.ceil(), "div": lambda v: v / (v * v + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", _UNARY)
def test_unary(device, name):
    x = torch.randn(300) * 10
    y = torch.empty_like(x)
    unary_kernel[(3,)](x, y, 300, F=name, BLOCK=128)
    torch.testing.assert_close(y, _UNARY[name](x), rtol=1e-5, atol=2e-6)


@triton.jit
def gemm_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=c.dtype.element_ty)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :], mask=(rm[:, None] < M) & ((k + rk)[None, :] < K), other=0.0)
        w = tl.load(b + rn[None, :] * K + (k + rk)[:, None], mask=(rn[None, :] < N) & ((k + rk)[:, None] < K), other=0.0)
        acc = tl.dot(x, w, acc, out_dtype=c.dtype.element_ty)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def gemm_kn_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :])
        w = tl.load(b + (k + rk)[:, None] * N + rn[None, :])
        acc = tl.dot(x, w, acc)
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty))


def _random(shape, dtype, arch):
    if dtype == "fp8":
        return torch.randn(shape).to(torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn)
    if dtype == "bf8":
        return torch.randn(shape).to(torch.float8_e5m2fnuz if arch == "gfx942" else torch.float8_e5m2)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    return torch.randn(shape).to(dtype)


_TILES = (((16, 16, 64), 16), ((64, 32, 64), 16), ((64, 64, 64), 32))


@pytest.mark.parametrize(
    ("dtype", "tile", "nonkdim"),
    [
        *((torch.bfloat16, *t) for t in _TILES),
        *((t, *_TILES[0]) for t in (torch.float16, torch.float32, "fp8", "bf8")),
        *((t, *_TILES[2]) for t in (torch.float32, torch.int8, "fp8")),
    ],
)
def test_gemm(device, dtype, tile, nonkdim):
    M, N, K = tile[0] + 5, tile[1] - 3, 160
    a, b = _random((M, K), dtype, device.arch), _random((N, K), dtype, device.arch)
    c = torch.zeros(M, N, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    grid = (triton.cdiv(M, tile[0]), triton.cdiv(N, tile[1]))
    gemm_kernel[grid](a, b, c, M, N, K, BM=tile[0], BN=tile[1], BK=tile[2], matrix_instr_nonkdim=nonkdim)
    expected = a.double() @ b.double().T
    torch.testing.assert_close(c.double(), expected, rtol=2e-2, atol=0.05 if dtype == torch.float32 else 1e-3)
    assert device.launches[-1].counters["mfma_flops"] >= 2 * M * N * K


@pytest.mark.parametrize(("warps", "stages"), [(1, 1), (4, 2), (8, 3)])
def test_gemm_transposed(device, warps, stages):
    """B is read along N, so gfx950 uses its transposing LDS reads and pipelined loads to LDS."""
    a, b = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    c = torch.empty(64, 64, dtype=torch.bfloat16)
    gemm_kn_kernel[(1, 1)](a, b, c, 64, 64, 256, BM=64, BN=64, BK=64, num_warps=warps, num_stages=stages)
    torch.testing.assert_close(c, (a.float() @ b.float()).bfloat16(), rtol=1e-2, atol=1e-2)


@triton.jit
def attention_kernel(q, k, v, o, L, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    x = tl.load(q + rm[:, None] * D + rd[None, :], mask=rm[:, None] < L, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum(L, (tl.program_id(0) + 1) * BM), BN):
        rn = start + tl.arange(0, BN)
        kt = tl.load(k + rn[None, :] * D + rd[:, None], mask=rn[None, :] < L, other=0.0)
        s = tl.dot(x, kt) * scale
        s = tl.where((rn[None, :] <= rm[:, None]) & (rn[None, :] < L), s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2((s - new[:, None]) * 1.44269504)
        old = tl.exp2((top - new) * 1.44269504)
        total = total * old + tl.sum(p, 1)
        w = tl.load(v + rn[:, None] * D + rd[None, :], mask=rn[:, None] < L, other=0.0)
        acc = tl.dot(p.to(w.dtype), w, acc * old[:, None])
        top = new
    tl.store(o + rm[:, None] * D + rd[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=rm[:, None] < L)


@pytest.mark.parametrize(("D", "L"), [(64, 100), (128, 77)])
def test_attention(device, D, L):
    q, k, v = (torch.randn(L, D).bfloat16() for _ in range(3))
    o = torch.empty_like(q)
    attention_kernel[(triton.cdiv(L, 64),)](q, k, v, o, L, D**-0.5, D=D, BM=64, BN=32)
    s = (q.float() @ k.float().T) * D**-0.5
    s = s.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -float("inf"))
    torch.testing.assert_close(o.float(), s.softmax(-1) @ v.float(), rtol=2e-2, atol=2e-2)


@triton.jit
def quant_kernel(x, y, s, C: tl.constexpr, TOP: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, C)
    v = tl.load(x + row * C + c).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(v)), 1e-10) / TOP
    tl.store(s + row, scale)
    tl.store(y + row * C + c, (v / scale).to(y.dtype.element_ty))


@pytest.mark.parametrize("kind", ["fp8", "bf8"])
def test_quant_fp8(device, kind):
    x = torch.randn(4, 128).bfloat16()
    y, s = _random((4, 128), kind, device.arch), torch.zeros(4)
    quant_kernel[(4,)](x, y, s, C=128, TOP=torch.finfo(y.dtype).max)
    expected = x.float().abs().amax(-1) / torch.finfo(y.dtype).max
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(y.float(), (x.float() / expected[:, None]).to(y.dtype).float(), rtol=0.13, atol=1e-3)


@triton.jit
def cast_kernel(x, y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N).to(y.dtype.element_ty), mask=i < N)


@pytest.mark.parametrize("kind", ["fp8", "bf8"])
def test_all_fp8_codes(device, kind):
    x = torch.arange(256, dtype=torch.uint8).view(_random((1,), kind, device.arch).dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = torch.empty(256, dtype=dtype)
        cast_kernel[(1,)](x, y, 256, BLOCK=256)
        torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.int64)


@pytest.mark.parametrize(("source", "target"), [(_TYPES[i], _TYPES[(i + step) % 6]) for i in range(6) for step in (1, 3)])
def test_casts(device, source, target):
    x = torch.tensor([0, 1, -1, 2, 3, 7, 100, -100, 42, 127, -128] * 8).to(source)
    y = torch.empty(x.numel(), dtype=target)
    cast_kernel[(1,)](x, y, x.numel(), BLOCK=128)
    assert torch.equal(y, x.to(target))


@triton.jit
def sort_kernel(x, y, z, a, C: tl.constexpr):
    c = tl.arange(0, C)
    v = tl.load(x + c)
    tl.store(y + c, tl.sort(v))
    tl.store(z + c, tl.cumsum(v, 0))
    tl.store(a, tl.argmax(v, 0))
    tl.store(a + 1, tl.argmin(v, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_sort_scan_argmax(device, dtype):
    x = torch.randperm(256).to(dtype) - 100
    y, z, a = torch.empty_like(x), torch.empty_like(x), torch.empty(2, dtype=torch.int32)
    sort_kernel[(1,)](x, y, z, a, C=256)
    assert torch.equal(y, x.sort().values)
    assert torch.equal(z, x.cumsum(0).to(dtype))
    assert a.tolist() == [int(x.argmax()), int(x.argmin())]


@triton.jit
def histogram_kernel(ids, counts, order, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(ids + i, mask=i < N, other=0)
    slot = tl.atomic_add(counts + e, 1, mask=i < N)
    tl.store(order + i, slot, mask=i < N)


def test_atomics(device):
    ids = torch.randint(0, 8, (500,), dtype=torch.int32)
    counts, order = torch.zeros(8, dtype=torch.int32), torch.full((500,), -1, dtype=torch.int32)
    histogram_kernel[(4,)](ids, counts, order, 500, BLOCK=128)
    assert torch.equal(counts, torch.bincount(ids, minlength=8).int())
    for e in range(8):
        assert sorted(order[ids == e].tolist()) == list(range(int(counts[e])))


@triton.jit
def atomic_kinds_kernel(f, i, v, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    x = tl.load(v + c)
    tl.atomic_add(f + c % 4, x.to(tl.float32))
    tl.atomic_max(i + c % 4, x)
    tl.atomic_min(i + 4 + c % 4, x)
    tl.atomic_or(i + 8 + c % 4, x)
    tl.atomic_and(i + 12 + c % 4, x)
    tl.atomic_xor(i + 16 + c % 4, x)
    tl.atomic_cas(i + 20 + c, tl.zeros_like(x), x)
    tl.atomic_xchg(i + 20 + BLOCK + c, x)


def test_atomic_kinds(device):
    v = torch.randint(1, 1000, (64,), dtype=torch.int32)
    f, i = torch.zeros(4), torch.zeros(20 + 128, dtype=torch.int32)
    i[4:8], i[12:16] = 5000, 0xFFFF
    atomic_kinds_kernel[(1,)](f, i, v, BLOCK=64, num_warps=1)
    columns = v.view(16, 4)
    fold = {"or": torch.bitwise_or, "and": torch.bitwise_and, "xor": torch.bitwise_xor}
    expected = [columns.amax(0), columns.amin(0)]
    for name, start in (("or", 0), ("and", 0xFFFF), ("xor", 0)):
        acc = torch.full((4,), start, dtype=torch.int32)
        for row in columns:
            acc = fold[name](acc, row)
        expected.append(acc)
    assert torch.equal(f, columns.sum(0).float())
    assert torch.equal(i, torch.cat([*expected, v, v]))


@triton.jit
def integer_kernel(x, y, z, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < N, other=1)
    b = tl.load(y + i, mask=i < N, other=1)
    tl.store(z + i, a // b, mask=i < N)
    tl.store(z + N + i, a % b, mask=i < N)
    tl.store(z + 2 * N + i, (a * b) ^ (a << 3) | (b >> 2), mask=i < N)
    tl.store(z + 3 * N + i, tl.where(a > b, a & b, ~a), mask=i < N)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_integers(device, dtype):
    top = torch.iinfo(dtype).max
    x, y = torch.randint(-top, top, (128,), dtype=dtype), torch.randint(1, 1000, (128,), dtype=dtype)
    z = torch.empty(4, 128, dtype=dtype)
    integer_kernel[(1,)](x, y, z, 128, BLOCK=128)
    expected = [
        torch.div(x, y, rounding_mode="trunc"),
        torch.fmod(x, y),
        (x * y) ^ (x << 3) | (y >> 2),
        torch.where(x > y, x & y, ~x),
    ]
    assert torch.equal(z, torch.stack(expected))


@triton.jit
def transpose_kernel(x, y, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tl.store(y + j[:, None] * M + i[None, :], tl.trans(tl.load(x + i[:, None] * N + j[None, :])))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.float64])
def test_transpose(device, dtype):
    x = (torch.randn(32, 64) * 50).to(dtype)
    y = torch.empty(64, 32, dtype=dtype)
    transpose_kernel[(1,)](x, y, M=32, N=64)
    assert torch.equal(y, x.T)


@triton.jit
def gather_kernel(table, ids, out, C: tl.constexpr):
    row = tl.load(ids + tl.program_id(0)).to(tl.int64)
    c = tl.arange(0, C)
    tl.store(out + tl.program_id(0) * C + c, tl.load(table + row * C + c))


def test_gather(device):
    table, ids = torch.randn(50, 64).bfloat16(), torch.randint(0, 50, (9,))
    out = torch.empty(9, 64, dtype=torch.bfloat16)
    gather_kernel[(9,)](table, ids, out, C=64)
    assert torch.equal(out, table[ids])


@triton.jit
def scaled_kernel(
    a,
    sa,
    b,
    sb,
    c,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    FA: tl.constexpr,
    FB: tl.constexpr,
    PA: tl.constexpr,
    PB: tl.constexpr,
):
    rm, rn = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(a + rm[:, None] * (K // PA) + tl.arange(0, K // PA)[None, :])
    w = tl.load(b + rn[None, :] * (K // PB) + tl.arange(0, K // PB)[:, None])
    ks = tl.arange(0, K // 32)
    acc = tl.dot_scaled(
        x, tl.load(sa + rm[:, None] * (K // 32) + ks[None, :]), FA, w, tl.load(sb + rn[:, None] * (K // 32) + ks[None, :]), FB
    )
    tl.store(c + rm[:, None] * N + rn[None, :], acc)


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _small_floats(rows, K, kind):
    """(stored bytes, values) of an fp8 or packed fp4 matrix."""
    if kind == "e2m1":
        codes = torch.randint(0, 16, (rows, K), dtype=torch.uint8)
        return codes[:, ::2] | codes[:, 1::2] << 4, _FP4[codes.long()]
    x = torch.randn(rows, K).to(torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2)
    return x, x.float()


@pytest.mark.parametrize(("fa", "fb"), [("e4m3", "e4m3"), ("e2m1", "e2m1"), ("e5m2", "e4m3"), ("e4m3", "e2m1")])
@pytest.mark.parametrize("nonkdim", [16, 32])
def test_dot_scaled(device, fa, fb, nonkdim):
    M, N, K = 32, 32, 256
    (a, av), (b, bv) = _small_floats(M, K, fa), _small_floats(N, K, fb)
    sa, sb = (torch.randint(120, 132, (n, K // 32), dtype=torch.uint8) for n in (M, N))
    c = torch.empty(M, N)
    pa, pb = 1 + (fa == "e2m1"), 1 + (fb == "e2m1")
    scaled_kernel[(1,)](a, sa, b, sb, c, M=M, N=N, K=K, FA=fa, FB=fb, PA=pa, PB=pb, matrix_instr_nonkdim=nonkdim)
    expected = (av * (2.0 ** (sa.float() - 127)).repeat_interleave(32, 1)) @ (
        bv * (2.0 ** (sb.float() - 127)).repeat_interleave(32, 1)
    ).T
    torch.testing.assert_close(c, expected, rtol=2e-2, atol=0.5)


@triton.jit
def wait_kernel(flags, out):
    """Workgroup 0 waits for the last one: both must be resident."""
    if tl.program_id(0) == 0:
        while tl.atomic_add(flags, 0) == 0:
            pass
        tl.store(out, tl.load(flags + 1, volatile=True))
    elif tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(flags + 1, 7)
        tl.atomic_xchg(flags, 1)


def test_waiting_for_another_workgroup(device):
    flags, out = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    wait_kernel[(3,)](flags, out, num_warps=1)
    assert out.item() == 7
