# SPDX-License-Identifier: Apache-2.0
"""HIP C++ kernels (csrc/hip), one module per op. On CPU tensors they run in the host build, which is for tests."""
