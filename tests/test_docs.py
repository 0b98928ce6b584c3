# SPDX-License-Identifier: Apache-2.0
"""What README and CONTRIBUTING say is so: the support table, the files, the commands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from rocm_infer.tools.explain import support_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")


def between(text: str, mark: str) -> str:
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def test_support_table_is_the_generated_one() -> None:
    written = between((ROOT / "README.md").read_text(), "support table")
    assert written == support_table(), "run `rocm-infer explain --markdown` and put its output into README.md"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:rocm_infer|triton_kernels|csrc|tests|bench|training|docs)/[\w./-]*)`", text))
    named |= set(re.findall(r"^    ((?:rocm_infer|triton_kernels|csrc|tests|bench|training)/[\w/]*)", text, re.MULTILINE))
    assert named
    missing = [name for name in sorted(named) if not (ROOT / name).exists() and not (ROOT / name.rstrip("/")).exists()]
    assert not missing, f"{page} names what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_named_modules_exist(page: str) -> None:
    for name in set(re.findall(r"python -m (bench\.\w+)", (ROOT / page).read_text())):
        assert (ROOT / (name.replace(".", "/") + ".py")).exists(), f"{page} names python -m {name}"


def test_the_python_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    example = (ROOT / "README.md").read_text().split("and from Python:\n\n")[1].split("\n\n")[0]
    exec(textwrap.dedent(example), {})
    assert capsys.readouterr().out.split() == re.findall(r"# (.*)", example)
