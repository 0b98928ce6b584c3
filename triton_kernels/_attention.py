# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: the online softmax, splits over keys, and the kernel that merges them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import dot, from_cache
from rocm_infer.triton_kernels.common import fp8_args, options

LOG2_E = tl.constexpr(1.4426950408889634)


def operand_args(arch: Arch, cache: torch.dtype) -> dict[str, Any]:
    """How cached values and weights become operands: `fp8_args`, and CASTS: an instruction rounds fp32 to bf16.

    For RDNA the compiler's own conversions from fp8 are far longer than ours.
    """
    made = fp8_args(arch, cache)
    native = made["NATIVE"] and not is_rdna(arch)
    return {**made, "NATIVE": native, "CASTS": arch.vendor == "nvidia" or arch.name == "gfx950"}


def is_rdna(arch: Arch) -> bool:
    """A lane has 256 registers, half of what CDNA gives, and operands of matrix instructions may lie in them twice."""
    return arch.vendor == "amd" and arch.wave == 32


@triton.jit
def online_softmax(scores, seen, m, total, scale, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """One step over a tile of scores [.., N]: (m, sum of weights, weights, factor for what was summed before), m in base 2.

    A row that has seen nothing yet keeps m = -inf and a sum of 0 without making NaN.
    """
    AXIS: tl.constexpr = len(scores.shape) - 1
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        power = tl.exp2(scores * (scale * 2.0 * LOG2_E / cap))
        scores = (cap - 2.0 * cap / (power + 1.0)) * LOG2_E
    else:
        scores = scores * (scale * LOG2_E)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, AXIS))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - tl.expand_dims(base, AXIS))
    factor = tl.exp2(m - base)
    return highest, total * factor + tl.sum(weights, AXIS), weights, factor


@triton.jit
def rounded(weights, dtype, CASTS: tl.constexpr):
    """Weights of the softmax as operands of `dtype`. Not CASTS: to bf16 in integers; no weight is a NaN that would overflow."""
    if dtype == tl.bfloat16 and not CASTS:
        bits = weights.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return weights.to(dtype)


@triton.jit
def load_parts(row_ptr, is_row, first_columns, rest_columns, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Rows of WIDTH as tiles of FIRST and REST columns; what lies outside is 0. No second tile if REST is 0.

    row_ptr and is_row [.., 1], the columns [1, .., FIRST] and [1, .., REST].
    """
    if FIRST <= WIDTH:
        first = tl.load(row_ptr + first_columns, mask=is_row, other=0.0)
    else:
        first = tl.load(row_ptr + first_columns, mask=is_row & (first_columns < WIDTH), other=0.0)
    rest = first
    if REST:
        rest = tl.load(row_ptr + rest_columns, mask=is_row & (rest_columns < WIDTH), other=0.0)
    return first, rest


@triton.jit
def decoded_at_once(x, dtype, FP8_BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """`from_cache` of rows [N, D] by the lanes that loaded them.

    Left to itself the compiler moves codes through LDS first, and each of the waves, which all need every row, decodes them
    anew. It does not move them past the seam of two halves, which costs nothing: neighbours lie in one lane.
    """
    if FP8_BIAS:
        N: tl.constexpr = x.shape[0]
        D: tl.constexpr = x.shape[1]
        even, odd = tl.split(tl.reshape(x, (N, D // 2, 2)))
        even = from_cache(even, dtype, FP8_BIAS, NATIVE)
        odd = from_cache(odd, dtype, FP8_BIAS, NATIVE)
        return tl.reshape(tl.join(even, odd), (N, D))
    else:
        return x


@triton.jit
def attend_tokens(
    q0,  # [BLOCK_M, D0]
    q1,  # [BLOCK_M, D1]
    m,  # running maximum, sum of weights and weighted sums of values, so far
    total,
    acc0,
    acc1,
    k_ptr,  # of this kv head
    v_ptr,
    pages_ptr,  # of this sequence
    start,
    stop,  # tokens start .. stop
    seen_from,  # [BLOCK_M], with PER_ROW: a row sees tokens seen_from .. seen_to
    seen_to,
    scale,
    cap,
    k_page_stride,
    k_token_stride,
    v_page_stride,
    v_token_stride,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    P: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    CASTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,  # tokens from stop on are in the last tile, or rows see different ones
    PER_ROW: tl.constexpr,  # False: every row sees all tokens start .. stop
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(m, total, acc0, acc1) after tokens start .. stop. Head sizes that are no power of two come in two tiles."""
    dtype = q0.dtype
    k_columns0, k_columns1 = tl.arange(0, D0)[None, :], (D0 + tl.arange(0, D1 if D1 else 16))[None, :]
    v_columns0, v_columns1 = tl.arange(0, V0)[None, :], (V0 + tl.arange(0, V1 if V1 else 16))[None, :]
    for first in range(start, stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < (stop if MASKED else first + BLOCK_N)
        page, place = tl.load(pages_ptr + tokens // P, mask=is_token).to(tl.int64), (tokens % P).to(tl.int64)
        k_row_ptr = k_ptr + page * k_page_stride + place * k_token_stride
        k0, k1 = load_parts(k_row_ptr[:, None], is_token[:, None], k_columns0, k_columns1, D, D0, D1)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = dot(q0, tl.trans(decoded_at_once(k0, dtype, FP8_BIAS, NATIVE)), scores)
        if D1:
            scores = dot(q1, tl.trans(decoded_at_once(k1, dtype, FP8_BIAS, NATIVE)), scores)
        seen = is_token[None, :]
        if PER_ROW:
            seen = seen & (tokens[None, :] < seen_to[:, None])
            if HAS_WINDOW:
                seen = seen & (tokens[None, :] >= seen_from[:, None])
        m, total, weights, keep = online_softmax(scores, seen, m, total, scale, cap, HAS_CAP, MASKED)
        weights = rounded(weights, dtype, CASTS)
        v_row_ptr = v_ptr + page * v_page_stride + place * v_token_stride
        v0, v1 = load_parts(v_row_ptr[:, None], is_token[:, None], v_columns0, v_columns1, DV, V0, V1)
        acc0 = dot(weights, decoded_at_once(v0, dtype, FP8_BIAS, NATIVE), acc0 * keep[:, None])
        if V1:
            acc1 = dot(weights, decoded_at_once(v1, dtype, FP8_BIAS, NATIVE), acc1 * keep[:, None])
    return m, total, acc0, acc1


@triton.jit
def kv_splits(num_tokens, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(tokens of a split, number of splits) for a sequence that reads `num_tokens` from the cache.

    SPLIT tokens each, or the multiple of it that keeps a long sequence within MAX_SPLITS: a function of the sequence alone.
    """
    split_len = SPLIT * tl.cdiv(tl.maximum(num_tokens, 1), SPLIT * MAX_SPLITS)
    return split_len, tl.cdiv(num_tokens, split_len)


@triton.jit(do_not_specialize=["window", "Z", "num_rows", "num_new"])
def merge_kernel(
    o_ptr,  # [B, ROWS, D]
    partial_ptr,  # [B, Z, ROWS, D] fp32, each divided by its own sum
    lse_ptr,  # [B, Z, ROWS] fp32, base 2; -inf: saw nothing
    sinks_ptr,  # [ROWS] fp32, or None
    kv_len_ptr,  # [B]
    window,
    Z,
    num_rows,
    num_new,  # tokens at the end that the last split took from elsewhere than the cache
    D: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Split: one program, of one wave, per output row.
    Traffic: each partial result is read once, BLOCK_Z of them in flight.
    Why: summed in the order of the splits, so the result depends on the sequence alone; no split, no sum: zeros.
    """
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_len_ptr + b)
    num_tokens = tl.minimum(kv_len, window) if window > 0 else kv_len
    _, num_splits = kv_splits(tl.maximum(num_tokens - num_new, 0), SPLIT, MAX_SPLITS)
    num_splits = tl.where(kv_len > 0, tl.maximum(num_splits, 1), 0)
    first = b * Z * num_rows + row
    every = tl.arange(0, MAX_SPLITS)
    highest = tl.max(tl.load(lse_ptr + first + every * num_rows, mask=every < num_splits, other=float("-inf")))
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + row).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for start in range(0, num_splits, BLOCK_Z):
        z = start + tl.arange(0, BLOCK_Z)
        place = first + z * num_rows
        lse = tl.load(lse_ptr + place, mask=z < num_splits, other=float("-inf"))
        inside = (z < num_splits)[:, None] & (columns < D)[None, :]
        partial = tl.load(partial_ptr + place[:, None] * D + columns[None, :], mask=inside, other=0.0)
        weight = tl.exp2(lse - base)
        total += tl.sum(weight)
        acc += tl.sum(weight[:, None] * partial, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - base)
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + (b * num_rows + row) * D + columns, out.to(o_ptr.dtype.element_ty), mask=columns < D)


def merge(
    o: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    kv_len: torch.Tensor,
    *,
    window: int,
    num_new: int,
    split: int,
    max_splits: int,
) -> None:
    """o [B, ROWS, D] from the partial results of a split-KV kernel."""
    batch, num_splits, rows, width = partial.shape
    merge_kernel[(rows, batch)](
        o,
        partial,
        lse,
        sinks,
        kv_len,
        window,
        num_splits,
        rows,
        num_new,
        D=width,
        HAS_SINKS=sinks is not None,
        SPLIT=split,
        MAX_SPLITS=max_splits,
        BLOCK_D=triton.next_power_of_2(width),
        # 16 KB in flight: enough to hide the latency of one wave's loads, 64 registers of its lanes.
        BLOCK_Z=max(1, min(8, 4096 // triton.next_power_of_2(width))),
        **options(archs.current(o.device), num_warps=1),
    )


def num_splits(width: int, page_size: int, split: int, max_splits: int) -> int:
    """Splits of the longest sequence that a page table of this width can hold."""
    return max(1, min(max_splits, triton.cdiv(width * page_size, split)))
