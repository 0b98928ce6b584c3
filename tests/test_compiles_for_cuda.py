# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for an NVIDIA GPU as well, and fits its shared memory: what would only fail there fails here.

AMD architectures are the business of bench.isa. One process of its own, since here Triton interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
from bench.shapes import variants
from rocm_infer import arch as archs
from rocm_infer.ops._op import registry
from rocm_infer.tools.explain import backends
from rocm_infer.triton_kernels._compile import compiling

arch = archs.of("sm_90")
for name, op in registry().items():
    if "triton" not in backends(op):
        continue
    picked = {}
    for variant in variants(name):
        if (variant.model, variant.tp) in (("deepseek-v3", 8), ("llama-3.1-8b", 1)):
            picked.setdefault((variant.fp8, variant.fp8_cache, str(variant.options)), variant)
    assert picked, name
    with compiling(arch) as launches:
        for variant in picked.values():
            try:
                variant.contract().using("triton")(**variant.arguments(arch, device="meta"))
            except Exception as error:
                print(f"FAILED {name} {variant.name}: {type(error).__name__}: {str(error)[:400]}")
        for launch in launches:
            if launch.lds > arch.lds_bytes:
                print(f"FAILED {launch.kernel}: {launch.lds} bytes of shared memory, there are {arch.lds_bytes}")
        print(f"compiled {name} {len(launches)}")
"""


@pytest.mark.timeout(900)
def test_every_triton_kernel_compiles_for_sm_90():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert not failed, "\n".join(failed)
    assert "compiled mla_decode" in done.stdout
