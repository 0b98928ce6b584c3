# SPDX-License-Identifier: Apache-2.0
"""One request: its tokens, where it stands, what it holds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from rocm_infer.config import SamplingParams
from rocm_infer.engine.messages import ErrorCode, ErrorInfo, FinishReason


class RequestRefused(Exception):
    """A request was not accepted; `info` says why."""

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.info = ErrorInfo(code, message, param)


class Status(enum.Enum):
    """WAITING: holds nothing. RUNNING: holds pages (prompt partly or wholly computed). FINISHED: holds nothing again."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()
