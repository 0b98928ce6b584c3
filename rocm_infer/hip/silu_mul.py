# SPDX-License-Identifier: Apache-2.0
"""silu_mul on csrc/hip/silu_mul.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("silu_mul", outputs=2, tensors=3)
