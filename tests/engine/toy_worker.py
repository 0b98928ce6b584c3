# SPDX-License-Identifier: Apache-2.0
"""The engine worker with the toy model: `EngineClient(config, command=TOY_WORKER)`."""

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
from tests.engine.toy import ToyModel

TOY_WORKER = (sys.executable, "-m", "tests.engine.toy_worker")
SLEEP_TOKEN, CRASH_TOKEN = 57, 58


class HazardousModel(ToyModel):
    """The toy, with a prompt token that hangs the step and one that kills the process."""

    def forward(self, batch: Batch, cache: list[Any]) -> torch.Tensor:
        if batch.num_decodes == 0 and (batch.token_ids == CRASH_TOKEN).any():
            os._exit(42)
        if batch.num_decodes == 0 and (batch.token_ids == SLEEP_TOKEN).any():
            time.sleep(60)
        time.sleep(0.001)
        return super().forward(batch, cache)


def make_engine(config: EngineConfig) -> Engine:
    if config.model == "missing":
        raise ConfigError("model", "model: expected a folder with config.json, got 'missing'")
    return Engine(config, model=HazardousModel())


if __name__ == "__main__":
    sys.exit(worker.main(make_engine=make_engine))
