# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product: every row meets the weight of its expert, over slots sorted by `moe_align`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import FP8_BIASES, as_bytes, dot
from rocm_infer.triton_kernels.common import check_tile, fp8_args, matrix_operand, options, silu, stages, tile_of, waves, within

BLOCKS = (16, 32, 64, 128)


@triton.jit
def scaled(acc, product, x_scale, w_scale_ptr, column, k_block, row_stride, column_stride, ALIGNED: tl.constexpr):
    """acc + product * scales of 128 of K. column: of each column of the tile; ALIGNED: all lie in one block of 128."""
    if ALIGNED:
        block = tl.min(column, 0) // 128
        scale = x_scale * tl.load(w_scale_ptr + block.to(tl.int64) * row_stride + k_block * column_stride)
        scale = tl.broadcast_to(scale[:, None], product.shape)
    else:
        w_scale = tl.load(w_scale_ptr + (column // 128).to(tl.int64) * row_stride + k_block * column_stride)
        scale = x_scale[:, None] * w_scale[None, :]
    return tl.fma(product, scale, acc)


@triton.jit(do_not_specialize=["num_slots", "slots_per_row"])
def moe_gemm_kernel(
    y_ptr,  # [S, WIDTH]
    x_ptr,  # [R, K], or bytes of fp8
    w_ptr,  # [E, N, K], or bytes of fp8
    sorted_slots_ptr,  # [num_blocks * BLOCK_M] int32
    block_experts_ptr,  # [num_blocks] int32
    num_padded_ptr,  # [1] int32
    slot_weights_ptr,  # [S] fp32, or None
    x_scale_ptr,  # [R, ceil(K / 128)] fp32, or None
    w_scale_ptr,  # [E, ceil(N / 128), ceil(K / 128)] fp32, or None
    num_slots,
    slots_per_row,
    width,  # columns of y: N, or N / 2 with SILU
    K,
    y_stride,
    x_stride,
    w_expert_stride,
    w_stride,
    x_scale_stride,
    x_scale_column_stride,
    w_scale_expert_stride,
    w_scale_stride,
    w_scale_column_stride,
    SILU: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    FP8_BIAS: tl.constexpr,  # 0: no fp8
    NATIVE: tl.constexpr,
    ALIGNED: tl.constexpr,  # width is a multiple of 128: a tile's columns of up lie in one block of scales
    EVEN_K: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides 128
    BLOCK_K: tl.constexpr,  # 128 with fp8
):
    """Split: one program per block of sorted slots and BLOCK_N columns of y; with SILU it owns both halves of these columns.
    Traffic: tiles of x and w pass through LDS, ahead of the products. A weight is read once per block of its expert, and blocks
        of one expert are neighbours in time, so all but the first find it in the L2 cache.
    Needs: contiguous rows.
    Why: gate and up are multiplied side by side from one tile of x and never leave registers. The grid is as large as any routing
        may need; programs beyond num_padded leave at once, so nobody has to ask the device how many there are.
    Source: Gale et al. 2022.
    """
    tl.assume(w_stride >= 0)
    num_m = tl.load(num_padded_ptr) // BLOCK_M
    num_n = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    if pid >= num_m * num_n:
        return
    tile_m, tile_n = tile_of(pid, num_m, num_n, NUM_XCDS, GROUP_M)
    expert = tl.load(block_experts_ptr + tile_m).to(tl.int64)
    slots = tl.load(sorted_slots_ptr + tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
    is_slot = slots < num_slots
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + slots.to(tl.int64)[:, None] * y_stride + columns[None, :]
    inside = is_slot[:, None] & (columns < width)[None, :]
    if expert < 0:
        tl.store(y_ptrs, tl.zeros([BLOCK_M, BLOCK_N], y_ptr.dtype.element_ty), mask=inside)
        return

    # Padding repeats row 0, columns beyond the edge repeat the first one; both are computed and not stored.
    rows = tl.where(is_slot, slots // slots_per_row, 0).to(tl.int64)
    column_in_tile = within(BLOCK_N, width - tile_n * BLOCK_N)
    k_in_tile = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * x_stride + k_in_tile[None, :]
    w_offsets = column_in_tile[None, :] * w_stride + k_in_tile[:, None]
    gate_ptr = w_ptr + expert * w_expert_stride + (tile_n * BLOCK_N).to(tl.int64) * w_stride
    up_ptr = gate_ptr + tl.cast(width, tl.int64) * w_stride  # Triton makes a width of 1 a constant
    if FP8_BIAS:
        x_scale_ptrs = x_scale_ptr + rows * x_scale_stride
        w_scale_ptr += expert * w_scale_expert_stride
        column = tile_n * BLOCK_N + column_in_tile
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k)
            w = tl.load(gate_ptr + k + w_offsets)
        else:
            x = tl.load(x_ptrs + k, mask=(k_in_tile < K - k)[None, :], other=0)
            w = tl.load(gate_ptr + k + w_offsets, mask=(k_in_tile < K - k)[:, None], other=0)
        if SILU:
            if EVEN_K:
                up = tl.load(up_ptr + k + w_offsets)
            else:
                up = tl.load(up_ptr + k + w_offsets, mask=(k_in_tile < K - k)[:, None], other=0)
        if FP8_BIAS:
            block = k // BLOCK_K
            x, w = matrix_operand(x, FP8_BIAS, NATIVE), matrix_operand(w, FP8_BIAS, NATIVE)
            zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            x_scale = tl.load(x_scale_ptrs + block * x_scale_column_stride)
            acc = scaled(acc, dot(x, w, zero), x_scale, w_scale_ptr, column, block, w_scale_stride, w_scale_column_stride, True)
            if SILU:
                up = matrix_operand(up, FP8_BIAS, NATIVE)
                acc_up = scaled(
                    acc_up, dot(x, up, zero), x_scale, w_scale_ptr, width + column, block, w_scale_stride, w_scale_column_stride,
                    ALIGNED,
                )  # fmt: skip
        else:
            acc = dot(x, w, acc)
            if SILU:
                acc_up = dot(x, up, acc_up)
    if SILU:
        acc = silu(acc) * acc_up
    if HAS_WEIGHTS:
        acc *= tl.load(slot_weights_ptr + slots, mask=is_slot, other=0.0)[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: M (block of moe_align), Y (blocks at most), W (columns of y), K, itemsize, silu, native (false: fp8 to be decoded)."""
    block_m, halves = dims["M"], 2 if dims["silu"] else 1
    # As wide as leaves two programs per compute unit: a decode step has few blocks and wants its weights from everywhere at once.
    block_n = (128 if dims["native"] else 64) // halves  # decoding takes the registers of a wider tile
    while block_n > 16 and dims["Y"] * triton.cdiv(dims["W"], block_n) < 2 * arch.num_cus:
        block_n //= 2
    few_rows = block_m <= 32
    # 128 bytes of a row: whole cache lines. A narrow 16-bit tile takes twice as much, or its products wait for addresses.
    block_k = (256 if few_rows and dims["itemsize"] == 2 else 128) // dims["itemsize"]
    step_bytes = (block_m + block_n * halves) * block_k * dims["itemsize"]
    return {
        "NUM_XCDS": arch.num_xcds,
        "GROUP_M": 1 if few_rows else 8,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "EVEN_K": dims["K"] % block_k == 0,
        **options(
            arch,
            num_warps=waves(arch, block_m, block_n, block_k * dims["itemsize"], halves),
            num_stages=stages(arch, block_m, step_bytes, triton.cdiv(dims["K"], block_k), halves),
            matrix=True,
        ),
    }


def supports(call: Any) -> str | None:
    dims = call.dims
    if dims["Y"] and dims["Z"] // dims["Y"] not in BLOCKS:
        return f"sorted_slots: expected blocks of {', '.join(map(str, BLOCKS))}, got {dims['Z'] // dims['Y']}"
    return None


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded: torch.Tensor,
    slot_weights: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    *,
    num_slots: int,
    slots_per_row: int,
    silu: bool,
    out_dtype: torch.dtype | None,
) -> None:
    num_blocks, depth = block_experts.shape[0], x.shape[1]
    if y.numel() == 0 or num_blocks == 0:
        return
    check_tile("moe_gemm", x=x, w=w)
    arch = archs.current(x.device)
    width = y.shape[1]
    dims = {"M": sorted_slots.shape[0] // num_blocks, "Y": num_blocks, "W": width, "K": depth}
    native = x.dtype not in FP8_BIASES or arch.multiplies(x.dtype)
    chosen = config(arch, {**dims, "itemsize": x.element_size(), "silu": silu, "native": native})
    moe_gemm_kernel[(num_blocks * triton.cdiv(width, chosen["BLOCK_N"]),)](
        y,
        as_bytes(x),
        as_bytes(w),
        sorted_slots,
        block_experts,
        num_padded,
        slot_weights,
        x_scale,
        w_scale,
        num_slots,
        slots_per_row,
        width,
        depth,
        y.stride(0),
        x.stride(0),
        *w.stride()[:2],
        *((0, 0) if x_scale is None else x_scale.stride()),
        *((0, 0, 0) if w_scale is None else w_scale.stride()),
        SILU=silu,
        HAS_WEIGHTS=slot_weights is not None,
        ALIGNED=width % 128 == 0,
        **fp8_args(arch, x.dtype),
        **chosen,
    )
