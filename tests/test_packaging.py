# SPDX-License-Identifier: Apache-2.0
"""What gets installed, and under which name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_is_listed() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("reads pyproject.toml with tomllib, which Python 3.10 lacks")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tracked = subprocess.check_output(["git", "ls-files", "*__init__.py"], cwd=ROOT, text=True).split()
    found = {str(Path(file).parent).replace("/", ".") for file in tracked if file.startswith("rocm_infer/")}
    assert set(settings["packages"]) == found | {"rocm_infer.triton_kernels"}
    assert settings["package-dir"] == {"rocm_infer.triton_kernels": "triton_kernels"}


def test_our_kernels_answer_to_our_name_only() -> None:
    assert importlib.import_module("rocm_infer.triton_kernels").__file__ == str(ROOT / "triton_kernels/__init__.py")
    plain = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert plain.returncode == 1
    assert "this folder is rocm_infer.triton_kernels" in plain.stderr
