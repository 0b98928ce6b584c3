# SPDX-License-Identifier: Apache-2.0
"""store_kv on csrc/hip/store_kv.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("store_kv", outputs=0, tensors=8)
