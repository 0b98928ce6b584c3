# SPDX-License-Identifier: Apache-2.0
"""The identity of one HTTP request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Call:
    """One HTTP request: the id its client knows, and when it came."""

    id: str
    started: float = field(default_factory=time.perf_counter)
