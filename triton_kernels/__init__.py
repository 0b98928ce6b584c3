# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per op. Imported as `rocm_infer.triton_kernels`; `pip install -e .` makes that name known.

A file has the kernel(s), `config(arch, dims)` that chooses tiles by rules, `launch(*outputs, *scratch, *inputs, **scalars)`
that starts them without allocating or synchronising, and where needed `supports(call)` and `scratch(call)`.
"""

import re

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is rocm_infer.triton_kernels, not the package triton_kernels of another project: "
        "import rocm_infer.triton_kernels, or leave this directory to reach the other one"
    )

OLDEST_TRITON = (3, 4)


def is_before(version: str, other: tuple[int, int]) -> bool:
    """Whether a version of Triton is older than another; "3.4.0+git1234" is how ROCm's builds call themselves."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < other


try:
    import triton
except ImportError:
    pass  # the kernels' own import says so
else:
    if is_before(triton.__version__, OLDEST_TRITON):
        raise NotImplementedError(
            f"triton_kernels: expected Triton {'.'.join(map(str, OLDEST_TRITON))} or later, got {triton.__version__} at "
            f"{triton.__path__[0]}; install a torch of 2.8 or later, whose wheels bring one (README, section AMD)"
        )
