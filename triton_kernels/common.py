# SPDX-License-Identifier: Apache-2.0
"""What several kernels share: launch options, fp8 codes of rows, the order of tiles, sums of split products.

fp8 tensors travel as bytes. `FP8_BIAS` names the dialect inside kernels: 0 no fp8, 7 e4m3fn, 8 e4m3fnuz.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer.arch import Arch
from rocm_infer.triton_kernels import is_before
from rocm_infer.triton_kernels._paged import FP8_BIASES, INTERPRETED, encode_fp8, fp8_as_half

SMALLEST_AMAX = tl.constexpr(1e-4)
LONGEST_GROUP = 32768


def fp8_args(arch: Arch, dtype: torch.dtype | None) -> dict[str, Any]:
    """FP8_BIAS, and whether the target's own conversions and products know that dialect.

    The interpreter's casts neither round to nearest nor know the NaN of fnuz: there bytes are made by arithmetic.
    """
    native = dtype is not None and arch.multiplies(dtype) and not INTERPRETED.value
    return {"FP8_BIAS": FP8_BIASES.get(dtype, 0) if dtype else 0, "NATIVE": native}


def options(
    arch: Arch, *, num_warps: int, num_stages: int = 2, waves_per_eu: int = 0, matrix: bool = False, shallow: bool = False
) -> dict[str, Any]:
    """Launch options by the names the target's compiler knows.

    num_warps: in waves of 64; GPUs with waves of 32 get twice as many, so that a lane's share of a tile stays the same.
    Fusion of products and sums is off, so that a row's bits do not depend on the tile it is in; where it pays, kernels write fma.
    matrix: all tiles use the 16x16 instruction. It needs less power than 32x32, serves 16 rows, and, being the same for every
        tile, keeps the order of sums.
    shallow: some product adds up less than 32 terms at a time.
    """
    made: dict[str, Any] = {"num_warps": num_warps * 64 // arch.wave, "num_stages": num_stages, "enable_fp_fusion": False}
    if arch.vendor == "amd":
        made["waves_per_eu"] = waves_per_eu
        if matrix and arch.wave == 64:
            made["matrix_instr_nonkdim"] = 16
            # 16-byte reads from LDS; gfx950's instructions take that many by themselves. Up to 3.7 Triton makes wrong products of
            # 16 terms with it.
            if arch.name != "gfx950" and not (shallow and is_before(triton.__version__, (3, 8))):
                made["kpack"] = 2
    return made


def refuse_fp8(group: int, out_dtype: torch.dtype | None, width: int) -> str | None:
    """Why a row of `width` cannot be quantised so; None if it can, or is not to be quantised."""
    if group and out_dtype not in FP8_BIASES:
        return f"fp8 output: expected out_dtype float8_e4m3fn or float8_e4m3fnuz, got {out_dtype}"
    if group < 0:
        return f"fp8 output: expected group > 0, got {group}"
    if min(group, width) > LONGEST_GROUP:
        return f"group: a group is kept in registers, expected at most {LONGEST_GROUP}, got {group}"
    if group < width and group & (group - 1):
        return f"group: expected a power of two or the whole row ({width}), got {group}"
    return None


@triton.jit
def to_fp8(x, FP8_BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """fp32, already clamped -> byte."""
    if NATIVE:
        if FP8_BIAS == 7:
            return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return x.to(tl.float8e4b8).to(tl.uint8, bitcast=True)
    else:
        return encode_fp8(x, FP8_BIAS)


@triton.jit
def store_quantised(
    x,  # [ROWS, BLOCK] fp32, 0 outside the row
    y_ptr,  # bytes of the first row, at the first column
    scale_ptr,  # scale of the first group
    rows,  # [ROWS] int64
    num_rows,
    width,  # columns left, from the first one of this block
    y_stride,
    scale_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # divides BLOCK
    FP8_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write rows as fp8 with a scale per GROUP columns: max(|x|, 1e-4) / largest value; then x times its reciprocal."""
    NUM_GROUPS: tl.constexpr = BLOCK // GROUP
    largest = 448.0 if FP8_BIAS == 7 else 240.0
    grouped = tl.reshape(x, (ROWS, NUM_GROUPS, GROUP))
    amax = tl.maximum(tl.max(tl.abs(grouped), 2), SMALLEST_AMAX)
    scale = tl.div_rn(amax, tl.full(amax.shape, largest, tl.float32))
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    value = grouped * inverse[:, :, None]
    # The product may end one ulp beyond the largest value, where fnuz casts make NaN. NaN itself must pass.
    value = tl.where(value > largest, largest, tl.where(value < -largest, -largest, value))
    codes = tl.reshape(to_fp8(value, FP8_BIAS, NATIVE), (ROWS, BLOCK))
    columns, groups = tl.arange(0, BLOCK), tl.arange(0, NUM_GROUPS)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    tl.store(y_ptr + rows[:, None] * y_stride + columns[None, :], codes, mask=inside)
    inside = (rows < num_rows)[:, None] & (groups * GROUP < width)[None, :]
    tl.store(scale_ptr + rows[:, None] * scale_stride + groups[None, :], scale, mask=inside)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)), fp32; exp overflows to infinity for very negative x, and the quotient to 0."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def matrix_operand(x, FP8_BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """fp8 bytes as tl.dot takes them: the native type; without one fp16, which holds every code exactly and is a shift away."""
    if NATIVE:
        if FP8_BIAS == 7:
            return x.to(tl.float8e4nv, bitcast=True)
        else:
            return x.to(tl.float8e4b8, bitcast=True)
    else:
        return fp8_as_half(x, FP8_BIAS)


@triton.jit
def tile_of(pid, num_m, num_n, NUM_XCDS: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile along M, tile along N) of a program.

    Hardware deals programs to dies in turn, so each die first gets a run of neighbouring tiles: they share its L2 cache. Within
    a run GROUP_M row tiles walk along N together, so that a column tile of weights is read once for all of them.
    """
    num_tiles = num_m * num_n
    if NUM_XCDS > 1:
        share, rest = num_tiles // NUM_XCDS, num_tiles % NUM_XCDS
        die = pid % NUM_XCDS
        pid = die * share + tl.minimum(die, rest) + pid // NUM_XCDS
    group = pid // (GROUP_M * num_n)
    first_m = group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    place = pid % (GROUP_M * num_n)
    return first_m + place % rows, place // rows


@triton.jit
def within(BLOCK: tl.constexpr, left):
    """0 .. BLOCK - 1 as rows of a tile of which only `left` exist; the others stand for row 0."""
    place = tl.arange(0, BLOCK)
    return tl.where(place < left, place, 0)


def split_plan(arch: Arch, num_columns: int, depth: int, block_k: int) -> tuple[int, int]:
    """(K of a split, number of splits) of a product [M, K] x [num_columns, K]: a function of the weight alone.

    A few rows make only num_columns / 64 tiles. Splits along K bring them to two per compute unit, which hides the latency of
    the weights; below 512 of K the partial sums would cost as much as the weights.
    """
    wanted = max(1, min(triton.cdiv(2 * arch.num_cus, triton.cdiv(num_columns, 64)), depth // 512))
    split_len = max(1, triton.cdiv(triton.cdiv(depth, block_k), wanted)) * block_k
    return split_len, max(1, triton.cdiv(depth, split_len))


def tiles(arch: Arch, num_rows: int, num_columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile of a dense product."""
    if arch.vendor == "nvidia":
        return 64, 64  # one instruction shape for every number of rows, and so one order of sums
    # Few rows: the product streams the weight; a tile as high as the batch wastes no matrix cycles.
    for rows in (16, 32, 64):
        if num_rows <= rows:
            return rows, 64
    # A tile of 128 x 128 reads 1/64 byte per product, but only pays when it fills the compute units.
    if triton.cdiv(num_rows, 128) * triton.cdiv(num_columns, 128) >= arch.num_cus:
        return 128, 128
    return 64, 128


def waves(arch: Arch, block_m: int, block_n: int, row_bytes: int, num_weights: int = 1) -> int:
    """Waves of 64 of a program that multiplies a tile of block_m rows with num_weights tiles of block_n rows, row_bytes each."""
    if block_m * block_n * num_weights >= 128 * 128:
        return 8  # 32 registers per copy of the output tile; fp8 products need up to three
    # 16 bytes per lane and step from the weight, which is what few rows wait for. A wave beyond the 16 x 16 tiles of the output
    # would be given all of its products once more, with their reads of LDS and their decoding.
    most = min(4, (block_m // 16) * (block_n // 16) * arch.wave // 64)
    return max(1, min(most, block_n * row_bytes // 1024))


def stages(arch: Arch, block_m: int, step_bytes: int, num_steps: int, num_weights: int = 1) -> int:
    """Steps along K on their way at once, the one in the products included; step_bytes is what a step takes of LDS."""
    # In a loop of four stages Triton 3.9 takes two products for those of attention, and fails for gfx950.
    most = 4 if num_weights == 1 else 3
    if block_m > 64:
        return 2  # bound by products: LDS is better spent on a second workgroup
    # Bound by memory: up to three steps behind the one in hand, in half of LDS, and no more than there are. gfx950 and NVIDIA
    # copy memory to LDS without registers between, so there the step in hand lies in LDS too; RDNA's registers serve a further
    # workgroup better.
    in_registers = 1 if arch.wave == 64 and arch.name != "gfx950" else 0
    return max(2, min(most, in_registers + arch.lds_bytes // 2 // step_bytes, 1 + num_steps))


def split_tiles(arch: Arch, dims: dict[str, int], block_m: int, block_n: int, block_k: int) -> dict[str, Any]:
    """Options of a dense product [M, K] x [N, K] in tiles of block_m x block_n, a step being block_k elements, 128 bytes."""
    split_len, num_splits = split_plan(arch, dims["N"], dims["K"], block_k)
    num_tiles = triton.cdiv(dims["M"], block_m) * triton.cdiv(dims["N"], block_n)
    return {
        "split_len": split_len,
        "num_splits": num_splits,
        "WHOLE": num_splits == 1 or num_tiles >= arch.num_cus,
        "SINGLE": num_splits == 1,
        "NUM_XCDS": arch.num_xcds,
        "GROUP_M": 8,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "EVEN_K": dims["K"] % block_k == 0,
        **options(
            arch,
            num_warps=waves(arch, block_m, block_n, 128),
            num_stages=stages(arch, block_m, (block_m + block_n) * 128, split_len // block_k),
            matrix=True,
        ),
    }


def split_grid(chosen: dict[str, Any], m: int, n: int) -> tuple[int, int]:
    """Programs of a product in tiles of `split_tiles`, and along its splits."""
    num_tiles = triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"])
    return num_tiles, 1 if chosen["WHOLE"] else chosen["num_splits"]


def split_sums(chosen: dict[str, Any], m: int, n: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Scratch: the partial sums [num_splits, M, N] fp32; nothing of them where one program sums all splits."""
    return [((0 if chosen["WHOLE"] else chosen["num_splits"], m, n), torch.float32)]


def check_tile(op: str, **tensors: torch.Tensor) -> None:
    """Offsets within a tile of 128 rows are 32-bit, those of tiles 64-bit; rows are read in vectors."""
    for name, tensor in tensors.items():
        if tensor.stride(-2) >= 1 << 24:
            raise ValueError(f"{op}: {name}: expected rows less than 2^24 elements apart, got {tensor.stride(-2)}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: {name}: expected stride 1 in the last dimension, got {tensor.stride()}; use .contiguous()")


@triton.jit(do_not_specialize=["num_splits"])
def add_splits_kernel(
    y_ptr,  # [M, N]
    partial_ptr,  # [num_splits, M, N] fp32
    bias_ptr,  # [N], or None
    split_size,  # M * N
    num_splits,
    N,
    y_stride,
    MOST: tl.constexpr,  # a power of two, at least num_splits
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split: one program per row and BLOCK columns.
    Traffic: each partial sum is read once.
    Why: added in the order of the splits, as a program does that keeps them all to itself.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros([BLOCK], tl.float32)
    partial_ptr += row * N
    for split in tl.static_range(MOST):
        left = tl.where(num_splits > split, N, 0)
        total += tl.load(partial_ptr + columns, mask=columns < left, other=0.0)
        partial_ptr += split_size
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_stride + columns, total.to(y_ptr.dtype.element_ty), mask=inside)


def add_splits(arch: Arch, y: torch.Tensor, partial: torch.Tensor, bias: torch.Tensor | None) -> None:
    """y [M, N] = sum of partial [num_splits, M, N] + bias."""
    num_splits, m, n = partial.shape
    add_splits_kernel[(m, triton.cdiv(n, 256))](
        y,
        partial,
        bias,
        m * n,
        num_splits,
        n,
        y.stride(0),
        MOST=triton.next_power_of_2(num_splits),
        HAS_BIAS=bias is not None,
        BLOCK=256,
        **options(arch, num_warps=1),
    )
