# SPDX-License-Identifier: Apache-2.0
"""all_reduce with every rank on its own, as the processes of a group are: queued in streams that the host runs beside each other.

In each order of turns somebody is ahead and somebody lags. The kernel's own source with one line taken away shows that a missing
wait, or a half of the region that is written too early, would be found.
"""

from __future__ import annotations

import pytest
import torch

from rocm_infer.hip._library import Kernel
from rocm_infer.hip.build import ROOT
from tests.hip.conftest import built
from tests.hip.planted import load_bind
from tests.ops.test_all_reduce import Group, in_order, rows

ORDERS = range(12)
SOURCE = ROOT / "csrc/hip/all_reduce.hip"
WAIT = "wait_for(&own->arrived[block_y()][peer], mark);"
MUTATIONS = {
    "never_waits": (WAIT, "(void)own;"),
    "one_half": ("call % 2 ? p.half_bytes : 0", "0"),
    "calls_not_counted": ("own->calls[b] = call + 1", "own->calls[b] = call"),
}


def in_streams(library, op, calls, shots, order, world=4):
    """Every rank's calls in a stream of its own; for each call the rows y of all ranks."""
    library.set_order(order)
    group, arguments = Group(world, 2048, "cpu"), Kernel(op, 1, 4).arguments
    results = [torch.full_like(x, float("nan")) for x in calls]
    for rank in range(world):
        library.queue(rank)
        own = slice(rank, rank + 1)
        for x, y in zip(calls, results):
            library.call(op, arguments((y[own], x[own], group.shared[own], group.regions)), [rank, shots], 0)
    library.run_queued()
    return results


def six_calls(order, world=4):
    """Sizes of one block and of three, so that blocks sit calls out."""
    return [rows(world, 4 * (1 + (order + number) % 3 * 60), torch.float32, order + number) for number in range(6)]


@pytest.fixture(params=[64, 32])
def library(bind_folder, request):
    found = load_bind(bind_folder).Library(str(bind_folder / f"libkernels_w{request.param}.so"))
    found.set_max_threads(64)
    return found


@pytest.fixture(scope="module")
def mutated_files():
    """The source of each mutation, an op of its name."""
    folder = ROOT / "build" / "mutated"
    folder.mkdir(parents=True, exist_ok=True)
    files = {op: folder / f"{op}.hip" for op in MUTATIONS}
    for op, (line, instead) in MUTATIONS.items():
        text = SOURCE.read_text()
        assert text.count(line) == 1, f"{op}: {line!r} is not in {SOURCE.name} once"
        wanted = text.replace(line, instead).replace("all_reduce", op)
        if not files[op].exists() or files[op].read_text() != wanted:
            files[op].write_text(wanted)
    return files


@pytest.fixture(scope="module")
def mutated(mutated_files):
    """The library of all mutations."""
    return built(("kernels_w64",), "hip-mutated", sources=tuple(mutated_files.values()))


@pytest.mark.parametrize("shots", [1, 2])
def test_who_runs_ahead_waits_and_who_lags_catches_up(library, shots):
    for order in ORDERS:
        calls = six_calls(order)
        for number, (x, got) in enumerate(zip(calls, in_streams(library, "all_reduce", calls, shots, order))):
            assert torch.equal(got, in_order(x)), f"order {order}, call {number}"


@pytest.mark.parametrize(("op", "shots"), [("never_waits", 1), ("never_waits", 2), ("one_half", 1), ("calls_not_counted", 1)])
def test_what_could_go_wrong_does_when_its_line_is_missing(bind_folder, mutated, op, shots):
    library = load_bind(bind_folder).Library(str(mutated / "libkernels_w64.so"))
    library.set_max_threads(64)
    orders = [(order, six_calls(order)) for order in ORDERS]
    seen = [
        torch.equal(got, in_order(x))
        for order, calls in orders
        for x, got in zip(calls, in_streams(library, op, calls, shots, order))
    ]
    assert not all(seen)


def test_a_rank_that_never_comes_is_an_error_not_a_hang(library):
    group, x = Group(4, 64, "cpu"), rows(4, 16, torch.float32, 0)
    arguments = Kernel("all_reduce", 1, 4).arguments
    library.set_order(0)
    for rank in (0, 1, 3):
        own = slice(rank, rank + 1)
        library.queue(rank)
        library.call("all_reduce", arguments((x[own].clone(), x[own], group.shared[own], group.regions)), [rank, 0], 0)
    message = r"all_reduce: wait_for at .*all_reduce.hip:\d+: thread 2 of block \(0, 0, 0\) waits for a flag that nobody sets"
    with pytest.raises(RuntimeError, match=message):
        library.run_queued()
    (after,) = in_streams(library, "all_reduce", [x], 1, 0)
    assert torch.equal(after, in_order(x)), "the device goes on to serve"


def test_the_race_detector_sees_a_missing_wait_and_none_where_there_is_none(bind_folder, mutated_files, sanitized):
    """Memory of the ranks is ordered by their flags alone."""
    folder = built(("kernels_w64",), "hip-mutated-thread", sources=(SOURCE, mutated_files["never_waits"]), sanitize="thread")
    command = ["-m", "tests.hip.ranks", str(bind_folder), str(folder / "libkernels_w64.so")]
    right = sanitized("thread", [*command, "all_reduce"])
    assert right.returncode == 0, right.stderr[-3000:]
    assert right.stdout == "[2.0, 4.0]\n"
    wrong = sanitized("thread", [*command, "never_waits"])
    assert wrong.returncode == 66, wrong.stderr[-3000:]
    assert "data race" in wrong.stderr
