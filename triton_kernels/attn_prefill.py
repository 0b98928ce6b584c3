# SPDX-License-Identifier: Apache-2.0
"""Attention of many new tokens per sequence over paged keys and values."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._attention import LOG2_E, attend_tokens, is_rdna, load_parts, operand_args
from rocm_infer.triton_kernels._paged import as_bytes, check_rows, parts
from rocm_infer.triton_kernels.common import options


@triton.jit
def find_block(query_start_ptr, block, T, B, TOKENS: tl.constexpr, BLOCK_B: tl.constexpr):
    """(sequence, first row, last row + 1) of a block of at most TOKENS query rows; sequence -1 for rows that nobody owns.

    The rows before the first and after the last sequence count as sequences of their own, so that all rows are written.
    Blocks beyond the last get an empty range.
    """
    place = tl.arange(0, BLOCK_B)  # 0: before the first, 1 .. B: sequences, B + 1: after the last
    start = tl.load(query_start_ptr + place - 1, mask=(place > 0) & (place <= B + 1), other=0)
    stop = tl.load(query_start_ptr + place, mask=place <= B, other=T)
    blocks = tl.where(place <= B + 1, tl.cdiv(stop - start, TOKENS), 0)
    found = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    earlier = tl.sum(tl.where(place < found, blocks, 0), 0)
    first = tl.sum(tl.where(place == found, start, 0), 0) + (block - earlier) * TOKENS
    last = tl.where(found < BLOCK_B, tl.sum(tl.where(place == found, stop, 0), 0), first)
    return tl.where(found <= B, found - 1, -1), first, last


@triton.jit(do_not_specialize=["window", "T", "B", "num_kv_heads", "page_table_stride"])
def attn_prefill_kernel(
    o_ptr,  # [T, H, DV]
    q_ptr,  # [T, H, D]
    k_cache_ptr,  # [N, P, G, D]
    v_cache_ptr,  # [N, P, G, DV]
    page_table_ptr,  # [B, W]
    query_start_ptr,  # [B + 1]
    kv_len_ptr,  # [B]
    sinks_ptr,  # [H] fp32, or None
    scale,  # to be multiplied with q . k; includes the scale of an fp8 cache
    cap,
    v_scale,
    window,
    T,
    B,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_token_stride,
    k_head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    page_table_stride,
    num_kv_heads,
    GROUP: tl.constexpr,  # query heads of a kv head
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    P: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    CASTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Split: one program per kv head and block of BLOCK_M (query token, query head) rows of one sequence.
    Traffic: keys and values up to the block's last token are read once for all query heads that share them.
    Needs: contiguous rows.
    Why: tiles of keys begin at multiples of BLOCK_N from the sequence's start, and a tile that a row does not see changes no bit
        of it: a row's result depends neither on its neighbours nor on how the prompt was cut into chunks.
    Source: FlashAttention-2.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    # Kv heads vary fastest: hardware deals programs to its dies in turn, so a head's programs share a die's L2 cache.
    kv_head = tl.program_id(0).to(tl.int64)
    # The last blocks of a prompt see the most keys; they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, first, last = find_block(query_start_ptr, block, T, B, TOKENS, BLOCK_B)
    if first >= last:
        return
    is_owned = sequence >= 0
    sequence = tl.maximum(sequence, 0).to(tl.int64)
    kv_len, prefix = 0, 0
    if is_owned:
        kv_len = tl.load(kv_len_ptr + sequence)
        prefix = kv_len - tl.load(query_start_ptr + sequence + 1)  # position of row t of this sequence is prefix + t

    rows = tl.arange(0, BLOCK_M)
    tokens, heads = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = (rows < TOKENS * GROUP) & (tokens < last)
    q_row_ptr = q_ptr + tokens.to(tl.int64) * q_token_stride + heads * q_head_stride
    q0, q1 = load_parts(
        q_row_ptr[:, None],
        is_row[:, None],
        tl.arange(0, D0)[None, :],
        (D0 + tl.arange(0, D1 if D1 else 16))[None, :],
        D,
        D0,
        D1,
    )

    position = prefix + tokens
    first_position, last_position = prefix + first, prefix + tl.minimum(first + TOKENS, last) - 1
    seen_to, key_stop, full_stop = tl.zeros_like(tokens) + kv_len, kv_len, kv_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        seen_to = position + 1
        key_stop = tl.minimum(kv_len, last_position + 1)
        full_stop = (first_position + 1) // BLOCK_N * BLOCK_N
    seen_from, key_start = tl.zeros_like(tokens), 0
    if HAS_WINDOW:
        seen_from = position - window + 1
        key_start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        full_stop = key_start
    full_stop = tl.where(is_owned, full_stop, 0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V1 if V1 else 16], tl.float32)
    k_ptr, v_ptr = k_cache_ptr + kv_head * k_head_stride, v_cache_ptr + kv_head * v_head_stride
    pages_ptr = page_table_ptr + sequence * page_table_stride
    if not HAS_WINDOW:
        m, total, acc0, acc1 = attend_tokens(
            q0, q1, m, total, acc0, acc1, k_ptr, v_ptr, pages_ptr, 0, full_stop, seen_from, seen_to, scale, cap,
            k_page_stride, k_token_stride, v_page_stride, v_token_stride,
            D, D0, D1, DV, V0, V1, P, FP8_BIAS, NATIVE, CASTS, HAS_CAP, False, False, HAS_WINDOW, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    m, total, acc0, acc1 = attend_tokens(
        q0, q1, m, total, acc0, acc1, k_ptr, v_ptr, pages_ptr, full_stop, key_stop, seen_from, seen_to, scale, cap,
        k_page_stride, k_token_stride, v_page_stride, v_token_stride,
        D, D0, D1, DV, V0, V1, P, FP8_BIAS, NATIVE, CASTS, HAS_CAP, True, True, HAS_WINDOW, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=is_row, other=0.0) * LOG2_E
        total += tl.exp2(sink - tl.where(m == float("-inf"), 0.0, m))
    inverse = (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    out_ptr = o_ptr + (tokens.to(tl.int64) * (num_kv_heads * GROUP) + heads)[:, None] * DV
    v_columns0, v_columns1 = tl.arange(0, V0), V0 + tl.arange(0, V1 if V1 else 16)
    tl.store(out_ptr + v_columns0[None, :], (acc0 * inverse).to(q0.dtype), mask=is_row[:, None] & (v_columns0 < DV)[None, :])
    if V1:
        tl.store(
            out_ptr + v_columns1[None, :], (acc1 * inverse).to(q0.dtype), mask=is_row[:, None] & (v_columns1 < DV)[None, :]
        )


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: G, H, D, Dv, itemsize (of a query value)."""
    group = dims["H"] // dims["G"]
    row_bytes = max(dims["D"], dims["Dv"]) * dims["itemsize"]
    # The weighted sums take BLOCK_M * Dv registers: 128 rows over 8 waves up to a key of 192 values, then 64 over 4. The registers
    # of RDNA hold half as much; there 8 waves share 64 rows.
    few_rows = is_rdna(arch) or row_bytes > 384
    block_n = 16 if is_rdna(arch) or row_bytes > 512 else 64 if row_bytes <= 384 else 32
    return {
        "BLOCK_M": max(64 if few_rows else 128, triton.next_power_of_2(group)),
        # Keys and values take BLOCK_N rows of LDS each, codes of 1 byte too: they are widened before.
        "BLOCK_N": block_n,
        **options(arch, num_warps=4 if few_rows else 8, num_stages=1, matrix=True, shallow=16 in (block_n, *parts(dims["D"]))),
    }


def supports(call: Any) -> str | None:
    size, group = max(call.dims["D"], call.dims["Dv"]), call.dims["H"] // max(call.dims["G"], 1)
    if size > 256:
        return f"q: expected head sizes up to 256, got {size}"
    return None if group <= 128 else f"q: expected at most 128 heads per kv head, got {group}"


def launch(
    o: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    cap: float,
    k_scale: float,
    v_scale: float,
) -> None:
    check_rows("attn_prefill", q=q, k_cache=k_cache, v_cache=v_cache, page_table=page_table, sinks=sinks)
    num_tokens, num_heads, size = q.shape
    page_size, num_kv_heads, v_size = v_cache.shape[1:]
    batch = kv_len.shape[0]
    if num_tokens == 0:
        return
    arch = archs.current(q.device)
    dims = {"G": num_kv_heads, "H": num_heads, "D": size, "Dv": v_size, "itemsize": q.element_size()}
    chosen = config(arch, dims)
    operands = operand_args(arch, k_cache.dtype)
    group = num_heads // num_kv_heads
    # How many blocks the sequences really need is known to the device alone; this many at most.
    blocks = num_tokens // (chosen["BLOCK_M"] // group) + batch + 2
    attn_prefill_kernel[(num_kv_heads, blocks)](
        o,
        q,
        as_bytes(k_cache),
        as_bytes(v_cache),
        page_table,
        query_start,
        kv_len,
        sinks,
        float(scale * k_scale) if operands["FP8_BIAS"] else float(scale),
        float(cap),
        float(v_scale) if operands["FP8_BIAS"] else 1.0,
        window,
        num_tokens,
        batch,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        page_table.stride(0),
        num_kv_heads,
        GROUP=group,
        D=size,
        D0=parts(size)[0],
        D1=parts(size)[1],
        DV=v_size,
        V0=parts(v_size)[0],
        V1=parts(v_size)[1],
        P=page_size,
        CAUSAL=causal,
        HAS_WINDOW=window > 0,
        HAS_CAP=cap > 0,
        HAS_SINKS=sinks is not None,
        BLOCK_B=triton.next_power_of_2(batch + 2),
        **operands,
        **chosen,
    )
