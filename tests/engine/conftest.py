# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name: the workers' sockets lie in it, and the kernel bounds the length of their paths."""
    with tempfile.TemporaryDirectory(prefix="ri-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
