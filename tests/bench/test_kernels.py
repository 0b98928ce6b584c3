# SPDX-License-Identifier: Apache-2.0
"""bench.kernels on the CPU: calls are made, checked and told apart; how long they take is nobody's business here."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import kernels
from bench.shapes import Variant
from rocm_infer.ops.rms_norm import rms_norm

SMALL = {
    "attn_decode": {"B": 2, "H": 4, "G": 2, "D": 64, "P": 16, "L": 40},
    "mla_decode": {"B": 2, "S": 1, "H": 4, "K": 40, "L": 512, "R": 64, "P": 16},
    "rms_norm": {"T": 5, "C": 64},
    "store_kv": {"T": 5, "H": 4, "G": 2, "D": 64, "P": 16, "R": 64},
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(kernels, "ROTATED_BYTES", 1 << 16)
    return kernels.Bench(torch.device("cpu"), kernels.Limits(1e10, 1e11, 0.0, published=False), rounds=1)


@pytest.mark.parametrize("op", SMALL)
def test_a_call_is_checked_and_held_against_the_limits(bench, op):
    variant = Variant(op, "small", 1, "x", SMALL[op])
    rows = bench.run(variant, ["cpu", "reference"], with_peers=False)
    assert {"reference"} <= {row.what for row in rows}
    for row in rows:
        assert row.note == ""
        assert row.seconds > 0
        assert row.gb_per_s == pytest.approx(row.bytes / row.seconds / 1e9)
        assert row.own_share == pytest.approx(max(row.bytes / 1e10, row.flops / 1e11) / row.seconds)
        assert row.error is None or row.error < 0.02
    assert f"{op}" in kernels.table(rows)


@pytest.mark.parametrize("fault", ["scaled", "raises"])
def test_a_wrong_kernel_is_not_timed(bench, monkeypatch, fault):
    def wrong(*args, **kwargs):
        if fault == "raises":
            raise ValueError("no such head size")
        return rms_norm.fn(*args, **kwargs) * 1.1

    monkeypatch.setattr(rms_norm, "using", lambda backend: rms_norm.fn if backend == "reference" else wrong)
    row = bench.run(Variant("rms_norm", "small", 1, "x", SMALL["rms_norm"]), ["triton"], with_peers=False)[0]
    assert row.seconds is None
    assert ("error 0.1" if fault == "scaled" else "ValueError: no such head size") in row.note
    assert "not timed" in kernels.table([row])


def test_writes_are_compared_where_they_should_be_and_nowhere_else():
    before = {"cache": torch.full((4, 8), float("nan"))}
    right = before["cache"].clone()
    right[1] = 2.0
    assert kernels.check({"cache": right.clone()}, {"cache": right}, before) == 0
    for place, message in ((1, "error"), (3, "leaves it alone")):
        wrong = right.clone()
        wrong[place, 0] = 1.0
        with pytest.raises(kernels.Wrong, match=message):
            kernels.check({"cache": wrong}, {"cache": right}, before)


def test_random_numbers_come_from_the_device_with_their_seed():
    def made():
        with kernels.RandomOnDevice(torch.device("cpu"), seed=3):
            return torch.randn(4, generator=torch.Generator().manual_seed(7))

    assert torch.equal(made(), made())
    assert not torch.equal(made(), torch.randn(4, generator=torch.Generator().manual_seed(7)))


def test_without_a_gpu_it_says_floors_and_that_nothing_was_timed(capsys):
    assert kernels.main(["--quick", "--op", "mla_decode", "--arch", "gfx942"]) == 0
    out = capsys.readouterr().out
    assert "nothing was timed" in out
    assert "gfx942 us at least" in out
    # 64 sequences of 4096 latent rows of 1152 bytes at 5.3 TB/s.
    line = next(line for line in out.splitlines() if "B64 S1 P16 bf16 " in line)
    assert float(line.split("(memory)")[0].split()[-1]) == pytest.approx(64 * 4096 * 1152 / 5.3e12 * 1e6, rel=0.02)


def test_charts_and_unknown_ops(tmp_path):
    row = kernels.Row("rms_norm", "v", "triton", 10, 10, 1e-6, 0.0, 1.0, 1.0, 0.5, 0.6, "memory")
    kernels.plot([row, dataclasses.replace(row, what="torch", share=0.2)], "device", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    json.dumps(dataclasses.asdict(row))
    with pytest.raises(SystemExit, match="no op named rms_nrom"):
        kernels.chosen(kernels.parse_args(["--op", "rms_nrom"]))
