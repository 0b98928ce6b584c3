# SPDX-License-Identifier: Apache-2.0
"""sample on csrc/hip/sample.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("sample", outputs=4, tensors=18)
