# SPDX-License-Identifier: Apache-2.0
"""Faults put into kernels on purpose: each must be reported, by name and place."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from rocm_infer.emulator import loader
from rocm_infer.emulator.build import core
from rocm_infer.emulator.decoder import DecodeError
from rocm_infer.emulator.device import Checks, Device
from tests.emulator.assemble import assemble, compile_hip, device
from tests.emulator.test_hip import _PRELUDE

_SOURCE = (
    _PRELUDE
    + """
KERNEL void exchange(const int* x, int* y) {
  SHARED int lds[256];
  lds[tid()] = x[tid()];
  sync();
  y[tid()] = lds[255 - tid()];
}
KERNEL void read_twice(int* y) {
  SHARED int lds[256];
  lds[tid()] = tid();
  sync();
  int a = lds[255 - tid()];
  sync();
  lds[tid()] = a;
  sync();
  y[tid()] = lds[255 - tid()];
}
KERNEL void half(const int* x, int* y) { if (tid() % 2) y[tid()] = x[tid()]; }
KERNEL void far(int* y, i64 i) { y[i] = 1; }
KERNEL void overrun(int* y, int n) { SHARED int lds[64]; lds[tid() + n] = 1; sync(); y[tid()] = lds[tid()]; }
KERNEL void spin(volatile int* x) { while (*x == 0) { } }
KERNEL void deep(int* y, int n) { volatile int a[8]; for (int i = 0; i < n; ++i) a[i] = i; y[tid()] = a[0]; }
"""
)


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def built(request):
    return request.param, *compile_hip(request.param, _SOURCE)


def _load(built, name: str, edit=lambda text: text, **checks):
    arch, code, text = built
    return device(arch, **checks).load(code, edit(text), name)


def _without(text: str, kernel: str, instruction: str, which: int = 0) -> str:
    """The kernel's text with one matching instruction removed."""
    start = re.search(rf"^{kernel}:", text, re.MULTILINE).end()
    end = text.index("s_endpgm", start)
    found = list(re.finditer(rf"^\s+{instruction}.*\n", text[start:end], re.MULTILINE))[which]
    return text[: start + found.start()] + text[start + found.end() :]


def test_clean_kernels_pass(built):
    x, y = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    _load(built, "exchange").launch([1], [256], [x, y])
    assert torch.equal(y, x.flip(0))
    _load(built, "read_twice").launch([2], [256], [y])
    assert torch.equal(y, x)


@pytest.mark.parametrize(("kernel", "which"), [("exchange", 0), ("read_twice", 0), ("read_twice", 1), ("read_twice", 2)])
def test_a_removed_barrier_is_a_race(built, kernel, which):
    x = torch.randint(0, 1 << 30, (256,), dtype=torch.int32)
    arguments = [x, torch.zeros_like(x)] if kernel == "exchange" else [torch.zeros_like(x)]
    loaded = _load(built, kernel, lambda text: _without(text, kernel, "s_barrier", which))
    with pytest.raises(RuntimeError, match=rf"{kernel}: LDS race at 0x[0-9a-f]+: wave \d .*\n  at instruction \d+: ds_"):
        loaded.launch([1], [256], arguments)


def test_one_wave_does_not_race_with_itself(built):
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    source = (
        "KERNEL void k(const int* x, int* y) { SHARED int lds[64]; lds[tid()] = x[tid()]; sync(); y[tid()] = lds[63 - tid()]; }"
    )
    code, text = compile_hip(built[0], _PRELUDE + source)
    device(built[0]).load(code, text.replace("\ts_barrier\n", ""), "k").launch([1], [64], [x, y])
    assert torch.equal(y, x.flip(0))


def test_out_of_bounds_names_the_tensor(built):
    x, y = torch.zeros(300, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    with pytest.raises(
        RuntimeError,
        match=r"exchange: out of bounds: lane \d+ reads 4 bytes at 0x[0-9a-f]+, 0 bytes past the end of argument 0",
    ):
        _load(built, "exchange").launch([1], [256], [x[:250], y])
    with pytest.raises(
        RuntimeError, match=r"out of bounds: lane 0 writes 4 bytes .*before y \(40 bytes\)\n.*at instruction \d+: global_store"
    ):
        _load(built, "far").launch([1], [1], [y[:10], -3], names=["y", "i"])


def test_shifted_pointer(built):
    x, y = torch.zeros(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    address = struct.pack("<Q", x.data_ptr() + 4)
    with pytest.raises(RuntimeError, match="out of bounds: lane 63 reads 4 bytes"):
        _load(built, "exchange").launch([1], [256], [address, y], tensors=[x])


def test_undefined_register(built):
    """Without the load its register holds whatever was there before."""
    x, y = torch.ones(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    loaded = _load(built, "exchange", lambda text: _without(text, "exchange", "global_load_dword"))
    with pytest.raises(RuntimeError, match="exchange: undefined data: byte 0 of argument 1"):
        loaded.launch([1], [256], [x, y])
    _load(built, "exchange", lambda text: _without(text, "exchange", "global_load_dword"), undefined=False).launch(
        [1], [256], [x, y]
    )


def test_undefined_lds(built):
    x, y = torch.ones(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    loaded = _load(built, "exchange", lambda text: _without(text, "exchange", "ds_write"))
    with pytest.raises(RuntimeError, match="undefined data"):
        loaded.launch([1], [256], [x, y])


def test_read_only_and_never_written(built):
    arch, code, text = built
    target = device(arch)
    x, y = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    half = target.load(code, text, "half")
    with target.watch(read_only=[x]) as watch:
        half.launch([1], [64], [x, y])
        with pytest.raises(AssertionError, match=r"y: 32 of 64 elements never written, the first at \[0\]"):
            watch.check_written(y, "y")
        watch.check_written(y[1::2], "odd")
        with pytest.raises(AssertionError, match="no kernel received it"):
            watch.check_written(torch.zeros(1))
    with target.watch(read_only=[y]), pytest.raises(RuntimeError, match="writes read-only y at offset 4"):
        half.launch([1], [64], [x, y], names=["x", "y"])


def test_lds_and_scratch_overrun(built):
    y = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"overrun: LDS overrun: address 0x100 \+ 4 bytes, allocated 256"):
        _load(built, "overrun").launch([1], [64], [y, 1])
    with pytest.raises(RuntimeError, match="deep: scratch overrun"):
        _load(built, "deep").launch([1], [64], [y, 1000])


def test_endless_loop(built):
    arch, code, text = built
    loaded = Device(arch, checks=Checks(step_limit=100_000), threads=1).load(code, text, "spin")
    with pytest.raises(RuntimeError, match="spin: step limit reached"):
        loaded.launch([1], [64], [torch.zeros(1, dtype=torch.int32)])


def test_resource_limits(built):
    y = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(loader.LoadError, match=r"bytes of LDS, gfx9\d\d has"):
        _load(built, "half").launch([1], [64], [y, y], lds=200 * 1024)
    with pytest.raises(loader.LoadError, match="2048 work-items per workgroup"):
        _load(built, "half").launch([1], [2048], [y, y])
    with pytest.raises(loader.LoadError, match="expected 2 arguments, got 1"):
        _load(built, "half").launch([1], [64], [y])


def test_wrong_architecture_and_wave_size(built):
    arch, code, text = built
    other = "gfx950" if arch == "gfx942" else "gfx942"
    with pytest.raises(loader.LoadError, match=f"compiled for {arch}, the device is {other}"):
        device(other).load(code, text, "half")
    sections = loader._sections(code)
    at = loader._file_offset(sections, loader._symbols(code, sections)["half.kd"]) + 56
    flags = struct.unpack_from("<H", code, at)[0] | 1 << 10
    with pytest.raises(loader.LoadError, match="wave size 32"):
        loader.load(code[:at] + struct.pack("<H", flags) + code[at + 2 :])


@pytest.mark.parametrize(("line", "message"), [
    ("v_sqrt_of_f32 v0, v1", "unknown opcode v_sqrt_of_f32"),
    ("v_add_f32_e32 v0, v1", "expected 3 operands, got 2"),
    ("v_add_f64 v[0:1], v[2:3], v4", "expected 2 registers, got 1"),
    ("v_add_u32_e64 v0, |v1|, v2", "sign modifier not known"),
    ("v_add_f32_e32 v0, v1, v250", "register beyond the kernel's allocation"),
    ("v_add_f32_e64 v0, v1, v2 wobble:3", "modifier 'wobble:3'"),
    ("v_add_f32_e32 v0, v1, w2", "operand 'w2'"),
    ("s_cbranch_scc0 .Lnowhere", "unknown label"),
    ("s_setreg_imm32_b32 hwreg(HW_REG_TRAPSTS, 0, 1), 1", "hardware register HW_REG_TRAPSTS"),
    ("global_load_dword v0, v[2:3], off offset:16 tfe", "modifier 'tfe'"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(line, message):
    code, text = assemble("gfx942", {"k": "\ts_nop 0"})
    with pytest.raises((DecodeError, core().EmulationError), match=re.escape(message)) as error:
        device("gfx942").load(code, text.replace("\ts_nop 0\n", f"\t{line}\n"), "k")
    assert "k" in str(error.value)
    assert line in str(error.value)


def test_mode_changes_are_refused():
    code, text = assemble("gfx942", {"k": "\ts_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 2), 1"})
    with pytest.raises(RuntimeError, match="only bit 23"):
        device("gfx942").load(code, text, "k").launch([1], [64], [None, None])


def test_threads_give_the_same_result(built):
    arch, code, text = built
    y = torch.zeros(256, dtype=torch.int32)
    record = Device(arch, threads=2).load(code, text, "read_twice").launch([50], [256], [y])
    assert torch.equal(y, torch.arange(256, dtype=torch.int32))
    single = Device(arch, threads=1).load(code, text, "read_twice").launch([50], [256], [y])
    assert record.counters == single.counters


def test_counters(built):
    arch, code, text = built
    x, y = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    counters = device(arch, bank_conflicts=True).load(code, text, "exchange").launch([3], [256], [x, y]).counters
    assert (counters["bytes_read"], counters["bytes_written"]) == (3 * 1024, 3 * 1024)
    assert counters["lds_bytes"] == 3 * 2048
    assert counters["lds_conflicts"] == 0
    assert counters["barriers"] == 3 * 4
    assert 16 <= counters["lines"] <= 19  # 8 lines for each tensor, one or two for arguments
    assert counters["instructions"] == sum(counters[c] for c in ("valu", "mfma", "salu", "smem", "vmem", "lds", "control"))


def test_trace_and_register_dump(built):
    arch, code, text = built
    x, y = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    target = Device(arch, checks=Checks(undefined=False), trace=(0, 1), threads=1)
    record = target.load(code, text, "exchange").launch([1], [256], [x, y])
    assert len(target.trace_lines) == 1 + record.counters["instructions"] // 4
    assert any("ds_read_b32" in line for line in target.trace_lines)
    target = Device(arch, checks=Checks(undefined=False), trace=(0, 1), break_at=0, threads=1)
    target.load(code, text, "exchange").launch([1], [256], [x, y])
    name, dump = target.trace_lines
    assert name == f"{record.kernel}:"
    assert dump.startswith("registers before 0:")
    assert "v0: 0x40 0x41 0x42" in dump
