# SPDX-License-Identifier: Apache-2.0
"""Bad tiles and narrow addresses, really compiled. Run by test_isa.py in a process where Triton compiles."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bench import isa
from bench.addresses import overflows
from bench.shapes import variants
from rocm_infer import arch as archs
from rocm_infer.triton_kernels import attn_prefill
from rocm_infer.triton_kernels._compile import compiling


@pytest.mark.parametrize("arch", isa.STRICT)
def test_a_bad_tile_is_told(arch, monkeypatch):
    """Head size 256, 128 rows, two stages."""
    good = attn_prefill.config
    monkeypatch.setattr(attn_prefill, "config", lambda a, d: good(a, d) | {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 2})
    wide = next(v for v in variants("attn_prefill") if v.model == "llama-3.1-8b").scaled(D=256, Dv=256)
    (case,) = isa.cases(arch, [wide])
    told = isa.complaints(isa.compile_case(case), {"triton": "", "kernels": {}})
    assert any(word in text for text in told for word in ("scratch_bytes", "spills", "lds_bytes", "does not compile")), told
    assert all(text.startswith(f"{arch} attn_prefill_kernel [attn_prefill llama-3.1-8b") for text in told)


@triton.jit
def gather_kernel(out_ptr, pages_ptr, cache_ptr, page_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    page = tl.load(pages_ptr + tl.program_id(0))
    columns = tl.arange(0, BLOCK)
    if WIDE:
        page = page.to(tl.int64)
    tl.store(out_ptr + columns, tl.load(cache_ptr + page * page_stride + columns))


@triton.jit
def row_kernel(out_ptr, rows_stride, T, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    for _ in range(T):  # what a loop carries is followed too
        row += 1
    tl.store(out_ptr + row * 7168 + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def expert_kernel(out_ptr, ids_ptr, expert_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.load(ids_ptr)
    offset = expert.to(tl.int64) * expert_stride if WIDE else (expert * expert_stride).to(tl.int64)  # widened too late
    tl.store(out_ptr + offset + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [(gather_kernel, ("out", "index", "out", 4096)), (row_kernel, ("out", 4096, 3)), (expert_kernel, ("out", "index", 4096))],
)
def test_a_32_bit_product_that_feeds_a_pointer_is_found(kernel, arguments, wide):
    made = {"out": torch.empty(64, device="meta"), "index": torch.empty(64, dtype=torch.int32, device="meta")}
    with compiling(archs.of("gfx942")) as launches:
        kernel[(2048,)](*(made.get(argument, argument) for argument in arguments), WIDE=wide, BLOCK=64)
    found = overflows(launches[0].files[".ttir"].read_text(), launches[0].arguments, launches[0].grid)
    assert bool(found) is not wide, found
    assert all(place.startswith("isa_cases.py:") for place in found)
