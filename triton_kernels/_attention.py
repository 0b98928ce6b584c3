# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: the online softmax, splits over keys, and the kernel that merges them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.triton_kernels._paged import dot, from_cache, token_offsets
from rocm_infer.triton_kernels.common import options

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def online_softmax(scores, seen, m, total, scale, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """One step over a tile of scores [M, N]: (m, sum of weights, weights, factor for what was summed before), m in base 2.

    A row that has seen nothing yet keeps m = -inf and a sum of 0 without making NaN.
    """
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        power = tl.exp2(scores * (scale * 2.0 * LOG2_E / cap))
        scores = (cap - 2.0 * cap / (power + 1.0)) * LOG2_E
    else:
        scores = scores * (scale * LOG2_E)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    factor = tl.exp2(m - base)
    return highest, total * factor + tl.sum(weights, 1), weights, factor


@triton.jit
def load_parts(row_ptr, is_row, first_columns, rest_columns, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Rows of WIDTH as tiles of FIRST and REST columns; what lies outside is 0. No second tile if REST is 0."""
    if FIRST <= WIDTH:
        first = tl.load(row_ptr[:, None] + first_columns[None, :], mask=is_row[:, None], other=0.0)
    else:
        first = tl.load(row_ptr[:, None] + first_columns[None, :], mask=is_row[:, None] & (first_columns < WIDTH), other=0.0)
    rest = first
    if REST:
        inside = is_row[:, None] & (rest_columns < WIDTH)[None, :]
        rest = tl.load(row_ptr[:, None] + rest_columns[None, :], mask=inside, other=0.0)
    return first, rest


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
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,  # tokens from stop on are in the last tile, or rows see different ones
    PER_ROW: tl.constexpr,  # False: every row sees all tokens start .. stop
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(m, total, acc0, acc1) after tokens start .. stop. Head sizes that are no power of two come in two tiles."""
    dtype = q0.dtype
    k_columns0, k_columns1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 16)
    v_columns0, v_columns1 = tl.arange(0, V0), V0 + tl.arange(0, V1 if V1 else 16)
    for first in range(start, stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < stop
        k_row_ptr = k_ptr + token_offsets(pages_ptr, tokens, is_token, k_page_stride, k_token_stride, P)
        v_row_ptr = v_ptr + token_offsets(pages_ptr, tokens, is_token, v_page_stride, v_token_stride, P)
        k0, k1 = load_parts(k_row_ptr, is_token, k_columns0, k_columns1, D, D0, D1)
        v0, v1 = load_parts(v_row_ptr, is_token, v_columns0, v_columns1, DV, V0, V1)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = dot(q0, tl.trans(from_cache(k0, dtype, FP8_BIAS, NATIVE)), scores)
        if D1:
            scores = dot(q1, tl.trans(from_cache(k1, dtype, FP8_BIAS, NATIVE)), scores)
        seen = is_token[None, :]
        if PER_ROW:
            seen = seen & (tokens[None, :] < seen_to[:, None])
            if HAS_WINDOW:
                seen = seen & (tokens[None, :] >= seen_from[:, None])
        m, total, weights, keep = online_softmax(scores, seen, m, total, scale, cap, HAS_CAP, MASKED)
        weights = weights.to(dtype)
        acc0 = dot(weights, from_cache(v0, dtype, FP8_BIAS, NATIVE), acc0 * keep[:, None])
        if V1:
            acc1 = dot(weights, from_cache(v1, dtype, FP8_BIAS, NATIVE), acc1 * keep[:, None])
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
