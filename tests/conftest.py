# SPDX-License-Identifier: Apache-2.0
"""Which backends a test runs over, poison in every op's output, hypothesis profiles, and the closing table.

pytest tests/                        Triton kernels in its interpreter, HIP kernels in their host build
pytest tests/ --gpu                  the op tests on the GPU present
pytest tests/ops --emulate gfx942    the op tests as machine code of that architecture, in the emulator, with all its checks
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from rocm_infer.hip import _library, build
from rocm_infer.ops import _op
from rocm_infer.platform import exact_sums

hypothesis.settings.register_profile("dev", max_examples=20, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("brief", max_examples=3, deadline=None, derandomize=True)
hypothesis.settings.register_profile("emulated", max_examples=5, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


EMULATED = ("gfx942", "gfx950")
EMULATED_CUS = 4  # few, so that small sizes give every compute unit several tiles


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the op tests compiled, on the GPU present")
    parser.addoption("--emulate", choices=EMULATED, help="run the op tests as machine code of this architecture, emulated")
    parser.addoption("--require", default="", help="backends, comma separated, that must not be skipped")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch sees no GPU; on AMD install a ROCm build of torch (README, section AMD)")
    if config.getoption("--gpu"):
        exact_sums()
    if config.getoption("--emulate"):
        hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "emulated"))
    elif not config.getoption("--gpu"):
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any is imported


def _backends(op_name: str, on_gpu: bool, emulated: bool) -> list[str]:
    """The reference, then each backend that has a kernel for this op in the place where we run."""
    places = ("triton", "hip") if on_gpu or emulated else ("cpu", "triton", "hip")
    found = [] if emulated else ["reference"]
    for name in places:
        folder = f"rocm_infer.{_op.FOLDERS[name]}"
        if importlib.util.find_spec(folder) and importlib.util.find_spec(f"{folder}.{op_name}"):
            found.append(name)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        op_name = Path(metafunc.module.__file__).stem.removeprefix("test_")
        on_gpu = metafunc.config.getoption("--gpu")
        emulated = metafunc.config.getoption("--emulate") is not None
        found: list[object] = list(_backends(op_name, on_gpu, emulated))
        if "hip" in found and not on_gpu and not emulated:
            found.append(pytest.param("hip", id="hip-w32"))
        metafunc.parametrize("backend", found)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU and on an emulated device, the tests that launch kernels there."""
    if config.getoption("--emulate") or config.getoption("--gpu"):
        wanted = {"backend"} if config.getoption("--emulate") else {"backend", "device"}
        launching = {id(item) for item in items if wanted & set(getattr(item, "fixturenames", ()))}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in launching])
        items[:] = [item for item in items if id(item) in launching]
        for item in items:
            item.add_marker(pytest.mark.timeout(1200))  # Triton compiles


@functools.cache
def _build_hip(on_gpu: bool) -> str:
    """Brings the HIP kernels for the host, or for the GPU present, up to date; returns the reason if that cannot be."""
    if os.environ.get("ROCM_INFER_HIP_BUILD"):
        return ""
    tools, goals = build.find_tools(), ["host", "bind"]
    if on_gpu:
        goals.append("code_objects" if torch.version.hip else "cuda")
        if not (tools.clang if torch.version.hip else tools.nvcc):
            missing = "ROCm, or pip install ziglang" if torch.version.hip else "nvcc"
            return f"hip kernels cannot be built for this GPU: install {missing}"
    targets = build.visible_targets() if on_gpu else build.ALL_TARGETS
    try:
        build.build(tuple(goals), targets=targets, tools=tools)
    except build.BuildError as error:
        return f"hip kernels cannot be built here: {error}"
    return ""


@pytest.fixture(autouse=True)
def hip_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """HIP kernels for where the test runs. On the CPU: waves of 64 in the natural order of threads, or of 32 in another order in
    each launch."""
    case = getattr(request.node, "callspec", None)
    on_gpu = bool(request.config.getoption("--gpu"))
    if case is None or case.params.get("backend") != "hip" or request.config.getoption("--emulate"):
        return
    if reason := _build_hip(on_gpu):
        pytest.skip(reason)
    if on_gpu:
        return
    small = "w32" in case.id.split("-")
    monkeypatch.setattr(_library.host_settings, "wave_size", 32 if small else 64)
    monkeypatch.setattr(_library.host_settings, "order", 1 if small else 0)
    monkeypatch.setattr(_library.host_settings, "max_threads", int(os.environ.get("HIP_MAX_THREADS", "1024")))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where op tests put their tensors."""
    return "cuda" if pytestconfig.getoption("--gpu") else "cpu"


@pytest.fixture(scope="session")
def emulated_device(pytestconfig: pytest.Config) -> Iterator[Any]:
    """The emulated device of the whole run with all checks on, or None."""
    name = pytestconfig.getoption("--emulate")
    if name is None:
        yield None
        return
    from rocm_infer.emulator.session import emulated_device as emulate

    with emulate(name, threads=1, num_cus=EMULATED_CUS) as device:
        yield device


@pytest.fixture(autouse=True)
def watched_inputs(emulated_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an emulated device, a kernel that writes to an input of its op is an error."""
    if emulated_device is None:
        return
    using = _op.Op.using

    def watched(op: Any, backend: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            values = op._bind(args, kwargs)
            inputs = [values[spec.name] for spec in op.tensors if not spec.written]
            with emulated_device.watch(read_only=[t for t in inputs if isinstance(t, torch.Tensor)]):
                return using(op, backend)(*args, **kwargs)

        return run

    monkeypatch.setattr(_op.Op, "using", watched)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Counts the wave instructions a test executed on an emulated device."""
    device = getattr(item, "funcargs", {}).get("emulated_device")
    if device is not None:
        device.launches.clear()
    yield
    if device is not None:
        executed = sum(record.counters["instructions"] for record in device.launches)
        item.user_properties.append(("wave instructions", executed))


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory as a test wants it: NaN, or the smallest integer."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    if dtype.itemsize == 1:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)
    return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "empty", _poisoned)
    return


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Op tests by backend and outcome, and every reason for a skip."""
    arch = config.getoption("--emulate")
    place = f", emulated {arch}" if arch else ""
    counts: Counter[tuple[str, str]] = Counter()
    executed: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rows = []
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.rsplit("[", 1)[-1].rstrip("]").split("-")[0] if "[" in report.nodeid else ""
            properties = dict(report.user_properties)
            if name in ("reference", *_op.FOLDERS):
                counts[name, outcome] += 1
                executed[name] += properties.get("wave instructions", 0)
            rows += properties.get("closing rows", [])
            if outcome == "skipped":
                reasons[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
    for name in ("reference", *_op.FOLDERS):
        row = [f"{counts[name, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if counts[name, outcome]]
        if executed[name]:
            row.append(f"{executed[name] // 1000:,} thousand wave instructions")
        if row:
            terminalreporter.write_line(f"ops on {name}{place}: {', '.join(row)}")
    for line in sorted(rows):
        terminalreporter.write_line(line)
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`--require`: a backend that was skipped, or never ran, is a failure."""
    required = [name for name in session.config.getoption("--require").split(",") if name]
    if not required or not hasattr(session, "items") or hasattr(session.config, "workerinput"):
        return
    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    passed = " ".join(report.nodeid for report in stats.get("passed", []))
    skipped = " ".join(report.nodeid for report in stats.get("skipped", []))
    for name in required:
        if f"[{name}" not in passed or f"[{name}" in skipped:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
