# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the paged caches share: addresses of tokens, fp8 codes, rotary embedding, checks of a launch.

fp8 caches travel as bytes. `FP8_BIAS` names the dialect inside kernels: 0 no fp8, 7 e4m3fn, 8 e4m3fnuz.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FP8_BIASES = {torch.float8_e4m3fn: 7, torch.float8_e4m3fnuz: 8}
# Triton's interpreter multiplies the bit patterns of bf16 operands; there they are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def fp8_bias(cache: torch.Tensor) -> int:
    return FP8_BIASES.get(cache.dtype, 0)


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """An fp8 cache as uint8 (a view), any other as it is."""
    return cache.view(torch.uint8) if cache.dtype in FP8_BIASES else cache


def check_rows(op: str, **tensors: torch.Tensor | None) -> None:
    """Kernels read rows in vectors: the last dimension must be contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: {name}: expected stride 1 in the last dimension, got {tensor.stride()}; use .contiguous()")


def parts(width: int) -> tuple[int, int]:
    """A row width as a power of two plus a padded remainder (0: none): 192 is 128 + 64, where one block would pad to 256."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    if first < 16:
        return 16, 0
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32; fp32 operands are multiplied as such, not as tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def token_offsets(pages_ptr, tokens, is_token, page_stride, token_stride, P: tl.constexpr):
    """Element offsets (int64) of a sequence's tokens in the cache; `pages_ptr` is its row of the page table."""
    page = tl.load(pages_ptr + tokens // P, mask=is_token).to(tl.int64)
    return page * page_stride + (tokens % P).to(tl.int64) * token_stride


@triton.jit
def run_offsets(pages_ptr, start, stop, page_stride, token_stride, P: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    """Element offsets (int64) [RUNS, RUN] of tokens start .. of a sequence; start is a multiple of RUN and below stop.

    Those from stop on are of pages in use, but mean nothing. Where runs do not cross pages, each is looked up once, in a scalar.
    """
    run, place = tl.arange(0, RUNS)[:, None], tl.arange(0, RUN)[None, :]
    if P % RUN:
        tokens = tl.minimum(start + run * RUN + place, stop - 1)
        return token_offsets(pages_ptr, tokens, None, page_stride, token_stride, P)
    else:
        offsets = tl.broadcast_to(place.to(tl.int64) * token_stride, (RUNS, RUN))
        before = tl.zeros([], tl.int64)
        for i in tl.static_range(RUNS):
            token = start + i * RUN
            page = tl.load(pages_ptr + tl.minimum(token, stop - 1) // P).to(tl.int64)
            first = page * page_stride + (token % P).to(tl.int64) * token_stride
            # A product and not a choice: of that the compiler would not know that rows begin at multiples of 16 bytes.
            offsets += (run >= i).to(tl.int64) * (first - before)
            before = first
        return offsets


@triton.jit
def tile_offsets(pages_ptr, start, stop, page_stride, token_stride, P: tl.constexpr, BLOCK: tl.constexpr):
    """Element offsets (int64) [BLOCK] of tokens start .. of a sequence; start is a multiple of 16 and below stop."""
    return tl.reshape(run_offsets(pages_ptr, start, stop, page_stride, token_stride, P, BLOCK // 16, 16), (BLOCK,))


@triton.jit
def encode_fp8(x, FP8_BIAS: tl.constexpr):
    """fp32 -> byte, clamped to the largest finite value, rounded to nearest even; NaN stays NaN, fnuz knows no -0.

    In integers, so that it is the same on every target, also where the dialect is not native, and in the interpreter.
    """
    largest = 448.0 if FP8_BIAS == 7 else 240.0
    # Adding this makes the sum's last bit the smallest fp8 step, so the addition itself rounds subnormals.
    magic: tl.constexpr = 16384.0 if FP8_BIAS == 7 else 8192.0
    magic_bits: tl.constexpr = 0x46800000 if FP8_BIAS == 7 else 0x46000000
    smallest_normal: tl.constexpr = 0.015625 if FP8_BIAS == 7 else 0.0078125
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), largest)
    size_bits = size.to(tl.uint32, bitcast=True)
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - ((127 - FP8_BIAS) << 3)
    subnormal = (size + magic).to(tl.uint32, bitcast=True) - magic_bits
    code = tl.where(size < smallest_normal, subnormal, normal)
    sign = (bits >> 24) & 0x80
    if FP8_BIAS == 7:
        code = tl.where(x == x, code | sign, 0x7F)
    else:
        code = tl.where(x == x, tl.where(code == 0, 0, code | sign), 0x80)
    return code.to(tl.uint8)


@triton.jit
def fp8_as_half(code, FP8_BIAS: tl.constexpr):
    """byte -> fp16, exact: the exponent in its place, then a product that makes up for the bias; NaN stays NaN."""
    wide = code.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    half = bits.to(tl.float16, bitcast=True) * tl.full([], 256.0 if FP8_BIAS == 7 else 128.0, tl.float16)
    is_nan = (wide & 0x7F) == 0x7F if FP8_BIAS == 7 else wide == 0x80
    return tl.where(is_nan, tl.full([], float("nan"), tl.float16), half)


@triton.jit
def decode_fp8(code, FP8_BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """byte -> fp32. NATIVE: the target converts this dialect itself; otherwise through fp16, whose exponent is wider."""
    if NATIVE:
        if FP8_BIAS == 7:
            value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            value = code.to(tl.float8e4b8, bitcast=True).to(tl.float32)
    else:
        value = fp8_as_half(code, FP8_BIAS).to(tl.float32)
    return value


@triton.jit
def to_cache(x, scale, FP8_BIAS: tl.constexpr):
    """Values as the cache holds them; for fp8 divided by `scale` (correctly rounded) first."""
    if FP8_BIAS:
        return encode_fp8(tl.div_rn(x.to(tl.float32), scale), FP8_BIAS)
    else:
        return x


@triton.jit
def fp8_as_bf16(code, FP8_BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """byte -> bf16, exact. A cast from fp32 would compare every element with NaN on most AMD GPUs."""
    if NATIVE:
        return (decode_fp8(code, FP8_BIAS, True).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # The exponent in its place, then a product that makes up for the bias. NaN by arithmetic: masks of that many
        # elements would fill the scalar registers.
        wide = code.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 4)
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * (2.0**120 if FP8_BIAS == 7 else 2.0**119)
        is_nan = ((wide & 0x7F) + 1) >> 7 if FP8_BIAS == 7 else ((wide ^ 0x80) - 1) >> 15
        upper = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        return (upper | ((is_nan << 15) - is_nan)).to(tl.bfloat16, bitcast=True)


@triton.jit
def from_cache(x, dtype, FP8_BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """What the cache holds, as operands of `dtype`; fp8 codes fit exactly, their scale is applied elsewhere."""
    if FP8_BIAS == 0:
        return x
    elif dtype == tl.bfloat16:
        return fp8_as_bf16(x, FP8_BIAS, NATIVE)
    else:
        return decode_fp8(x, FP8_BIAS, NATIVE).to(dtype)


@triton.jit
def load_angles(table_ptr, position, table_stride, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """(cos, sin) [BLOCK_HALF] of one position (int64); beyond HALF the identity."""
    i = tl.arange(0, BLOCK_HALF)
    row_ptr = table_ptr + position * table_stride
    cos = tl.load(row_ptr + i, mask=i < HALF, other=1.0)
    sin = tl.load(row_ptr + HALF + i, mask=i < HALF, other=0.0)
    return cos, sin


@triton.jit
def load_pairs(rows_ptr, column_stride, is_row, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both columns of the pairs that turn together [ROWS, BLOCK_HALF]: neighbours, or the same place in the two halves.

    rows_ptr, is_row: [ROWS, 1].
    """
    if INTERLEAVED:
        # Read as they lie and split in registers: either column alone is every other element, and takes two bytes at a time.
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(rows_ptr + columns * column_stride, mask=is_row & (columns < 2 * HALF), other=0.0)
        return tl.split(tl.reshape(both, (both.shape[0], BLOCK_HALF, 2)))
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        inside = is_row & (columns < HALF)
        first = tl.load(rows_ptr + columns * column_stride, mask=inside, other=0.0)
        return first, tl.load(rows_ptr + (columns + HALF) * column_stride, mask=inside, other=0.0)


@triton.jit
def store_pairs(
    rows_ptr, first, second, column_stride, is_row, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Write what `load_pairs` reads, in the type that first and second have."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK_HALF))
        tl.store(rows_ptr + columns * column_stride, both, mask=is_row & (columns < 2 * HALF))
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        inside = is_row & (columns < HALF)
        tl.store(rows_ptr + columns * column_stride, first, mask=inside)
        tl.store(rows_ptr + (columns + HALF) * column_stride, second, mask=inside)


@triton.jit
def turn(first, second, cos, sin):
    """fp32, products and sum rounded one by one (fusion is off), so that every kernel and the reference agree in bits."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


def rope_constants(table: torch.Tensor | None, interleaved: bool) -> dict[str, Any]:
    half = 0 if table is None else table.shape[1] // 2
    return {"HALF": half, "BLOCK_HALF": triton.next_power_of_2(max(half, 1)), "INTERLEAVED": interleaved}
