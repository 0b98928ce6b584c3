# SPDX-License-Identifier: Apache-2.0
"""A model without weights whose next token is a hash of the whole history as read back through the paged cache.

A wrong page, slot, position or length anywhere changes the tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.config import EngineConfig, ModelConfig, RopeConfig, SamplingParams
from rocm_infer.engine.batch import Batch
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import AddRequest, RequestOutput

VOCAB = 61
EOS = 1
NAN_TOKEN = 59  # a history that holds it has NaN logits
FAIL_TOKEN = 60  # computing it raises


def toy_config(max_len: int = 512, vocab_size: int = VOCAB, eos_id: int = EOS) -> ModelConfig:
    return ModelConfig(
        architecture="Toy",
        vocab_size=vocab_size,
        hidden=1,
        intermediate=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        max_len=max_len,
        rms_eps=0.0,
        rope=RopeConfig(theta=1.0, width=0),
        eos_ids=(eos_id,),
    )


def mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 31)) * 0x7FB5D329728EA185
    x = (x ^ (x >> 27)) * 0x1B873593CC9E2D51
    return x ^ (x >> 33)


class ToyModel:
    """Hidden state [T, 2]: the hash of the history up to the token, and whether the last token but one of the vocabulary is in it.

    That token makes NaN, the last one raises; neither is sampled.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    weight_bytes = 0

    def __init__(self, max_len: int = 512, vocab_size: int = VOCAB, eos_id: int = EOS) -> None:
        self.config = toy_config(max_len, vocab_size, eos_id)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 8

    def make_cache(self, num_pages: int, page_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.full((num_pages, page_size), -(10**12), dtype=torch.int64)]

    def forward(self, batch: Batch, cache: list[Any]) -> torch.Tensor:
        if (batch.token_ids == self.config.vocab_size - 1).any():
            raise RuntimeError("the toy cannot compute this token")
        page_size = cache[0].shape[1]
        slots = cache[0].view(-1)
        slots[batch.slots] = batch.token_ids * 1_000_003 + batch.positions
        hidden = []
        for b, kv_len in enumerate(batch.kv_len.tolist()):
            pages = batch.page_table[b, : -(-kv_len // page_size)].long()
            history = cache[0][pages].view(-1)[:kv_len]
            is_nan = (history // 1_000_003 == self.config.vocab_size - 2).cumsum(0)
            states = torch.stack([mix(history * 31 + torch.arange(kv_len)).cumsum(0), is_nan], dim=1)
            hidden.append(states[kv_len - int(batch.query_start[b + 1] - batch.query_start[b]) :])
        return torch.cat(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        values = mix(hidden[:, :1] + torch.arange(self.config.vocab_size) * 0x632BE5AB) & 0xFFFFFF
        logits = values.float() / 2**21
        logits[:, -2:] = -20.0
        return torch.where(hidden[:, 1:] > 0, torch.nan, logits)


def toy_engine(*, max_len: int = 512, **settings: Any) -> Engine:
    config = EngineConfig(model="toy", **{"page_size": 4, "max_total_tokens": 2048, "num_threads": 1, **settings})
    return Engine(config, model=ToyModel(max_len))


def request(rid: str, prompt_ids: list[int], *, priority: int = 0, salt: str = "", **params: Any) -> AddRequest:
    return AddRequest(rid, prompt_ids, SamplingParams(**{"temperature": 0.0, **params}), priority, salt)


def drain(engine: Engine, *, max_steps: int = 10_000) -> dict[str, list[RequestOutput]]:
    """Run until nothing is left, auditing the books after every step; outputs by rid."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.rid, []).append(output)
        engine.scheduler.check()
    raise AssertionError(f"not finished after {max_steps} steps")


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def run(engine: Engine, *requests: AddRequest) -> dict[str, list[RequestOutput]]:
    for each in requests:
        engine.add(each)
    return drain(engine)
