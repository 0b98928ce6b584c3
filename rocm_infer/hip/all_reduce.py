# SPDX-License-Identifier: Apache-2.0
"""all_reduce on csrc/hip/all_reduce.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("all_reduce", outputs=1, tensors=4)
