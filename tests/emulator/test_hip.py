# SPDX-License-Identifier: Apache-2.0
"""HIP C++ through clang: small kernels against numpy, and random programs against the same C on the host."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import pytest
import torch

from rocm_infer.emulator.build import _compiler
from tests.emulator.assemble import compile_hip, device

_PRELUDE = """
#define KERNEL extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(1, 1024)))
#define DEVICE __attribute__((device))
#define SHARED __attribute__((shared))
typedef unsigned u32; typedef unsigned long long u64; typedef long long i64;
DEVICE static int tid() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE static int bid() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE static int nthreads() { return __builtin_amdgcn_workgroup_size_x(); }
DEVICE static void sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup"); __builtin_amdgcn_s_barrier(); __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
"""
_KERNELS = (
    _PRELUDE
    + """
KERNEL void block_sum(const float* x, float* y, int n) {
  SHARED float part[256];
  float s = 0;
  for (int i = tid(); i < n; i += nthreads()) s += x[bid() * n + i];
  part[tid()] = s;
  for (int step = nthreads() / 2; step; step /= 2) { sync(); if (tid() < step) part[tid()] += part[tid() + step]; }
  if (tid() == 0) y[bid()] = part[0];
}
KERNEL void reverse_dynamic(const int* x, int* y) {
  extern SHARED int lds[];
  lds[tid()] = x[tid()];
  sync();
  y[tid()] = lds[nthreads() - 1 - tid()];
}
KERNEL void constants(const int* x, float* y) {
  static const float table[16] = {1, 2, 4, 8, 16, 32, 64, 128, 0.5, 0.25, 3, 5, 7, 11, 13, 17};
  y[tid()] = table[x[tid()] & 15];
}
KERNEL void local_array(const int* x, int* y) {
  volatile int a[32];
  for (int i = 0; i < 32; ++i) a[i] = x[tid()] * i;
  y[tid()] = a[x[tid()] & 31] + a[31];
}
DEVICE __attribute__((noinline)) static int deref(const int* p) { return *p + 1; }
KERNEL void generic(const int* x, int* y) {
  SHARED int lds[64];
  int mine = x[tid()] * 3;
  lds[tid()] = x[tid()];
  sync();
  const int* p = (x[tid()] & 1) ? &lds[63 - tid()] : (x[tid()] & 2) ? x + tid() : &mine;
  asm volatile("" : "+v"(p));
  y[tid()] = *p + 1;
}
KERNEL void math(const double* x, double* y, i64* z) {
  const double v = x[tid()];
  y[tid()] = __builtin_sqrt(v) / (v + 3.5) + __builtin_floor(v);
  const i64 i = (i64)v;
  z[tid()] = i / 7 + i % 13 - i * i;
}
KERNEL void atomics(int* count, u64* wide, float* real, const int* x) {
  SHARED int local;
  if (tid() == 0) local = 0;
  sync();
  __hip_atomic_fetch_add(&local, x[tid()], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  __hip_atomic_fetch_add(wide, (u64)x[tid()] << 30, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  __hip_atomic_fetch_max(count + 1, x[tid()], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  int expected = 0;
  __hip_atomic_compare_exchange_strong(count + 2, &expected, tid() + 100, __ATOMIC_RELAXED, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  __builtin_amdgcn_global_atomic_fadd_f32((__attribute__((address_space(1))) float*)real, 0.5f);
  sync();
  if (tid() == 0) __hip_atomic_fetch_add(count, local, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
KERNEL void ballots(const int* x, u64* y, int* z) {
  y[tid() / 64] = __builtin_amdgcn_ballot_w64(x[tid()] > 0);
  z[tid()] = __builtin_amdgcn_ds_bpermute(4 * (tid() ^ 5), x[tid()]) + __builtin_amdgcn_mov_dpp(x[tid()], 0xb1, 15, 15, true);
}
KERNEL void to_lds(const int* x, int* y) {
  SHARED int lds[64];
  __builtin_amdgcn_global_load_lds((__attribute__((address_space(1))) void*)(x + tid()), (__attribute__((address_space(3))) void*)lds, 4, 0, 0);
  __builtin_amdgcn_s_waitcnt(0);
  sync();
  y[tid()] = lds[63 - tid()];
}
"""
)


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def kernels(request):
    target = device(request.param)
    code, text = compile_hip(request.param, _KERNELS)
    return lambda name: target.load(code, text, name)


def test_block_sum(kernels):
    x, y = torch.randn(3, 1000), torch.zeros(3)
    kernels("block_sum").launch([3], [256], [x, y, 1000])
    torch.testing.assert_close(y, x.sum(1), rtol=1e-5, atol=1e-5)


def test_dynamic_lds(kernels):
    x, y = torch.arange(192, dtype=torch.int32), torch.zeros(192, dtype=torch.int32)
    kernels("reverse_dynamic").launch([1], [192], [x, y], lds=192 * 4)
    assert torch.equal(y, x.flip(0))


def test_constants(kernels):
    x, y = torch.arange(64, dtype=torch.int32) * 5, torch.zeros(64)
    kernels("constants").launch([1], [64], [x, y])
    assert torch.equal(y, torch.tensor([1, 2, 4, 8, 16, 32, 64, 128, 0.5, 0.25, 3, 5, 7, 11, 13, 17])[x.long() & 15])


def test_scratch(kernels):
    x, y = torch.arange(70, dtype=torch.int32), torch.zeros(70, dtype=torch.int32)
    kernels("local_array").launch([1], [70], [x, y])
    assert torch.equal(y, x * (x & 31) + x * 31)


def test_generic_pointers(kernels):
    x, y = torch.randint(0, 1000, (64,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    kernels("generic").launch([1], [64], [x, y])
    assert torch.equal(y, torch.where(x & 1 == 1, x.flip(0), torch.where(x & 2 == 2, x, x * 3)) + 1)


def test_doubles_and_64_bit_division(kernels):
    x = torch.rand(64, dtype=torch.float64) * 1e6
    y, z = torch.zeros_like(x), torch.zeros(64, dtype=torch.int64)
    kernels("math").launch([1], [64], [x, y, z])
    torch.testing.assert_close(y, x.sqrt() / (x + 3.5) + x.floor(), rtol=1e-14, atol=0)
    i = x.long()
    assert torch.equal(z, i // 7 + i % 13 - i * i)


def test_atomics(kernels):
    x = torch.randint(1, 100, (256,), dtype=torch.int32)
    count, wide, real = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    kernels("atomics").launch([5], [256], [count, wide, real, x])
    assert count.tolist() == [5 * int(x.sum()), int(x.max()), 100, 0]
    assert wide.item() == 5 * int(x.sum()) << 30
    assert real.item() == 640


def test_lane_exchange(kernels):
    x, y, z = (
        torch.randint(-9, 9, (64,), dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(64, dtype=torch.int32),
    )
    kernels("ballots").launch([1], [64], [x, y, z])
    assert int(y) & (1 << 64) - 1 == sum(1 << i for i in range(64) if x[i] > 0)
    lane = torch.arange(64)
    assert torch.equal(z, x[lane ^ 5] + x[lane ^ 1])


def test_load_to_lds(kernels):
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    kernels("to_lds").launch([1], [64], [x, y])
    assert torch.equal(y, x.flip(0))


# ------------------------------------------------------------------------------------------------------- random programs

_TYPES = ("u32", "int", "u64", "i64", "float", "double", "unsigned short", "signed char")
_INT_OPS = ("+", "-", "*", "&", "|", "^")


def _expression(rng: random.Random, kind: str, names: dict[str, str], depth: int) -> str:
    """A C expression of type kind over the variables; no undefined behaviour (signed sums go through unsigned)."""
    if depth == 0 or rng.random() < 0.15:
        name = rng.choice(list(names))
        if kind in ("float", "double") or names[name] not in ("float", "double"):
            return f"({kind}){name}"
        return f"({kind})clamp_to_int({name})"
    a, b = (_expression(rng, kind, names, depth - 1) for _ in range(2))
    if kind in ("float", "double"):
        return rng.choice([f"({a} + {b})", f"({a} - {b})", f"({a} * {b})", f"({a} < {b} ? {a} : {b})", f"(-{a})"])
    wide = "u64" if "64" in kind else "u32"
    bits = 64 if "64" in kind else 32
    return rng.choice([
        *(f"({kind})(({wide}){a} {op} ({wide}){b})" for op in _INT_OPS),
        f"({kind})(({wide}){a} << (({wide}){b} & {bits - 1}))", f"({kind})({a} >> (({wide}){b} & 7))",
        f"({kind})({a} > {b} ? {a} : {b})", f"({kind})({a} / (({kind})({b} & 63) + 1))", f"({kind})({a} == {b})",
    ])  # fmt: skip


def _program(seed: int) -> str:
    rng = random.Random(seed)
    names = {"a": "u32", "b": "int", "c": "float", "d": "i64"}
    lines = []
    for i in range(10):
        kind = rng.choice(_TYPES)
        lines.append(f"  {kind} t{i} = {_expression(rng, kind, names, 3)};")
        names[f"t{i}"] = kind
    ints = [n for n, t in names.items() if t not in ("float", "double")]
    reals = [n for n, t in names.items() if t in ("float", "double")]
    lines.append("  *x = " + " ^ ".join(f"(u64){n} * {2 * i + 1}u" for i, n in enumerate(ints)) + ";")
    lines.append("  *y = " + " + ".join(f"(double)clamp_real({n})" for n in reals) + ";")
    return f"FUNCTION void program_{seed}(u32 a, int b, float c, i64 d, u64* x, double* y) {{\n" + "\n".join(lines) + "\n}\n"


_COMMON = """
FUNCTION int clamp_to_int(double v) { return v > 1e6 ? 1000000 : v > -1e6 ? (int)v : -1000000; }
FUNCTION double clamp_real(double v) { return v > 1e30 ? 1e30 : v > -1e30 ? v : -1e30; }
"""
_SEEDS = range(24)


def test_random_programs_agree_with_the_host(kernels, tmp_path: Path, request: pytest.FixtureRequest):
    arch = request.node.callspec.params["kernels"]
    programs = _COMMON + "".join(_program(s) for s in _SEEDS)
    body = "KERNEL void fuzz_{0}(const u32* a, const int* b, const float* c, const i64* d, u64* x, double* y) {{ int t = bid() * 64 + tid(); program_{0}(a[t], b[t], c[t], d[t], x + t, y + t); }}\n"
    pragma = "#pragma clang fp contract(off)\n"
    source = _PRELUDE + pragma + "#define FUNCTION DEVICE static\n" + programs + "".join(body.format(s) for s in _SEEDS)
    code, text = compile_hip(arch, source)
    loop = 'extern "C" void fuzz_{0}(int n, const u32* a, const int* b, const float* c, const i64* d, u64* x, double* y) {{ for (int t = 0; t < n; ++t) program_{0}(a[t], b[t], c[t], d[t], x + t, y + t); }}\n'
    host = "typedef unsigned u32; typedef unsigned long long u64; typedef long long i64;\n#define FUNCTION static\n" + programs
    (tmp_path / "host.cpp").write_text(host + "".join(loop.format(s) for s in _SEEDS))
    library = tmp_path / "host.so"
    subprocess.run(
        [*_compiler(), "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", str(tmp_path / "host.cpp"), "-o", str(library)],
        check=True,
    )
    native = ctypes.CDLL(str(library))
    torch.manual_seed(3)
    n = 128
    special = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 255, 65536], dtype=torch.int64)
    a, b = (torch.cat([special, torch.randint(-(2**31), 2**31, (n - 7,))]).int() for _ in range(2))
    c = torch.cat([torch.tensor([0.0, -0.0, 1.0, -1.0, 1e30, 1e-30, 0.5]), torch.randn(n - 7) * 1000])
    d = torch.cat([special * 2**20, torch.randint(-(2**62), 2**62, (n - 7,))])
    target = device(arch, undefined=False)
    for seed in _SEEDS:
        x, y = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.float64)
        target.load(code, text, f"fuzz_{seed}").launch([n // 64], [64], [a, b, c, d, x, y])
        expected_x, expected_y = torch.zeros_like(x), torch.zeros_like(y)
        pointers = [ctypes.c_void_p(v.data_ptr()) for v in (a, b, c, d, expected_x, expected_y)]
        getattr(native, f"fuzz_{seed}")(n, *pointers)
        assert torch.equal(x, expected_x), f"integers of program {seed}:\n{_program(seed)}"
        torch.testing.assert_close(
            y, expected_y, rtol=0, atol=0, equal_nan=True, msg=f"reals of program {seed}:\n{_program(seed)}"
        )
