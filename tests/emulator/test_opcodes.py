# SPDX-License-Identifier: Apache-2.0
"""Each opcode family, as single assembled instructions, against numpy on random and special values."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.assemble import Result, assemble, device, run_wrapped, wrap

G = 6  # workgroups: sets of inputs
u32, i32, f32, u64, i64, f64 = np.uint32, np.int32, np.float32, np.uint64, np.int64, np.float64
_SPECIAL_F32 = np.array([0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x80000001,
                         0x00800000, 0x7F7FFFFF, 0x3F000000, 0x40490FDB, 0x4F000000, 0xCF000000, 0x4F800000, 0x47C35000], u32)  # fmt: skip
_SPECIAL_INT = np.array(
    [0, 1, 2, 31, 32, 33, 63, 64, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x10000, 0xFFFFFF, 0x1000000], u32
)
_SPECIAL_F16 = np.array([0, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 1, 0x8001, 0x400, 0x7BFF, 0x3800], np.uint16)


def _inputs(kind: str) -> np.ndarray:
    """[G, 64, 16] dwords: half random, half special."""
    rng = np.random.default_rng(7)
    shape = (G, 64, 16)
    if kind == "f32":
        data = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, shape)).astype(f32).view(u32)
        return np.where(rng.random(shape) < 0.3, rng.choice(_SPECIAL_F32, shape), data)
    if kind == "f16":
        data = rng.standard_normal((*shape, 2)).astype(np.float16).view(np.uint16)
        data = np.where(rng.random(data.shape) < 0.3, rng.choice(_SPECIAL_F16, data.shape), data)
        return np.ascontiguousarray(data.astype(np.uint16)).view(u32)[..., 0]
    if kind == "f64":
        data = rng.standard_normal((G, 64, 8)) * 10.0 ** rng.integers(-9, 9, (G, 64, 8))
        data = np.where(rng.random(data.shape) < 0.2, rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0], data.shape), data)
        return np.ascontiguousarray(data).view(u32)
    if kind == "small":
        return rng.integers(0, 64, shape).astype(u32)
    data = rng.integers(0, 1 << 32, shape, dtype=np.uint64).astype(u32)
    return np.where(rng.random(shape) < 0.4, rng.choice(_SPECIAL_INT, shape), data)


class In:
    """The inputs of a case: a, b, c are v8, v9, v10 and old is v24 (which starts equal to v8); pair(i) is v[8+2i:9+2i]."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def r(self, i: int, dtype: type = u32) -> np.ndarray:
        return np.ascontiguousarray(self.data[:, :, i]).view(dtype)

    def pair(self, i: int, dtype: type = u64) -> np.ndarray:
        return np.ascontiguousarray(self.data[:, :, 2 * i : 2 * i + 2]).view(dtype)[..., 0]

    def half(self, i: int, high: bool = False, dtype: type = np.float16) -> np.ndarray:
        return np.ascontiguousarray(self.r(i) >> (16 if high else 0) & 0xFFFF).astype(np.uint16).view(dtype)

    def s(self, i: int, dtype: type = u32) -> np.ndarray:
        return np.ascontiguousarray(self.data[:, 0, i]).view(dtype)

    def s64(self, i: int, dtype: type = u64) -> np.ndarray:
        return np.ascontiguousarray(self.data[:, 0, 2 * i : 2 * i + 2]).view(dtype)[..., 0]


def _fma(a, b, c):
    """f32 fused multiply-add: exact product in f64, one more rounding only where the sum needs more than 53 bits."""
    wide = np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(f32)


def _minmax(f, a, b):
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, f(a, b)))


def _max16(a, b):
    """Of two zeros the positive one."""
    return np.where((a == 0) & (b == 0) & ~(np.signbit(a) & np.signbit(b)), np.float16(0), _minmax(np.fmax, a, b))


def _saturate(x, dtype):
    info = np.iinfo(dtype)
    y = np.where(np.isnan(x), 0, np.clip(np.trunc(x.astype(f64)), info.min, info.max))
    return y.astype(np.int64).astype(dtype)


def _perm(a, b, c):
    data = a.astype(u64) << u64(32) | b
    out = np.zeros_like(a)
    for i in range(4):
        s = (c >> u32(8 * i) & u32(255)).astype(u64)
        byte = data >> (u64(8) * np.minimum(s, 7)) & u64(255)
        sign = np.where(data >> (u64(16) * (np.clip(s, 8, 11) - u64(8)) + u64(15)) & u64(1), u64(255), u64(0))
        out |= (np.where(s < 8, byte, np.where(s < 12, sign, np.where(s == 12, u64(0), u64(255))))).astype(u32) << u32(8 * i)
    return out


def _sext(x, bits):
    return (x.astype(u32) << u32(32 - bits)).view(i32) >> i32(32 - bits)


# name: (code, kind of input, expected, how to read the result, absolute tolerance relative to the value)
V, VF, V64, VD, VH = "v24:u32", "v24:f32", "v24:u64", "v24:f64", "v24:f16"
CASES: dict[str, tuple] = {
    "add_f32": ("v_add_f32_e32 v24, v8, v9", "f32", lambda x: x.r(0, f32) + x.r(1, f32), VF),
    "add_f32 neg abs": ("v_add_f32_e64 v24, -v8, |v9|", "f32", lambda x: -x.r(0, f32) + np.abs(x.r(1, f32)), VF),
    "add_f32 clamp": ("v_add_f32_e64 v24, v8, v9 clamp", "f32", lambda x: np.clip(np.nan_to_num(x.r(0, f32) + x.r(1, f32), posinf=2, neginf=-2), 0, 1), VF),
    "mul_f32 omod": ("v_mul_f32_e64 v24, v8, v9 mul:2", "f32", lambda x: x.r(0, f32) * x.r(1, f32) * f32(2), VF),
    "sub_f32 literal": ("v_sub_f32_e32 v24, 0x40490fdb, v9", "f32", lambda x: f32(np.pi) - x.r(1, f32), VF),
    "mul_f32 2pi": ("v_mul_f32_e32 v24, 0.15915494, v9", "f32", lambda x: np.array(0x3E22F983, u32).view(f32) * x.r(1, f32), VF),
    "mul_f32 scalar": ("v_mul_f32_e32 v24, s9, v9", "f32", lambda x: x.s(1, f32)[:, None] * x.r(1, f32), VF),
    "min_f32": ("v_min_f32_e32 v24, v8, v9", "f32", lambda x: _minmax(np.fmin, x.r(0, f32), x.r(1, f32)), VF),
    "max_f32": ("v_max_f32_e32 v24, v8, v9", "f32", lambda x: _minmax(np.fmax, x.r(0, f32), x.r(1, f32)), VF),
    "max3_f32": ("v_max3_f32 v24, v8, v9, v10", "f32", lambda x: np.fmax(np.fmax(x.r(0, f32), x.r(1, f32)), x.r(2, f32)), VF),
    "med3_f32": ("v_med3_f32 v24, v8, v9, v10", "small", lambda x: np.sort(np.stack([x.r(i, f32) for i in range(3)]), 0)[1], VF),
    "fma_f32": ("v_fma_f32 v24, v8, -v9, v10", "f32", lambda x: _fma(x.r(0, f32), -x.r(1, f32), x.r(2, f32)), VF),
    "fmac_f32": ("v_fmac_f32_e32 v24, v9, v10", "f32", lambda x: _fma(x.r(1, f32), x.r(2, f32), x.r(0, f32)), VF),
    "fmaak": ("v_fmaak_f32 v24, v8, v9, 0x40000000", "f32", lambda x: _fma(x.r(0, f32), x.r(1, f32), np.full_like(x.r(0, f32), 2)), VF),
    "fmamk": ("v_fmamk_f32 v24, v8, 0x40000000, v9", "f32", lambda x: _fma(x.r(0, f32), np.full_like(x.r(0, f32), 2), x.r(1, f32)), VF),
    "ldexp_f32": ("v_ldexp_f32 v24, 1.0, v8", "small", lambda x: np.ldexp(f32(1), x.r(0, i32)), VF),
    "floor_f32": ("v_floor_f32_e32 v24, v8", "f32", lambda x: np.floor(x.r(0, f32)), VF),
    "rndne_f32": ("v_rndne_f32_e32 v24, v8", "f32", lambda x: np.rint(x.r(0, f32)), VF),
    "trunc_f32": ("v_trunc_f32_e32 v24, v8", "f32", lambda x: np.trunc(x.r(0, f32)), VF),
    "rcp_f32": ("v_rcp_f32_e32 v24, v8", "f32", lambda x: _no_denormal(1 / _no_denormal(x.r(0, f32))), VF),
    "sqrt_f32": ("v_sqrt_f32_e32 v24, v8", "f32", lambda x: np.sqrt(x.r(0, f32)), VF),
    "rsq_f32": ("v_rsq_f32_e32 v24, v8", "f32", lambda x: (1 / np.sqrt(_no_denormal(x.r(0, f32)).astype(f64))).astype(f32), VF),
    "log_f32": ("v_log_f32_e32 v24, v8", "f32", lambda x: np.log2(_no_denormal(x.r(0, f32))), VF, 1e-6),
    "exp_f32": ("v_exp_f32_e32 v24, v8", "f32", lambda x: _no_denormal(np.exp2(x.r(0, f32))), VF, 1e-6),
    "sin_f32": ("v_sin_f32_e32 v24, v8", "small", lambda x: np.sin(2 * np.pi * x.r(0, f32).astype(f64)).astype(f32), VF, 1e-6),
    "div_fixup": ("v_div_fixup_f32 v24, v8, v9, v10", "small", lambda x: _fixup(x), VF),
    "pk_add_f32": ("v_pk_add_f32 v[24:25], v[8:9], v[10:11] op_sel:[0,1] op_sel_hi:[1,0] neg_lo:[0,1]", "f32", lambda x: _two(x.r(0, f32) - x.r(3, f32), x.r(1, f32) + x.r(2, f32)), V64),
    "pk_add_f32 zero": ("v_pk_add_f32 v[24:25], v[8:9], 0 neg_lo:[1,1] neg_hi:[1,1]", "f32", lambda x: _two(-x.r(0, f32) - f32(0), -x.r(1, f32) - f32(0)), V64),
    "pk_fma_f32": ("v_pk_fma_f32 v[24:25], v[8:9], v[10:11], v[12:13]", "f32", lambda x: _two(*(_fma(x.r(i, f32), x.r(2 + i, f32), x.r(4 + i, f32)) for i in range(2))), V64),
    "pk_mov_b32": ("v_pk_mov_b32 v[24:25], v[8:9], v[10:11] op_sel:[1,0]", "int", lambda x: _two(x.r(1), x.r(2)), V64),
    "add_f16": ("v_add_f16_e32 v24, v8, v9", "f16", lambda x: x.half(0) + x.half(1), VH),
    "fma_f16 op_sel": ("v_fma_f16 v24, v8, v9, v10 op_sel:[1,0,0,0]", "f16", lambda x: (x.half(0, True).astype(f64) * x.half(1) + x.half(2)).astype(np.float16), VH),
    "pk_mul_f16": ("v_pk_mul_f16 v24, v8, v9 op_sel_hi:[1,0]", "f16", lambda x: _halves(x.half(0) * x.half(1), x.half(0, True) * x.half(1)), V),
    "pk_max_f16": ("v_pk_max_f16 v24, v8, v9", "f16", lambda x: _halves(*(_max16(x.half(0, h), x.half(1, h)) for h in (False, True))), V),
    "pk_add_u16": ("v_pk_add_u16 v24, v8, v9", "int", lambda x: _halves(*(x.half(0, h, np.uint16) + x.half(1, h, np.uint16) for h in (False, True))), V),
    "mad_mix_f32": ("v_fma_mix_f32 v24, v8, v9, v10 op_sel:[1,0,0] op_sel_hi:[1,0,0]", "f16", lambda x: _fma(x.half(0, True).astype(f32), x.r(1, f32), x.r(2, f32)), VF, 1e-7),
    "fma_mix omitted": ("v_fma_mix_f32 v24, v8, -v9, |v10|", "f32", lambda x: _fma(x.r(0, f32), -x.r(1, f32), np.abs(x.r(2, f32))), VF),
    "fma_mix zeros": ("v_fma_mix_f32 v24, v8, v9, v10 op_sel_hi:[0,0,0]", "f32", lambda x: _fma(x.r(0, f32), x.r(1, f32), x.r(2, f32)), VF),
    "fma_mix halves": ("v_fma_mix_f32 v24, v8, v9, v10 op_sel:[0,1,0] op_sel_hi:[1,1,1]", "f16", lambda x: _fma(*(x.half(i, i == 1).astype(f32) for i in range(3))), VF),
    "fma_mixlo omitted": ("v_fma_mixlo_f16 v24, v8, v9, v10", "f32", lambda x: x.r(0) & 0xFFFF0000 | _half_bits(_fma(*(x.r(i, f32) for i in range(3)))), V, 0, lambda d: _moderate(d)),
    "fma_mixhi": ("v_fma_mixhi_f16 v24, v8, v9, v10 op_sel_hi:[0,1,0]", "f32", lambda x: x.r(0) & 0xFFFF | _half_bits(_fma(x.r(0, f32), x.half(1).astype(f32), x.r(2, f32))) << 16, V, 0, lambda d: _moderate(d)),
    "add_f64": ("v_add_f64 v[24:25], v[8:9], -v[10:11]", "f64", lambda x: x.pair(0, f64) - x.pair(1, f64), VD),
    "mul_f64": ("v_mul_f64 v[24:25], v[8:9], v[10:11]", "f64", lambda x: x.pair(0, f64) * x.pair(1, f64), VD),
    "mul_f64 literal": ("v_mul_f64 v[24:25], v[8:9], 0.5", "f64", lambda x: x.pair(0, f64) * 0.5, VD),
    # integers
    "add_u32": ("v_add_u32_e32 v24, v8, v9", "int", lambda x: x.r(0) + x.r(1), V),
    "sub_u32 clamp": ("v_sub_u32_e64 v24, v8, v9 clamp", "int", lambda x: np.where(x.r(0) > x.r(1), x.r(0) - x.r(1), 0), V),
    "add_i32 clamp": ("v_add_i32 v24, v8, v9 clamp", "int", lambda x: np.clip(x.r(0, i32).astype(i64) + x.r(1, i32), -(1 << 31), (1 << 31) - 1).astype(i32).view(u32), V),
    "subrev_u32": ("v_subrev_u32_e32 v24, v8, v9", "int", lambda x: x.r(1) - x.r(0), V),
    "mul_lo_u32": ("v_mul_lo_u32 v24, v8, v9", "int", lambda x: x.r(0) * x.r(1), V),
    "mul_hi_u32": ("v_mul_hi_u32 v24, v8, v9", "int", lambda x: (x.r(0).astype(u64) * x.r(1) >> u64(32)).astype(u32), V),
    "mul_hi_i32": ("v_mul_hi_i32 v24, v8, v9", "int", lambda x: (x.r(0, i32).astype(i64) * x.r(1, i32) >> 32).astype(i32).view(u32), V),
    "mul_u32_u24": ("v_mul_u32_u24_e32 v24, v8, v9", "int", lambda x: (x.r(0) & 0xFFFFFF) * (x.r(1) & 0xFFFFFF), V),
    "mad_i32_i24": ("v_mad_i32_i24 v24, v8, v9, v10", "int", lambda x: (_sext(x.r(0), 24) * _sext(x.r(1), 24)).view(u32) + x.r(2), V),
    "mad_u64_u32": ("v_mad_u64_u32 v[24:25], s[24:25], v8, v9, v[10:11]", "int", lambda x: x.r(0).astype(u64) * x.r(1) + x.pair(1), V64),
    "lshl_add_u64": ("v_lshl_add_u64 v[24:25], v[8:9], 3, v[10:11]", "int", lambda x: (x.pair(0) << u64(3)) + x.pair(1), V64),
    "add3_u32": ("v_add3_u32 v24, v8, v9, 64", "int", lambda x: x.r(0) + x.r(1) + u32(64), V),
    "min_i32": ("v_min_i32_e32 v24, -1, v9", "int", lambda x: np.minimum(-1, x.r(1, i32)).view(u32), V),
    "med3_i32": ("v_med3_i32 v24, v8, v9, v10", "int", lambda x: np.sort(np.stack([x.r(i, i32) for i in range(3)]), 0)[1].view(u32), V),
    "lshlrev_b32": ("v_lshlrev_b32_e32 v24, v8, v9", "int", lambda x: x.r(1) << (x.r(0) & 31), V),
    "ashrrev_i32": ("v_ashrrev_i32_e32 v24, v8, v9", "int", lambda x: (x.r(1, i32) >> (x.r(0) & 31).astype(i32)).view(u32), V),
    "lshrrev_b64": ("v_lshrrev_b64 v[24:25], v8, v[10:11]", "int", lambda x: x.pair(1) >> (x.r(0) & 63).astype(u64), V64),
    "ashrrev_i64": ("v_ashrrev_i64 v[24:25], v8, v[10:11]", "int", lambda x: (x.pair(1, i64) >> (x.r(0) & 63).astype(i64)).view(u64), V64),
    "and_or_b32": ("v_and_or_b32 v24, v8, v9, v10", "int", lambda x: x.r(0) & x.r(1) | x.r(2), V),
    "bfe_u32": ("v_bfe_u32 v24, v8, 5, 11", "int", lambda x: x.r(0) >> 5 & 0x7FF, V),
    "bfe_i32": ("v_bfe_i32 v24, v8, 5, 11", "int", lambda x: _sext(x.r(0) >> u32(5), 11).view(u32), V),
    "bfi_b32": ("v_bfi_b32 v24, v8, v9, v10", "int", lambda x: x.r(0) & x.r(1) | ~x.r(0) & x.r(2), V),
    "alignbit": ("v_alignbit_b32 v24, v8, v9, 7", "int", lambda x: ((x.r(0).astype(u64) << u64(32) | x.r(1)) >> u64(7)).astype(u32), V),
    "perm_b32": ("v_perm_b32 v24, v8, v9, v10", "int", lambda x: _perm(x.r(0), x.r(1), x.r(2) & 0x0F0F0F0F), V, 0, lambda d: _mask(d, 2, 0x0F0F0F0F)),
    "bfrev": ("v_bfrev_b32_e32 v24, v8", "int", lambda x: np.vectorize(lambda a: int(f"{a:032b}"[::-1], 2), otypes=[u32])(x.r(0)), V),
    "ffbh_u32": ("v_ffbh_u32_e32 v24, v8", "int", lambda x: np.vectorize(lambda a: 32 - int(a).bit_length() if a else 0xFFFFFFFF, otypes=[u32])(x.r(0)), V),
    "bcnt": ("v_bcnt_u32_b32 v24, v8, v9", "int", lambda x: np.bitwise_count(x.r(0)).astype(u32) + x.r(1), V),
    "sad_u32": ("v_sad_u32 v24, v8, v9, v10", "int", lambda x: np.where(x.r(0) > x.r(1), x.r(0) - x.r(1), x.r(1) - x.r(0)) + x.r(2), V),
    "mul_lo_u16": ("v_mul_lo_u16_e32 v24, v8, v9", "int", lambda x: (x.half(0, False, np.uint16) * x.half(1, False, np.uint16)).astype(u32), V),
    "add_co_u32": ("v_add_co_u32_e32 v24, vcc, v8, v9", "int", lambda x: _lane_mask(x.r(0).astype(u64) + x.r(1) >> u64(32) != 0), "vcc"),
    "addc_co_u32": ("v_addc_co_u32_e32 v24, vcc, v8, v9, vcc", "int", lambda x: x.r(0) + x.r(1) + _bits(x.s64(6)), V),
    "cndmask": ("v_cndmask_b32_e32 v24, v8, v9, vcc", "int", lambda x: np.where(_bits(x.s64(6)), x.r(1), x.r(0)), V),
    "cndmask neg": ("v_cndmask_b32_e64 v24, -v8, v9, s[10:11]", "f32", lambda x: np.where(_bits(x.s64(1)), x.r(1), x.r(0) ^ u32(1 << 31)), V),
    "swap": ("v_swap_b32 v24, v25", "int", lambda x: x.r(1), V),
    # compares
    "cmp_lt_f32": ("v_cmp_lt_f32_e32 vcc, v8, v9", "f32", lambda x: _lane_mask(x.r(0, f32) < x.r(1, f32)), "vcc"),
    "cmp_nle_f32": ("v_cmp_nle_f32_e64 s[24:25], v8, v9", "f32", lambda x: _lane_mask(~(x.r(0, f32) <= x.r(1, f32))), "s24"),
    "cmp_o_f32": ("v_cmp_o_f32_e32 vcc, v8, v9", "f32", lambda x: _lane_mask(~np.isnan(x.r(0, f32)) & ~np.isnan(x.r(1, f32))), "vcc"),
    "cmp_gt_i32": ("v_cmp_gt_i32_e32 vcc, 5, v9", "int", lambda x: _lane_mask(x.r(1, i32) < 5), "vcc"),
    "cmp_ge_u64": ("v_cmp_ge_u64_e32 vcc, v[8:9], v[10:11]", "int", lambda x: _lane_mask(x.pair(0) >= x.pair(1)), "vcc"),
    "cmp_lt_i16": ("v_cmp_lt_i16_e32 vcc, v8, v9", "int", lambda x: _lane_mask(x.half(0, False, np.int16) < x.half(1, False, np.int16)), "vcc"),
    "cmp_class": ("v_cmp_class_f32_e64 vcc, v8, 3", "f32", lambda x: _lane_mask(np.isnan(x.r(0, f32))), "vcc"),
    "cmpx": ("v_cmpx_gt_f32_e32 vcc, v8, v9\nv_mov_b32_e32 v24, 7", "f32", lambda x: np.where(x.r(0, f32) > x.r(1, f32), u32(7), x.r(0)), V),
    # conversions
    "cvt_f32_i32": ("v_cvt_f32_i32_e32 v24, v8", "int", lambda x: x.r(0, i32).astype(f32), VF),
    "cvt_f32_u32": ("v_cvt_f32_u32_e32 v24, v8", "int", lambda x: x.r(0).astype(f32), VF),
    "cvt_i32_f32": ("v_cvt_i32_f32_e32 v24, v8", "f32", lambda x: _saturate(x.r(0, f32), i32).view(u32), V),
    "cvt_u32_f32": ("v_cvt_u32_f32_e32 v24, v8", "f32", lambda x: _saturate(x.r(0, f32), u32), V),
    "cvt_f16_f32": ("v_cvt_f16_f32_e32 v24, v8", "f32", lambda x: x.r(0, f32).astype(np.float16), VH),
    "cvt_f32_f16": ("v_cvt_f32_f16_e32 v24, v8", "f16", lambda x: x.half(0).astype(f32), VF),
    "cvt_f32_f16 sdwa": ("v_cvt_f32_f16_sdwa v24, v8 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1", "f16", lambda x: x.half(0, True).astype(f32), VF),
    "cvt_ubyte2": ("v_cvt_f32_ubyte2_e32 v24, v8", "int", lambda x: (x.r(0) >> 16 & 255).astype(f32), VF),
    "cvt_f64_f32": ("v_cvt_f64_f32_e32 v[24:25], v8", "f32", lambda x: x.r(0, f32).astype(f64), VD),
    "cvt_f32_f64": ("v_cvt_f32_f64_e32 v24, v[8:9]", "f64", lambda x: x.pair(0, f64).astype(f32), VF),
    "cvt_pk_i16_i32": ("v_cvt_pk_i16_i32 v24, v8, v9", "int", lambda x: _halves(*(np.clip(x.r(i, i32), -32768, 32767).astype(np.int16) for i in range(2))), V),
    # SDWA and DPP
    "sdwa bytes": ("v_add_u32_sdwa v24, v8, v9 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_1 src1_sel:WORD_1", "int", lambda x: (x.r(0) >> 8 & 255) + (x.r(1) >> 16), V),
    "sdwa sext": ("v_add_u32_sdwa v24, sext(v8), v9 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_3 src1_sel:DWORD", "int", lambda x: _sext(x.r(0) >> 24, 8).view(u32) + x.r(1), V),
    "sdwa preserve": ("v_and_b32_sdwa v24, v9, v10 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD src1_sel:DWORD", "int", lambda x: x.r(0) & 0xFFFF | (x.r(1) & x.r(2)) << 16, V),
    "dpp quad": ("v_mov_b32_dpp v24, v9 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf", "int", lambda x: x.r(1)[:, np.arange(64) ^ 1], V),
    "dpp row_shr": ("v_mov_b32_dpp v24, v9 row_shr:3 row_mask:0xf bank_mask:0xf", "int", lambda x: np.where(np.arange(64) % 16 >= 3, np.roll(x.r(1), 3, 1), x.r(0)), V),
    "dpp row_shl zero": ("v_mov_b32_dpp v24, v9 row_shl:5 row_mask:0xf bank_mask:0xf bound_ctrl:1", "int", lambda x: np.where(np.arange(64) % 16 < 11, np.roll(x.r(1), -5, 1), 0), V),
    "dpp row_ror": ("v_mov_b32_dpp v24, v9 row_ror:4 row_mask:0xf bank_mask:0xf", "int", lambda x: np.roll(x.r(1).reshape(G, 4, 16), 4, 2).reshape(G, 64), V),
    "dpp half_mirror": ("v_mov_b32_dpp v24, v9 row_half_mirror row_mask:0xf bank_mask:0xf", "int", lambda x: x.r(1)[:, np.arange(64) ^ 7], V),
    "dpp bcast15": ("v_mov_b32_dpp v24, v9 row_bcast:15 row_mask:0xa bank_mask:0xf", "int", lambda x: np.where(np.arange(64) // 16 % 2 == 1, x.r(1)[:, np.maximum(np.arange(64) // 16 * 16 - 1, 0)], x.r(0)), V),
    "dpp bcast31": ("v_mov_b32_dpp v24, v9 row_bcast:31 row_mask:0xc bank_mask:0xf", "int", lambda x: np.where(np.arange(64) >= 32, x.r(1)[:, 31:32], x.r(0)), V),
    "dpp same register": ("v_add_f32_dpp v24, v24, v24 row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1", "small", lambda x: x.r(0, f32) + np.where(np.arange(64) % 16 >= 1, np.roll(x.r(0, f32), 1, 1), f32(0)), VF),
    # lanes
    "readlane": ("v_readlane_b32 s24, v9, 17", "int", lambda x: x.r(1)[:, 17], "s24:u32"),
    "writelane": ("v_writelane_b32 v24, s9, 5", "int", lambda x: np.where(np.arange(64) == 5, x.s(1)[:, None], x.r(0)), V),
    "mbcnt": ("v_mbcnt_lo_u32_b32 v24, s8, 0\nv_mbcnt_hi_u32_b32 v24, s9, v24", "int", lambda x: np.cumsum(_bits(x.s64(0)), 1, dtype=u32) - _bits(x.s64(0)), V),
    "bpermute": ("v_lshlrev_b32_e32 v9, 2, v9\nds_bpermute_b32 v24, v9, v10\ns_waitcnt lgkmcnt(0)", "small", lambda x: np.take_along_axis(x.r(2), x.r(1).astype(i64) & 63, 1), V),
    "swizzle": ("ds_swizzle_b32 v24, v9 offset:swizzle(BITMASK_PERM,\"0p1p0\")\ns_waitcnt lgkmcnt(0)", "int", lambda x: x.r(1)[:, np.arange(64) & ~0b10100 | 0], V, 0, None, "ds_swizzle_b32 v24, v9 offset:11\ns_waitcnt lgkmcnt(0)"),
    "exec": ("s_mov_b64 exec, s[10:11]\nv_mov_b32_e32 v24, v9", "int", lambda x: np.where(_bits(x.s64(1)), x.r(1), x.r(0)), V),
    # scalars
    "s_add_u32": ("s_add_u32 s24, s8, s9", "int", lambda x: (x.s(0).astype(u64) + x.s(1) >> u64(32)).astype(u32), "scc"),
    "s_addc": ("s_add_u32 s24, s8, s9\ns_addc_u32 s24, s10, s11", "int", lambda x: x.s(2) + x.s(3) + (x.s(0).astype(u64) + x.s(1) >> u64(32)).astype(u32), "s24:u32"),
    "s_mul_i32": ("s_mul_i32 s24, s8, s9", "int", lambda x: x.s(0) * x.s(1), "s24:u32"),
    "s_mul_hi_u32": ("s_mul_hi_u32 s24, s8, s9", "int", lambda x: (x.s(0).astype(u64) * x.s(1) >> u64(32)).astype(u32), "s24:u32"),
    "s_bfe_u32": ("s_bfe_u32 s24, s8, 0x50003", "int", lambda x: x.s(0) >> 3 & 31, "s24:u32"),
    "s_bfe_i64": ("s_bfe_i64 s[24:25], s[8:9], 0x200000", "int", lambda x: x.s(0, i32).astype(i64).view(u64), "s24"),
    "s_lshl_b64": ("s_lshl_b64 s[24:25], s[8:9], s10", "int", lambda x: x.s64(0) << (x.s(2) & 63).astype(u64), "s24"),
    "s_ashr_i32": ("s_ashr_i32 s24, s8, 7", "int", lambda x: (x.s(0, i32) >> 7).view(u32), "s24:u32"),
    "s_andn2_b64": ("s_andn2_b64 s[24:25], s[8:9], s[10:11]", "int", lambda x: x.s64(0) & ~x.s64(1), "s24"),
    "s_cselect": ("s_cmp_lt_i32 s8, s9\ns_cselect_b32 s24, s10, s11", "int", lambda x: np.where(x.s(0, i32) < x.s(1, i32), x.s(2), x.s(3)), "s24:u32"),
    "s_addk": ("s_mov_b32 s24, s8\ns_addk_i32 s24, 0xfffe", "int", lambda x: x.s(0) - u32(2), "s24:u32"),
    "s_mulk": ("s_mov_b32 s24, s8\ns_mulk_i32 s24, 0x8001", "int", lambda x: (x.s(0, i32) * i32(-32767)).view(u32), "s24:u32"),
    "s_movk": ("s_movk_i32 s24, 0x8000", "int", lambda x: np.full(G, 0xFFFF8000, u32), "s24:u32"),
    "s_cmpk": ("s_cmpk_lt_i32 s8, 0xfff0", "int", lambda x: (x.s(0, i32) < -16).astype(u32), "scc"),
    "s_saveexec": ("s_and_saveexec_b64 s[24:25], s[8:9]\nv_mov_b32_e32 v24, v9", "int", lambda x: np.where(_bits(x.s64(0)), x.r(1), x.r(0)), V),
    "s_ff1": ("s_ff1_i32_b64 s24, s[8:9]", "int", lambda x: np.array([(int(a) & -int(a)).bit_length() - 1 for a in x.s64(0)], i64).astype(u32), "s24:u32"),
    "s_flbit": ("s_flbit_i32_b32 s24, s8", "int", lambda x: np.array([32 - int(a).bit_length() if a else 0xFFFFFFFF for a in x.s(0)], u32), "s24:u32"),
    "s_pack": ("s_pack_lh_b32_b16 s24, s8, s9", "int", lambda x: x.s(0) & 0xFFFF | x.s(1) & 0xFFFF0000, "s24:u32"),
    "s_bitset1": ("s_mov_b32 s24, s8\ns_bitset1_b32 s24, 9", "int", lambda x: x.s(0) | 512, "s24:u32"),
    "loop": ("s_mov_b32 s24, 0\n.Lloop_{name}:\ns_add_i32 s24, s24, 3\ns_cmp_lt_u32 s24, 30\ns_cbranch_scc1 .Lloop_{name}", "int", lambda x: np.full(G, 30, u32), "s24:u32"),
}  # fmt: skip
ONLY_GFX950: dict[str, tuple] = {
    "bitop3": ("v_bitop3_b32 v24, v8, v9, v10 bitop3:0xca", "int", lambda x: x.r(0) & x.r(1) | ~x.r(0) & x.r(2), V),
    "cvt_pk_bf16_f32": ("v_cvt_pk_bf16_f32 v24, v8, v9", "f32", lambda x: _halves(_bf16(x.r(0, f32)), _bf16(x.r(1, f32))), V),
    "permlane32_swap": ("v_permlane32_swap_b32_e32 v24, v25", "int", lambda x: np.concatenate([x.r(0)[:, :32], x.r(1)[:, :32]], 1), V),
    "permlane16_swap": ("v_permlane16_swap_b32_e32 v24, v25", "int", lambda x: _rows(x.r(0), x.r(1)), V),
    "maximum3": ("v_maximum3_f32 v24, v8, v9, v10", "f32", lambda x: np.maximum(np.maximum(x.r(0, f32), x.r(1, f32)), x.r(2, f32)), VF),
    "ashr_pk_i8": ("v_ashr_pk_i8_i32 v24, v8, v9, 3", "int", lambda x: sum((np.clip(x.r(i, i32) >> 3, -128, 127) & 255).astype(u32) << u32(8 * i) for i in range(2)), V),
}  # fmt: skip


def _no_denormal(x):
    return np.where(np.abs(x) < np.finfo(f32).tiny, np.copysign(f32(0), x), x)


def _fixup(x):
    q, den, num = (x.r(i, f32) for i in range(3))  # denormals of small integers: no infinity, no NaN
    return np.where((den == 0) & (num == 0), f32(np.nan), np.where(den == 0, f32(np.inf), np.where(num == 0, f32(0), q)))


def _two(low, high):
    return np.stack([low, high], -1).view(u64)[..., 0] if low.dtype != u32 else low.astype(u64) | high.astype(u64) << u64(32)


def _halves(low, high):
    return np.ascontiguousarray(low).view(np.uint16).astype(u32) | np.ascontiguousarray(high).view(np.uint16).astype(
        u32
    ) << u32(16)


def _half_bits(x):
    return x.astype(np.float16).view(np.uint16).astype(u32)


def _moderate(data):
    """Numbers whose products are neither NaN nor far outside what a half can hold."""
    return (np.random.default_rng(3).standard_normal(data.shape) * 30).astype(f32).view(u32)


def _bits(mask):
    """[G] 64-bit masks to [G, 64] zeros and ones."""
    return (mask[:, None] >> np.arange(64, dtype=u64) & u64(1)).astype(u32)


def _lane_mask(condition):
    return (condition.astype(u64) << np.arange(64, dtype=u64)).sum(1, dtype=u64)


def _mask(data, register, mask):
    data = data.copy()
    data[:, :, register] &= u32(mask)
    return data


def _bf16(x):
    b = x.view(u32)
    return np.where(np.isnan(x), b >> 16 | 0x40, (b + u32(0x7FFF) + (b >> 16 & 1)) >> 16).astype(np.uint16)


def _rows(a, b):
    a, b = a.reshape(G, 4, 16), b.reshape(G, 4, 16)
    return np.stack([a[:, 0], b[:, 0], a[:, 2], b[:, 2]], 1).reshape(G, 64)


def _result(result: Result, where: str) -> np.ndarray:
    register, _, dtype = where.partition(":")
    if register[0] == "v" and register != "vcc":
        types = {"u32": u32, "f32": f32, "u64": u64, "f64": f64}
        if dtype == "f16":
            raw = result.v(24)
            assert (raw >> 16 == 0).all() or (raw >> 16 == raw[0, 0] >> 16).any()
            return (raw & 0xFFFF).astype(np.uint16).view(np.float16)
        return result.v(int(register[1:]), types[dtype])
    if register == "scc":
        return result.s("scc")
    return result.s(24) if dtype == "u32" else result.s64("vcc" if register == "vcc" else 24)


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def kernels(request):
    cases = CASES | (ONLY_GFX950 if request.param == "gfx950" else {})
    bodies = {}
    for i, case in enumerate(cases.values()):
        code = case[6] if len(case) > 6 else case[0]
        bodies[f"case_{i}"] = wrap(code.replace("{name}", str(i)))
    return device(request.param), cases, assemble(request.param, bodies)


@pytest.mark.parametrize("name", [*CASES, *ONLY_GFX950])
def test_opcode(kernels, name):
    target, cases, (code, text) = kernels
    if name not in cases:
        return
    _, kind, expected, where, *more = cases[name]
    data = _inputs(kind)
    if len(more) > 1 and more[1] is not None:
        data = more[1](data)
    loaded = target.load(code, text, f"case_{list(cases).index(name)}")
    with np.errstate(all="ignore"):
        want = expected(In(data))
    got = _result(run_wrapped(loaded, data), where)
    tolerance = more[0] if more else 0
    if want.dtype == u64 and where == V64 and kind == "f32":
        want, got = want.view(f32), got.view(f32)
    if want.dtype.kind == "f":
        same = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.abs(got - want) <= tolerance * (1 + np.abs(want)))
    else:
        same = got == want
    assert same.all(), f"{name}: {int((~same).sum())} differ, first got {got[~same][0]!r}, expected {want[~same][0]!r}"
