# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can check: imports go down, every source says its licence, no stray prints of place."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package may import those in its own row and all below.
LEVELS = (
    ("cli",),
    ("server", "llm", "tools"),
    ("text",),
    ("engine",),
    ("models",),
    ("ops",),
    ("cpu_kernels", "triton_kernels", "hip", "emulator"),
    ("hub", "arch", "config", "env", "logs", "platform", "version"),
)
LEVEL = {name: depth for depth, row in enumerate(LEVELS) for name in row}
NO_TORCH = (
    "server",
    "text",
    "engine/request.py",
    "engine/kv_cache.py",
    "engine/scheduler.py",
    "engine/messages.py",
    "engine/client.py",
)
OUTSIDE = ("bench", "tests", "training")


def sources() -> list[Path]:
    files = [ROOT / line for line in subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()]
    return [file for file in files if file.exists()]


def imports(file: Path) -> list[str]:
    """Every imported module name, imports inside functions and under TYPE_CHECKING included."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(parts: tuple[str, ...]) -> str:
    """The part of the package a file or module belongs to."""
    if parts[0] == "triton_kernels":
        return "triton_kernels"
    return parts[1].removesuffix(".py") if len(parts) > 1 else ""


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_file_keeps_the_rules(file: Path) -> None:
    relative = file.relative_to(ROOT)
    text = file.read_text()
    assert not text or text.startswith("# SPDX-License-Identifier: Apache-2.0"), f"{relative}: first line must be the licence"
    assert not re.search(r"(TODO|FIXME|XXX)\b", text) or relative == Path("tests/test_layout.py"), (
        f"{relative}: unfinished marks"
    )
    if relative.parts[0] not in ("rocm_infer", "triton_kernels"):
        return
    own = room(relative.parts)
    for name in imports(file):
        parts = tuple(name.split("."))
        assert parts[0] not in OUTSIDE, f"{relative} imports {name}: nothing imports {', '.join(OUTSIDE)}"
        if parts[0] == "rocm_infer" and len(parts) > 1 and own in LEVEL and parts[1] in LEVEL:
            assert LEVEL[own] <= LEVEL[parts[1]], f"{relative} imports {name}: imports go down only"
    inside = str(relative).removeprefix("rocm_infer/")
    if inside.startswith(NO_TORCH):
        assert not {"torch"} & {name.split(".")[0] for name in imports(file)}, f"{relative}: must not import torch"


def test_kernel_files_sit_under_their_op() -> None:
    contracts = {file.stem for file in (ROOT / "rocm_infer/ops").glob("[a-z]*.py")}
    for folder, pattern in (("rocm_infer/cpu_kernels", "[a-z]*.py"), ("triton_kernels", "[a-z]*.py"), ("csrc/hip", "*.hip")):
        for file in (ROOT / folder).glob(pattern):
            assert file.stem in contracts | {"common"}, f"{file.relative_to(ROOT)}: no contract of that name in rocm_infer/ops"
    for contract in contracts:
        assert (ROOT / f"tests/ops/test_{contract}.py").exists(), f"{contract}: has no test"
