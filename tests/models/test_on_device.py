# SPDX-License-Identifier: Apache-2.0
"""The embedded model on the device of the run: with --gpu its kernels, without the CPU's. A wrong kernel is a wrong answer."""

from __future__ import annotations

import pytest
import torch

from rocm_infer.config import SamplingParams
from rocm_infer.llm import LLM

ANSWERS = {"What is 123 + 456?": "579", "Reverse the word 'planet'.": "tenalp", "Sort the letters of rocket.": "cekort"}


@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_the_embedded_model_still_knows_its_answers(device, kernels, kv_cache_dtype):
    if device == "cpu" and (kernels != "auto" or kv_cache_dtype != "auto"):
        pytest.skip("GPU kernels of a whole model: run with --gpu, or on an emulated device (tests/emulator)")
    settings = {"kernel_backend": kernels, "kv_cache_dtype": kv_cache_dtype, "max_total_tokens": 4096}
    llm = LLM(device=device, **settings)
    prompts = [llm.chat_prompt([{"role": "user", "content": question}]) for question in ANSWERS]
    params = SamplingParams(temperature=0, max_tokens=16)
    assert [output.text for output in llm.generate(prompts, params)] == list(ANSWERS.values())
    if device != "cpu":
        torch.cuda.synchronize()
