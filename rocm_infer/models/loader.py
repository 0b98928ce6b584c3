# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: safetensors files, seeded random numbers, or nowhere yet (to account for every name first)."""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from rocm_infer.config import ConfigError

INDEX_FILE = "model.safetensors.index.json"
# Buffers that old checkpoints carry and that follow from config.json.
DERIVED = r".*\.rotary_emb\.inv_freq"
MAX_NAMED = 8


class CheckpointError(ConfigError):
    """The files of a checkpoint are damaged, incomplete, or not those of its config.json."""

    def __init__(self, message: str) -> None:
        super().__init__("model", message)


class Source(Protocol):
    """Gives weights by their name in the checkpoint."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The named weight. shape is checked; dtype, where given, is what the file must hold."""


class Inventory:
    """Gives tensors without memory and remembers what was asked, so that a model can be built once on paper."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        self.asked[name] = (tuple(shape), dtype)
        return torch.empty(shape, dtype=dtype or torch.bfloat16, device="meta")


class DummyWeights:
    """Normal numbers of deviation 0.02 that depend on the seed and the name alone; norms are near 1, block scales small."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.seed = seed
        self.dtype = dtype

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator) * 0.02
        if name.endswith("norm.weight"):
            values += 1.0
        elif name.endswith("_scale_inv"):
            values = values.abs() + 0.01
        return values.to(dtype or self.dtype)


class Checkpoint:
    """The safetensors files of a directory, single or sharded, opened; a context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: list[Any] = []
        self._home: dict[str, tuple[Any, Path]] = {}
        self._bar: Any = None
        listed = self._index(directory / INDEX_FILE)
        paths = sorted({directory / name for name in listed.values()}) or sorted(directory.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{directory}: expected *.safetensors files, found none; other weight formats are not read")
        for path in paths:
            self._open(path)
        missing = sorted(listed.keys() - self._home.keys())
        if missing:
            raise CheckpointError(
                f"{directory}: {INDEX_FILE} lists weights that its files do not hold: {_some(missing)}; fetch them again"
            )

    def _index(self, path: Path) -> dict[str, str]:
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text())["weight_map"]
            return {str(name): str(file) for name, file in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: expected a JSON object with a weight_map, got {error!r}; fetch it again") from None

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: this shard is listed in {INDEX_FILE} but missing; fetch the checkpoint again")
        try:
            opened: Any = safe_open(path, framework="pt")
            opened.__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or cut short ({error}); fetch the file again") from None
        self._files.append(opened)
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            if name in self._home:
                raise CheckpointError(f"{path}: weight {name} is also in {self._home[name][1].name}; remove the stale files")
            self._home[name] = (opened, path)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for opened in self._files:
            opened.__exit__(kind, error, trace)
        if self._bar is not None:
            self._bar.close()

    def check(self, inventory: Inventory, skipped: Iterable[str]) -> None:
        """Raise one error that names every weight that is missing, left over, or of the wrong shape or type."""
        patterns = [re.compile(pattern) for pattern in (DERIVED, *skipped)]
        asked, held = inventory.asked, self._home.keys()
        complaints = []
        if missing := sorted(asked.keys() - held):
            complaints.append(f"missing: {_some(missing)}")
        left_over = [name for name in held - asked.keys() if not any(pattern.fullmatch(name) for pattern in patterns)]
        if left_over:
            complaints.append(f"not known to this architecture: {_some(sorted(left_over))}")
        wrong = [text for name in sorted(asked.keys() & held) if (text := self._mismatch(name, *asked[name]))]
        if wrong:
            complaints.append(f"wrong: {_some(wrong)}")
        if complaints:
            raise CheckpointError(f"{self.directory}: the weights do not fit config.json. " + ". ".join(complaints))

    def _mismatch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> str | None:
        found = self._home[name][0].get_slice(name)
        if tuple(found.get_shape()) != shape:
            return f"{name}: expected shape {shape}, got {tuple(found.get_shape())}"
        if dtype == torch.float8_e4m3fn and found.get_dtype() != "F8_E4M3":
            return f"{name}: expected type F8_E4M3 (config.json says fp8), got {found.get_dtype()}"
        if dtype is None and found.get_dtype() not in ("BF16", "F16", "F32", "F64"):
            return f"{name}: expected a floating type, got {found.get_dtype()} without a quantization_config that explains it"
        return None

    def show_progress(self, total: int, wanted: bool | None) -> None:
        """A bar over `total` weights; wanted None: only on a terminal."""
        shown = sys.stderr.isatty() if wanted is None else wanted
        self._bar = tqdm(total=total, desc="loading weights", unit="weight", disable=not shown)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        opened, path = self._home[name]
        try:
            found: torch.Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: weight {name} cannot be read ({error}); fetch the file again") from None
        if self._bar is not None:
            self._bar.update(1)
        return found


def _some(names: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
