# SPDX-License-Identifier: Apache-2.0
"""The engine worker with the toy model: `EngineClient(config, command=TOY_WORKER)`. It audits the books after every step."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from rocm_infer.config import ConfigError, EngineConfig
from rocm_infer.engine import worker
from rocm_infer.engine.batch import Batch
from rocm_infer.engine.engine import Engine
from rocm_infer.engine.messages import RequestOutput
from tests.engine.toy import EOS, VOCAB, ToyModel

TOY_WORKER = (sys.executable, "-m", "tests.engine.toy_worker")
SLEEP_TOKEN, CRASH_TOKEN = 57, 58


class HazardousModel(ToyModel):
    """The toy, with a prompt token that hangs the step and one that kills the process: the fourth and third last.

    `num_texts` tokens have a text; the others are never sampled.
    """

    def __init__(self, max_len: int = 512, vocab_size: int = VOCAB, eos_id: int = EOS, num_texts: int = VOCAB) -> None:
        super().__init__(max_len, vocab_size, eos_id)
        self.num_texts = num_texts

    def forward(self, batch: Batch, cache: list[Any]) -> torch.Tensor:
        size = self.config.vocab_size
        if batch.num_decodes == 0 and (batch.token_ids == size - 3).any():
            os._exit(42)
        if batch.num_decodes == 0 and (batch.token_ids == size - 4).any():
            time.sleep(60)
        time.sleep(0.001)
        return super().forward(batch, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        logits[:, self.num_texts :] -= 40.0
        return logits


class AuditedEngine(Engine):
    """Checks queues, pages and references after every step; a discrepancy ends the worker with its name."""

    def step(self) -> list[RequestOutput]:
        outputs = super().step()
        self.scheduler.check()
        return outputs


def make_engine(config: EngineConfig) -> Engine:
    if config.model == "missing":
        raise ConfigError("model", "model: expected a folder with config.json, got 'missing'")
    return AuditedEngine(config, model=HazardousModel())


if __name__ == "__main__":
    sys.exit(worker.main(make_engine=make_engine))
