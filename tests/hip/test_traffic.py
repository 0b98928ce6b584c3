# SPDX-License-Identifier: Apache-2.0
"""What mla_decode reads, counted while its machine code runs: the latent cache comes from memory once per split."""

from __future__ import annotations

import pytest

from rocm_infer.emulator.device import FAST, Device
from rocm_infer.emulator.hip_driver import HipDriver
from rocm_infer.hip import _library, build
from rocm_infer.ops.mla_decode import mla_decode

ROW_BYTES = 2 * (512 + 64)
TABLE_BYTES = 4  # each token's page is looked up once
# How rows reach LDS, and how the values leave it: past the registers and transposed where the chip can, else as 16 bytes.
INSTRUCTIONS = {"gfx942": ("ds_write_b128", "ds_read_b128"), "gfx950": ("global_load_lds_dwordx4", "ds_read_b64_tr_b16")}


@pytest.fixture(params=["gfx942", "gfx950"])
def driver(request, monkeypatch) -> HipDriver:
    if not build.find_tools().clang:
        pytest.skip("no clang with AMDGPU here: pip install ziglang")
    found = HipDriver(Device(request.param, checks=FAST, threads=1))
    monkeypatch.setattr(_library.host_settings, "emulator", found)
    return found


def read_by_splits(driver: HipDriver, heads: int, length: int) -> int:
    """Bytes that the kernel of the splits reads of memory for one sequence of `length` tokens, the new one included."""
    sizes = {"B": 1, "S": 1, "H": heads, "K": length, "L": 512, "R": 64, "P": 16}
    arguments = mla_decode.inputs(sizes)
    driver.device.launches.clear()
    mla_decode.using("hip")(**arguments)
    (splits,) = [record for record in driver.device.launches if "merge" not in record.kernel]
    return splits.counters["bytes_read"]


@pytest.mark.parametrize(("heads", "blocks"), [(16, 1), (32, 1), (48, 2)])
def test_a_token_more_is_its_row_more(driver, heads, blocks):
    """Within a step of 32 tokens nothing else changes, so the difference is what a cached token costs: per 32 queries one row."""
    few, many = read_by_splits(driver, heads, 260), read_by_splits(driver, heads, 284)
    assert many - few == 24 * blocks * (ROW_BYTES + TABLE_BYTES)


def test_the_chips_own_instructions_move_the_tile(driver):
    driver.supports("mla_decode")
    text = (driver.folder / "mla_decode.s").read_text()
    exact = text.split("_Z17mla_decode_kernelIN4grid4bf16ELb0ELi1ELb1EEvNS0_12DecodeParamsE:")[1].split("s_endpgm")[0]
    for wanted in INSTRUCTIONS[driver.device.arch]:
        assert wanted in exact, f"{driver.device.arch}: no {wanted}"
    assert "ds_read_u16" not in exact
