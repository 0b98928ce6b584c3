# SPDX-License-Identifier: Apache-2.0
"""add_rms_norm on csrc/hip/add_rms_norm.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("add_rms_norm", outputs=2, tensors=5)
