# SPDX-License-Identifier: Apache-2.0
"""`pytest -p tests.emulator.plugin --emulate gfx942 tests/ops`: the op tests of the Triton and HIP backends on AMD machine code."""

from __future__ import annotations

import os

import hypothesis
import pytest

ARCHS = ("gfx942", "gfx950")
_NUM_CUS = 4  # few, so that small sizes give every compute unit several tiles

for _name, _examples in (("emulated", 4), ("emulated_fast", 1)):
    hypothesis.settings.register_profile(_name, max_examples=_examples, deadline=None, derandomize=True, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", choices=ARCHS, help="run the op tests as machine code of this architecture, in the emulator")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--emulate"):
        os.environ["TRITON_INTERPRET"] = "0"
        hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "emulated"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests that launch kernels."""
    if not config.getoption("--emulate"):
        return
    kept, dropped = [], []
    for item in items:
        case = getattr(item, "callspec", None)
        emulated = case is not None and case.params.get("backend") in ("triton", "hip") and "w32" not in case.id.split("-")
        (kept if emulated else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(autouse=True)
def emulated_session(pytestconfig: pytest.Config):
    name = pytestconfig.getoption("--emulate")
    if name is None:
        yield None
        return
    from rocm_infer.emulator.session import emulated_device  # imports Triton, which reads its mode then

    with emulated_device(name, threads=1, num_cus=_NUM_CUS) as device:
        yield device
