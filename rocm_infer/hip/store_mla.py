# SPDX-License-Identifier: Apache-2.0
"""store_mla on csrc/hip/store_mla.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("store_mla", outputs=0, tensors=7)
