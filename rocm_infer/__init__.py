# SPDX-License-Identifier: Apache-2.0
"""Kernel-first LLM inference for AMD GPUs. `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from rocm_infer.config import SamplingParams
    from rocm_infer.llm import LLM


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from rocm_infer.llm import LLM

        return LLM
    if name == "SamplingParams":
        from rocm_infer.config import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'rocm_infer' has no attribute {name!r}")
