# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints made by transformers, and a driver that runs our models over scattered pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from rocm_infer.config import EngineConfig
from rocm_infer.engine.batch import Batch
from rocm_infer.models import load_model
from rocm_infer.models.decoder import Decoder

PAGE_SIZE = 4
VOCAB = 97


def make_checkpoint(directory: Path, config: transformers.PretrainedConfig, seed: int = 0, **save: Any) -> Any:
    """A transformers model with random weights, biases, norms and correction biases, in fp32, saved to `directory`."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.data = 1 + 0.2 * noise
        elif "embed" in name:
            weight.data = noise
        elif "correction_bias" in name:
            weight.data = 0.1 * noise
        else:
            weight.data = noise * (1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory, **save)
    return model


def prompts(lens: tuple[int, ...] = (1, 9, 22), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lens]


@torch.inference_mode()
def judge(model: Any, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of transformers, and the logits [steps, V] they were taken from."""
    found = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits)


@dataclass
class Sequence:
    """One request of the driver."""

    tokens: list[int]
    num_prompt: int
    pages: list[int]
    computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


def settings(directory: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(**{"model": str(directory), "device": "cpu", "dtype": "float32", "page_size": PAGE_SIZE, **changes})


def load(directory: Path, **changes: Any) -> Decoder:
    return load_model(settings(directory, **changes))


@torch.inference_mode()
def drive(
    model: Decoder, given: list[list[int]], steps: int, *, chunk: int = 5, cache_dtype: torch.dtype | None = None
) -> list[Sequence]:
    """Greedy decoding of several prompts together: prompts in chunks, decodes beside them, pages scattered, the rest NaN."""
    needed = [-(-(len(prompt) + steps) // PAGE_SIZE) for prompt in given]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    cache = model.make_cache(len(order), PAGE_SIZE, cache_dtype or model.dtype)
    for tensor in (part for layer in cache for part in (layer if isinstance(layer, tuple) else (layer,))):
        tensor.copy_(torch.full_like(tensor, float("nan"), dtype=torch.float32))
    sequences = []
    for prompt, count in zip(given, needed):
        sequences.append(Sequence(list(prompt), len(prompt), order[:count]))
        order = order[count:]
    while open_ones := [s for s in sequences if len(s.tokens) < s.num_prompt + steps]:
        step(model, cache, open_ones, chunk)
    return sequences


def step(model: Decoder, cache: list[Any], sequences: list[Sequence], chunk: int) -> None:
    decodes = [s for s in sequences if s.computed == len(s.tokens) - 1 and len(s.tokens) > s.num_prompt]
    prefills = [s for s in sequences if s not in decodes][:2]
    counts = [1] * len(decodes) + [min(chunk, len(s.tokens) - s.computed) for s in prefills]
    batch = make_batch(decodes + prefills, counts, len(decodes))
    hidden = model.forward(batch, cache)
    for sequence, row, count in zip(decodes + prefills, batch.query_start[1:].tolist(), counts):
        sequence.computed += count
        if sequence.computed == len(sequence.tokens):
            sequence.logits.append(model.logits(hidden[row - 1 : row])[0])
            sequence.tokens.append(int(sequence.logits[-1].argmax()))


def make_batch(sequences: list[Sequence], counts: list[int], num_decodes: int) -> Batch:
    spans = [range(s.computed, s.computed + count) for s, count in zip(sequences, counts)]
    slots = [s.pages[t // PAGE_SIZE] * PAGE_SIZE + t % PAGE_SIZE for s, span in zip(sequences, spans) for t in span]
    width = max(-(-span.stop // PAGE_SIZE) for span in spans)
    table = torch.full((len(sequences), width), 2147480000, dtype=torch.int32)  # entries that are not in use name no page
    for row, (s, span) in enumerate(zip(sequences, spans)):
        used = -(-span.stop // PAGE_SIZE)
        table[row, :used] = torch.tensor(s.pages[:used], dtype=torch.int32)
    return Batch(
        token_ids=torch.tensor([s.tokens[t] for s, span in zip(sequences, spans) for t in span]),
        positions=torch.tensor([t for span in spans for t in span]),
        slots=torch.tensor(slots),
        num_decodes=num_decodes,
        query_start=torch.tensor([0, *counts]).cumsum(0).int(),
        kv_len=torch.tensor([span.stop for span in spans], dtype=torch.int32),
        page_table=table,
        logits_index=torch.tensor([], dtype=torch.int64),
        requests=[],
        scored=[],
    )
