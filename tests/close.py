# SPDX-License-Identifier: Apache-2.0
"""The only comparer: NaN and Inf in the same places, then an elementwise bound made of named error sources."""

from __future__ import annotations

import torch

EPS32 = 2.0**-24  # half an ulp of fp32: the error of one rounded fp32 operation
HALF_ULP = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
    torch.float8_e4m3fnuz: 2.0**-4,
}
SMALLEST = {torch.float16: 2.0**-24, torch.float8_e4m3fn: 2.0**-9, torch.float8_e4m3fnuz: 2.0**-10}
# Triton's interpreter truncates fp32 to bf16 where hardware rounds to nearest: one more half ulp, declared here by backend.
EXTRA_ROUNDINGS = {("triton", torch.bfloat16): 1.0}


def assert_close(
    got: torch.Tensor,
    want: torch.Tensor,
    *,
    roundings: float = 1.0,
    noise: torch.Tensor | float = 0.0,
    rounded_to: torch.dtype | None = None,
    backend: str = "reference",
    what: str = "result",
) -> float:
    """Check `got` against float64 `want`; returns the largest error as a share of its bound.

    roundings: how often a value of this size is rounded on the way (1: only the stored result), to `rounded_to`, else got's dtype.
    noise: absolute bound on everything else, for instance `k * EPS32 * sum(|terms|)` for an fp32 sum of k terms.
    """
    assert got.shape == want.shape, f"{what}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
    if got.numel() == 0:
        return 0.0
    dtype = rounded_to or got.dtype
    value, want = got.detach().cpu().double(), want.detach().cpu().double()
    for name, test in (("NaN", torch.isnan), ("Inf", torch.isinf)):
        wrong = test(value) != test(want)
        assert not wrong.any(), f"{what}: {name} differs at {wrong.nonzero()[:4].tolist()}"
    finite = torch.isfinite(want)
    extra = EXTRA_ROUNDINGS.get((backend, dtype), 0.0)
    bound = (roundings + extra) * HALF_ULP[dtype] * want.abs() + noise + SMALLEST.get(dtype, 1e-37)
    error = torch.where(finite, (value - want).abs(), 0.0)
    ratio = torch.where(finite, error / bound, 0.0)
    worst = int(ratio.argmax())
    assert ratio.flatten()[worst] <= 1, (
        f"{what}: {int((ratio > 1).sum())} of {ratio.numel()} outside the bound; worst at flat index {worst}: "
        f"expected {want.flatten()[worst]:.9g}, got {value.flatten()[worst]:.9g}, error {ratio.flatten()[worst]:.3g} of the bound"
    )
    return float(ratio.flatten()[worst])
