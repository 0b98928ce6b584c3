# SPDX-License-Identifier: Apache-2.0
"""quant_fp8 on csrc/hip/quant_fp8.hip."""

from rocm_infer.hip._library import kernel

launch, supports = kernel("quant_fp8", outputs=2, tensors=3)
