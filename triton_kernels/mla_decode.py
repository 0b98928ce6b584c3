# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention of a few new tokens over the paged latent cache: rotary embedding, cache write, split-KV."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._attention import is_rdna, kv_splits, merge, num_splits, online_softmax, operand_args, rounded
from rocm_infer.triton_kernels._paged import as_bytes, check_rows, dot, from_cache, tile_offsets, to_cache, token_offsets
from rocm_infer.triton_kernels.common import options


@triton.jit
def turned_columns(x_ptr, columns, inside, table_row_ptr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of rows x_ptr [.., 2 * HALF] after rotation, fp32. `columns`, `inside` and table_row_ptr broadcast together.

    Each column is computed from itself and its partner, so that columns stay in the order of the cache.
    """
    if INTERLEAVED:
        pair, partner, is_first = columns // 2, columns ^ 1, columns % 2 == 0
    else:
        pair, is_first = columns % HALF, columns < HALF
        partner = tl.where(is_first, columns + HALF, columns - HALF)
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(table_row_ptr + pair, mask=inside, other=1.0)
    sin = tl.load(table_row_ptr + HALF + pair, mask=inside, other=0.0)
    return x * cos + other * tl.where(is_first, -sin, sin)


@triton.jit
def attend_latents(q_c, q_pe, m, total, acc, c, k_pe, seen, scale, cap, HAS_CAP: tl.constexpr, CASTS: tl.constexpr):
    """(m, total, acc) after one tile of tokens. q_c and acc [PARTS, M, .], c [PARTS, N, .]: columns in parts, one for each wave.

    Each wave multiplies its columns alone, as keys and as values; only the parts of the scores are added across waves.
    """
    PARTS: tl.constexpr = c.shape[0]
    M: tl.constexpr = q_c.shape[1]
    N: tl.constexpr = c.shape[1]
    scores = tl.zeros([PARTS, M, N], tl.float32)
    scores = dot(q_pe, tl.permute(k_pe, (0, 2, 1)), scores)
    scores = tl.sum(dot(q_c, tl.permute(c, (0, 2, 1)), scores), 0)
    m, total, p, keep = online_softmax(scores, seen, m, total, scale, cap, HAS_CAP, True)
    p = tl.broadcast_to(rounded(p, q_c.dtype, CASTS)[None], (PARTS, M, N))
    return m, total, dot(p, c, acc * keep[None, :, None])


@triton.jit(do_not_specialize=["Z", "page_table_stride"])
def mla_decode_kernel(
    o_ptr,  # [B, S, H, L]; unused unless DIRECT
    partial_ptr,  # [B, Z, S * H, L] fp32
    lse_ptr,  # [B, Z, S * H] fp32, base 2
    q_ptr,  # [B, S, H, L + R]
    kv_new_ptr,  # [B, S, L + R]
    cache_ptr,  # [N, P, L + R]
    page_table_ptr,  # [B, W]
    kv_len_ptr,  # [B]
    positions_ptr,  # [B, S] int64
    table_ptr,  # [M, R] fp32
    scale,  # to be multiplied with q . k; includes the scale of an fp8 cache
    cap,
    kv_scale,
    q_batch_stride,
    q_new_stride,
    q_head_stride,
    kv_new_batch_stride,
    kv_new_new_stride,
    cache_page_stride,
    cache_token_stride,
    page_table_stride,
    Z,
    positions_stride,
    table_stride,
    S: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    FUSED: tl.constexpr,  # kv_new is given: rotate, write the cache
    INTERLEAVED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    CASTS: tl.constexpr,
    DIRECT: tl.constexpr,  # one split at most: write o, there is nothing to merge
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,  # columns are cut into so many parts
    PART_L: tl.constexpr,
    PART_R: tl.constexpr,
):
    """Split: one program per BLOCK_M of the S * H (query, head) rows, split of tokens, and sequence.
    Traffic: each cache row of the split is read once and serves as key and as value; the new rows come from kv_new, never from
        the cache, and the program of the last split and first rows writes them there, once.
    Needs: contiguous rows.
    Why: all heads share the rows, so 16 heads fill a matrix tile; each wave multiplies its own part of the columns, where waves
        with tokens of their own would each hold all columns of the queries and of the sums. The length of a split depends on
        the sequence alone, so its result does not change with its neighbours.
    Source: absorbed form of DeepSeek-V2; split over keys as in Flash-Decoding.
    """
    tile, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    new, head = (rows // H).to(tl.int64), (rows % H).to(tl.int64)
    is_row = rows < S * H
    part = tl.arange(0, PARTS)[:, None, None]
    latent = part * PART_L + tl.arange(0, PART_L)[None, None, :]
    rope = part * PART_R + tl.arange(0, PART_R)[None, None, :]
    is_latent, is_rope = latent < L, rope < R
    dtype = q_ptr.dtype.element_ty

    kv_len = tl.load(kv_len_ptr + b)
    old_len = tl.maximum(kv_len - S, 0) if FUSED else kv_len
    split_len, num_splits = kv_splits(old_len, SPLIT, MAX_SPLITS)
    num_splits = tl.maximum(num_splits, 1)
    if (split >= num_splits) | ((kv_len == 0) & (not DIRECT)):
        return
    split_start = split * split_len
    split_stop = tl.minimum(split_start + split_len, old_len)

    q_row_ptr = (q_ptr + b * q_batch_stride + new * q_new_stride + head * q_head_stride)[None, :, None]
    is_query = is_row[None, :, None]
    q_c = tl.load(q_row_ptr + latent, mask=is_query & is_latent, other=0.0)
    if FUSED:
        position = tl.load(positions_ptr + b * positions_stride + new, mask=is_row, other=0)
        angles_ptr = (table_ptr + position * table_stride)[None, :, None]
        q_pe = turned_columns(q_row_ptr + L, rope, is_query & is_rope, angles_ptr, R // 2, INTERLEAVED).to(dtype)
    else:
        q_pe = tl.load(q_row_ptr + L + rope, mask=is_query & is_rope, other=0.0)
    # The token of query `new` is kv_len - S + new; it sees the tokens before it and itself.
    seen_len = tl.where(is_row, kv_len - S + 1 + new.to(tl.int32), 0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([PARTS, BLOCK_M, PART_L], tl.float32)
    pages_ptr = page_table_ptr + b * page_table_stride
    for start in range(split_start, split_stop, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < split_stop
        offsets = tile_offsets(pages_ptr, start, split_stop, cache_page_stride, cache_token_stride, P, BLOCK_N)
        row_ptr = cache_ptr + offsets[None, :, None]
        k_pe = tl.load(row_ptr + L + rope, mask=is_token[None, :, None] & is_rope, other=0.0)
        c = tl.load(row_ptr + latent, mask=is_token[None, :, None] & is_latent, other=0.0)
        c = from_cache(c, dtype, FP8_BIAS, NATIVE)
        k_pe = from_cache(k_pe, dtype, FP8_BIAS, NATIVE)
        seen = is_token[None, :]
        if not FUSED:  # otherwise these are the tokens before all queries
            seen = seen & (tokens[None, :] < seen_len[:, None])
        m, total, acc = attend_latents(q_c, q_pe, m, total, acc, c, k_pe, seen, scale, cap, HAS_CAP, CASTS)

    if FUSED and split == num_splits - 1:
        for first in range(0, S, 16):
            place = first + tl.arange(0, 16)
            fresh_c = tl.zeros([PARTS, 16, PART_L], dtype)
            fresh_pe = tl.zeros([PARTS, 16, PART_R], dtype)
            for fresh in range(tl.maximum(first, S - kv_len), tl.minimum(first + 16, S)):
                row = tl.zeros([], tl.int64) + fresh
                fresh_ptr = kv_new_ptr + b * kv_new_batch_stride + row * kv_new_new_stride
                fresh_angles_ptr = table_ptr + tl.load(positions_ptr + b * positions_stride + row) * table_stride
                new_c = tl.load(fresh_ptr + latent, mask=is_latent, other=0.0)
                new_pe = turned_columns(fresh_ptr + L, rope, is_rope, fresh_angles_ptr, R // 2, INTERLEAVED)
                new_c = to_cache(new_c, kv_scale, FP8_BIAS).to(cache_ptr.dtype.element_ty)
                new_pe = to_cache(new_pe, kv_scale, FP8_BIAS).to(cache_ptr.dtype.element_ty)
                if tile == 0:
                    token = kv_len - S + fresh
                    new_ptr = cache_ptr + token_offsets(pages_ptr, token, None, cache_page_stride, cache_token_stride, P)
                    tl.store(new_ptr + latent, new_c, mask=is_latent)
                    tl.store(new_ptr + L + rope, new_pe, mask=is_rope)
                is_fresh = (place == fresh)[None, :, None]
                fresh_c = tl.where(is_fresh, from_cache(new_c, dtype, FP8_BIAS, NATIVE), fresh_c)
                fresh_pe = tl.where(is_fresh, from_cache(new_pe, dtype, FP8_BIAS, NATIVE), fresh_pe)
            fresh_tokens = kv_len - S + place
            fresh_seen = (place < S)[None, :] & (fresh_tokens >= 0)[None, :] & (fresh_tokens[None, :] < seen_len[:, None])
            m, total, acc = attend_latents(q_c, q_pe, m, total, acc, fresh_c, fresh_pe, fresh_seen, scale, cap, HAS_CAP, CASTS)

    out = acc * (kv_scale / tl.where(total == 0.0, 1.0, total))[None, :, None]
    if DIRECT:
        out_ptr = o_ptr + (b * (S * H) + rows)[None, :, None] * L + latent
        tl.store(out_ptr, out.to(dtype), mask=is_query & is_latent)
    else:
        result = (b * Z + split) * (S * H) + rows
        tl.store(partial_ptr + result[None, :, None] * L + latent, out, mask=is_query & is_latent)
        tl.store(lse_ptr + result, m + tl.log2(total), mask=is_row)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: S, H, itemsize (of a cached value)."""
    rows = dims["S"] * dims["H"]
    # 16 rows fill a matrix tile. 32 halve the reads of the latent and still leave room for two workgroups per compute unit.
    # 64 over 8 waves would halve them again, but every wave has all weights to compute: a third more instructions in all.
    # More do not fit the registers of RDNA.
    block_m = 16 if rows <= 16 or is_rdna(arch) else 32
    made = options(arch, num_warps=4, num_stages=1, matrix=True, shallow=True)
    return {
        # 256 tokens: 300 KB of latent beside the 64 KB that a partial result of 16 heads costs to write and read. At 4096 tokens
        # and 16 heads 16 sequences bring 256 workgroups, one for each compute unit, and 64 bring 1024, two rounds of two each.
        "SPLIT": 256,
        # Tiles of rows spread a long sequence too, and each brings partial results of its own.
        "MAX_SPLITS": 64 if rows <= block_m else 32,
        "BLOCK_M": block_m,
        # 32 rows of 2 bytes are 36 KB on their way for each of two workgroups. Codes of 1 byte are widened in registers, which
        # 32 of them would fill; of 16, three workgroups fit.
        "BLOCK_N": 32 if dims["itemsize"] == 2 and not is_rdna(arch) else 16,
        "PARTS": made["num_warps"],
        **made,
    }


def supports(call: Any) -> str | None:
    latent = call.scalars["latent"]
    return None if latent <= 512 else f"latent: the sums of a tile are kept in registers, expected at most 512, got {latent}"


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Partial results and their log-sum-exps, one per split; none where one split is the most."""
    dims = call.dims
    itemsize = call.dtypes["cache"].itemsize
    chosen = config(archs.current(call.device), {**dims, "itemsize": itemsize})
    splits = num_splits(dims["W"], dims["P"], chosen["SPLIT"], chosen["MAX_SPLITS"])
    shape = (dims["B"], splits if splits > 1 else 0, dims["S"] * dims["H"])
    return [((*shape, call.scalars["latent"]), torch.float32), (shape, torch.float32)]


def launch(
    o: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    kv_new: torch.Tensor | None,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_len: torch.Tensor,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    scale: float,
    latent: int,
    interleaved: bool,
    cap: float,
    kv_scale: float,
) -> None:
    check_rows("mla_decode", q=q, kv_new=kv_new, cache=cache, page_table=page_table, positions=positions, table=table)
    batch, num_new, heads, width = q.shape
    if batch == 0:
        return
    rows, rope = num_new * heads, width - latent
    arch = archs.current(q.device)
    chosen = config(arch, {"S": num_new, "H": heads, "itemsize": cache.element_size()})
    splits = max(1, partial.shape[1])
    operands = operand_args(arch, cache.dtype)
    factor = float(kv_scale) if operands["FP8_BIAS"] else 1.0
    mla_decode_kernel[(triton.cdiv(rows, chosen["BLOCK_M"]), splits, batch)](
        o,
        partial,
        lse,
        q,
        kv_new,
        as_bytes(cache),
        page_table,
        kv_len,
        positions,
        table,
        float(scale) * factor,
        float(cap),
        factor,
        *q.stride()[:3],
        *(kv_new.stride()[:2] if kv_new is not None else (0, 0)),
        *cache.stride()[:2],
        page_table.stride(0),
        splits,
        positions.stride(0) if positions is not None else 0,
        table.stride(0) if table is not None else 0,
        S=num_new,
        H=heads,
        L=latent,
        R=rope,
        P=cache.shape[1],
        FUSED=kv_new is not None,
        INTERLEAVED=interleaved,
        HAS_CAP=cap > 0,
        DIRECT=splits == 1,
        PART_L=max(16, triton.next_power_of_2(latent) // chosen["PARTS"]),
        PART_R=max(16, triton.next_power_of_2(rope) // chosen["PARTS"]),
        **operands,
        **chosen,
    )
    if splits > 1:
        fused = num_new if kv_new is not None else 0
        limits = {"split": chosen["SPLIT"], "max_splits": chosen["MAX_SPLITS"]}
        merge(o.view(batch, rows, latent), partial, lse, None, kv_len, window=0, num_new=fused, **limits)
