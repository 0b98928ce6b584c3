# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per op. Imported as `rocm_infer.triton_kernels`; `pip install -e .` makes that name known.

A file has the kernel(s), `config(arch, dims)` that chooses tiles by rules, `launch(*outputs, *scratch, *inputs, **scalars)`
that starts them without allocating or synchronising, and where needed `supports(call)` and `scratch(call)`.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is rocm_infer.triton_kernels, not the package triton_kernels of another project: "
        "import rocm_infer.triton_kernels, or leave this directory to reach the other one"
    )
