# SPDX-License-Identifier: Apache-2.0
"""moe_sum on csrc/hip/moe_sum.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("moe_sum", outputs=1, tensors=3)
