# SPDX-License-Identifier: Apache-2.0
"""rms_norm on csrc/hip/rms_norm.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("rms_norm", outputs=2, tensors=4)
