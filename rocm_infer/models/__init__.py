# SPDX-License-Identifier: Apache-2.0
"""The model families, and `load_model`, which makes one from a checkpoint directory."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rocm_infer import arch as archs
from rocm_infer.config import ConfigError, EngineConfig, ModelConfig
from rocm_infer.cpu_kernels._library import lanes
from rocm_infer.hub import resolve_model
from rocm_infer.models import deepseek, llama, mixtral, qwen3_moe
from rocm_infer.models.builder import Builder
from rocm_infer.models.decoder import Decoder
from rocm_infer.models.hf_config import HfConfig, token_ids
from rocm_infer.models.loader import Checkpoint, DummyWeights, Inventory
from rocm_infer.ops._op import Ops
from rocm_infer.platform import exact_sums, resolve_device


class Family(NamedTuple):
    """How one architecture is read and built."""

    translate: Callable[[HfConfig], ModelConfig]
    build: Callable[[Builder, int], Decoder]
    skipped: Callable[[ModelConfig], tuple[str, ...]] = lambda config: ()


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(llama.translate_llama, llama.build),
    "MistralForCausalLM": Family(llama.translate_mistral, llama.build),
    "Qwen2ForCausalLM": Family(llama.translate_qwen2, llama.build),
    "Qwen3ForCausalLM": Family(llama.translate_qwen3, llama.build),
    "MixtralForCausalLM": Family(mixtral.translate, mixtral.build),
    "Qwen3MoeForCausalLM": Family(qwen3_moe.translate, qwen3_moe.build),
    "DeepseekV2ForCausalLM": Family(deepseek.translate_v2, deepseek.build, deepseek.skipped),
    "DeepseekV3ForCausalLM": Family(deepseek.translate_v3, deepseek.build, deepseek.skipped),
}


def read_config(directory: Path) -> ModelConfig:
    """What config.json (and the stop tokens of generation_config.json) say. Raises ConfigError naming the field."""
    hf = HfConfig.read(directory)
    config = family_of(hf).translate(hf)
    if (directory / "generation_config.json").is_file():
        generation = HfConfig.read(directory, "generation_config.json")
        config = dataclasses.replace(
            config, eos_ids=tuple(dict.fromkeys(config.eos_ids + token_ids(generation, "eos_token_id")))
        )
    return config


def family_of(hf: HfConfig) -> Family:
    """The family of a checkpoint, or an error with the nearest name there is."""
    names = hf.get("architectures", [])
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    wanted = str(names[0]) if names else str(hf.get("model_type", "none"))
    near = difflib.get_close_matches(wanted, FAMILIES, n=1, cutoff=0.0)
    raise ConfigError(
        "model",
        f"{hf.where}: architecture {wanted} is not supported. Nearest: {near[0]}. Supported: {', '.join(FAMILIES)}",
    )


def load_model(settings: EngineConfig, *, progress: bool | None = None) -> Decoder:
    """The model of a checkpoint (the embedded one, a directory, a hub id) on its device.

    Every weight name, shape and type is checked before any is read. progress: show a bar; None: only on a terminal.
    Raises ConfigError for a config.json that is not supported, CheckpointError (a ConfigError) for files that do not fit it.
    """
    directory = resolve_model(settings.model)
    config = read_config(directory)
    if settings.tensor_parallel_size != 1:
        raise ConfigError(
            "tensor_parallel_size",
            f"tensor_parallel_size: expected 1 (more is not built yet), got {settings.tensor_parallel_size}",
        )
    device = _device(settings)
    dtype = getattr(torch, config.dtype if settings.dtype == "auto" else settings.dtype)
    check_backend(config, settings, device)
    ops = Ops(settings.kernel_backend)
    family = FAMILIES[config.architecture]
    max_len = max(settings.context_length or 0, config.max_len)
    on_cpu = not archs.runs_gpu_kernels(device) and settings.kernel_backend in ("auto", "cpu")
    width = lanes() if on_cpu and dtype in (torch.bfloat16, torch.float32) else 0

    inventory = Inventory()
    family.build(Builder(config, inventory, ops, device=torch.device("meta"), dtype=dtype, lanes=0), 1)
    if settings.load_format == "dummy":
        dummy = DummyWeights(settings.random_seed, dtype)
        return family.build(Builder(config, dummy, ops, device=device, dtype=dtype, lanes=width), max_len)
    with Checkpoint(directory) as checkpoint:
        checkpoint.check(inventory, (*family.skipped(config), *((r"lm_head\.weight",) if config.tied else ())))
        checkpoint.show_progress(len(inventory.asked), progress)
        return family.build(Builder(config, checkpoint, ops, device=device, dtype=dtype, lanes=width), max_len)


def check_backend(config: ModelConfig, settings: EngineConfig, device: torch.device) -> None:
    """Raises ConfigError with the reasons if the kernel backend that the settings insist on cannot serve the model."""
    backend = settings.kernel_backend
    if backend in ("auto", "cpu", "reference"):
        return
    if backend == "triton" and not archs.runs_gpu_kernels(device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "kernel_backend",
            "kernel_backend triton: Triton's kernels run on GPUs, got the CPU; use --device emulated:gfx942 to run them here",
        )
    from rocm_infer.models.dry_run import DryRun, StepSize

    with archs.played_by_meta(archs.current(device)):
        run = DryRun(config, settings)
        for size in (StepSize(1, (), 1), StepSize(0, (2,), 1)):
            run.step(size)
        run.sample(1, num_logprobs=-1, is_penalised=False, has_bias=False, has_mask=False)
    refused = [found.reason for found in run.served() if not found.backend]
    if refused:
        raise ConfigError("kernel_backend", f"kernel_backend {backend} cannot serve this model. {'; '.join(refused)}")


def _device(settings: EngineConfig) -> torch.device:
    """Where the tensors lie; an emulated device is made ready first. Raises ConfigError."""
    if not settings.device.startswith("emulated:"):
        device = resolve_device(settings.device)
        if device.type == "cuda":
            exact_sums()
        return device
    from rocm_infer.emulator.session import start

    try:
        start(settings.device, hip=settings.kernel_backend in ("auto", "hip"))
    except (ValueError, RuntimeError) as error:
        raise ConfigError("device", str(error)) from error
    return torch.device("cpu")
