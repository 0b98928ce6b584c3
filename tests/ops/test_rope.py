# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.config import RopeConfig
from rocm_infer.ops.rope import mscale, rope, rope_frequencies, rope_table
from tests import strategies as data
from tests.close import EPS32, assert_close
from tests.ops import paged

LLAMA31 = RopeConfig(
    theta=500000.0, width=128, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
)
DEEPSEEK = RopeConfig(
    theta=10000.0, width=64, kind="yarn", factor=40.0, original_max_len=4096, mscale=1.0, mscale_all_dim=1.0, interleaved=True
)
heads = st.sampled_from([(1, 1), (4, 2), (3, 3), (8, 1), (5, 5)])
sizes = st.sampled_from([(64, 64), (128, 128), (128, 64), (96, 32), (80, 80), (192, 64), (2, 2), (7, 4)])


@given(data.num_tokens, heads, sizes, st.booleans(), data.float_types, data.seeds, st.booleans())
def test_agrees_with_complex_float64(backend, device, tokens, heads, sizes, interleaved, dtype, seed, gaps):
    (num_heads, num_kv_heads), (size, width) = heads, sizes
    q, k = data.normal((tokens, num_heads, size), seed, dtype), data.normal((tokens, num_kv_heads, size), seed + 1, dtype)
    table = paged.angle_table(50, width, seed)
    positions = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(seed))
    given_q, given_k = (data.strided(q, device=device), data.strided(k, device=device)) if gaps else (q.clone(), k.clone())
    given_q, given_k = given_q.to(device), given_k.to(device)
    rope.using(backend)(given_q, given_k, positions.to(device), table.to(device), interleaved=interleaved)
    for got, given_x in ((given_q, q), (given_k, k)):
        noise = 8 * EPS32 * float(given_x.double().abs().max()) if tokens else 0.0
        assert_close(got, paged.rotated(given_x, positions, table, interleaved), noise=noise, backend=backend)
        assert torch.equal(got[..., width:].cpu(), given_x[..., width:])


@data.few
@given(st.booleans(), data.seeds)
def test_tokens_do_not_know_each_other(backend, device, interleaved, seed):
    q = data.normal((4, 3, 64), seed).to(device)
    table = rope_table(RopeConfig(theta=10000.0, width=64), 10).to(device)
    positions = torch.tensor([9, 0, 3, 3], device=device)
    together, alone = q.clone(), q[2:3].clone()
    rope.using(backend)(together, q.clone(), positions, table, interleaved=interleaved)
    rope.using(backend)(alone, alone.clone(), positions[2:3], table, interleaved=interleaved)
    assert torch.equal(together[2:3], alone)
    assert torch.equal(together[1], q[1])


def test_a_view_into_a_fused_projection(backend, device):
    """q and k side by side in one row, as the models have them; v between the rows must not change."""
    fused = data.normal((3, 4 * 16), 1).to(device)
    kept = fused.clone()
    q, k = fused[:, :32].view(3, 2, 16), fused[:, 32:48].view(3, 1, 16)
    table, positions = paged.angle_table(9, 16, 2), torch.tensor([8, 1, 4])
    want_q, want_k = (paged.rotated(x.cpu(), positions, table, False) for x in (q, k))
    rope.using(backend)(q, k, positions.to(device), table.to(device))
    assert_close(fused[:, :32].reshape(3, 2, 16), want_q, noise=1e-5, backend=backend)
    assert_close(fused[:, 32:48].reshape(3, 1, 16), want_k, noise=1e-5, backend=backend)
    assert torch.equal(fused[:, 48:], kept[:, 48:])


def transformers_frequencies(config: RopeConfig, scaling: dict[str, float | str]) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = LlamaConfig(
        head_dim=config.width, max_position_embeddings=131072, rope_parameters={"rope_theta": config.theta, **scaling}
    )
    return ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (RopeConfig(theta=10000.0, width=64, kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            LLAMA31,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            DEEPSEEK,
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        ),
        (
            RopeConfig(
                theta=10000.0, width=64, kind="yarn", factor=40.0, original_max_len=4096, mscale=0.707, mscale_all_dim=0.5
            ),
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 0.707,
                "mscale_all_dim": 0.5,
            },
        ),
        (
            RopeConfig(theta=1e6, width=128, kind="yarn", factor=4.0, original_max_len=32768),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        (
            RopeConfig(
                theta=1e6, width=128, kind="yarn", factor=4.0, original_max_len=32768, attention_factor=0.8, beta_fast=16
            ),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "attention_factor": 0.8,
                "beta_fast": 16,
            },
        ),
        (
            RopeConfig(theta=10000.0, width=16, kind="yarn", factor=2.0, original_max_len=8),
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
        ),
    ],
    ids=["linear", "llama3", "yarn-deepseek-v3", "yarn-deepseek-v2", "yarn-qwen", "yarn-given-factor", "yarn-tiny"],
)
def test_tables_are_those_of_transformers(config, scaling):
    frequency, amplitude = transformers_frequencies(config, scaling)
    assert_close(rope_frequencies(config), frequency.double(), roundings=4)
    angle = torch.arange(300).float()[:, None] * frequency
    want = torch.cat([angle.cos(), angle.sin()], -1).double() * amplitude
    # Frequencies agree to a few ulps, which the position multiplies.
    assert_close(rope_table(config, 300), want, noise=8 * EPS32 * (1 + torch.arange(300.0)[:, None]) * amplitude)


def test_plain_table_is_the_formula():
    table = rope_table(RopeConfig(theta=10000.0, width=8), 5)
    angle = torch.tensor([[p * 10000.0 ** (-i / 4) for i in range(4)] for p in range(5)], dtype=torch.float64)
    assert_close(table, torch.cat([angle.cos(), angle.sin()], -1), noise=1e-6)
    assert rope_table(RopeConfig(theta=10000.0, width=8), 0).shape == (0, 8)


def test_deepseek_v3_by_hand():
    """Pairs 0 to 10 keep their frequency, from 23 on it is a 40th, 16 lies 6/13 of the way; cos and sin are not scaled."""
    plain = torch.tensor([10000.0 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    frequency = rope_frequencies(DEEPSEEK)
    assert_close(frequency[:11], plain[:11], roundings=4)
    assert_close(frequency[23:], plain[23:] / 40, roundings=4)
    assert_close(frequency[16:17], plain[16:17] * (7 / 13 + 6 / 13 / 40), roundings=6)
    assert rope_table(DEEPSEEK, 1)[0].tolist() == [1.0] * 32 + [0.0] * 32
    assert mscale(40.0, 1.0) == pytest.approx(1.368888, abs=1e-6)
    assert 192**-0.5 * mscale(40.0, 1.0) ** 2 == pytest.approx(0.1352338, abs=1e-7)


def test_llama31_by_hand():
    """Wavelengths below 2048 are kept, above 8192 multiplied by 8, one between is blended."""
    plain = torch.tensor([500000.0 ** (-i / 64) for i in range(64)], dtype=torch.float64)
    length = 2 * math.pi / plain
    share = (8192 / length - 1) / 3
    want = torch.where(length < 2048, plain, torch.where(length > 8192, plain / 8, (1 - share) * plain / 8 + share * plain))
    assert 0 < int(((length >= 2048) & (length <= 8192)).sum()) < 10
    assert_close(rope_frequencies(LLAMA31), want, roundings=32)


def test_wrong_arguments_are_named():
    q, positions = torch.zeros(2, 1, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="rope: table: expected an even width R of at most D = 8, got 10"):
        rope.using("reference")(q, q.clone(), positions, torch.zeros(4, 10))
    with pytest.raises(ValueError, match=r"rope: positions: expected size T = 2 \(from q\), got 3"):
        rope(q, q.clone(), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 8))
    with pytest.raises(ValueError, match="rope: kind: expected none, linear, llama3 or yarn, got 'ntk'"):
        rope_table(RopeConfig(theta=10000.0, width=8, kind="ntk"), 4)
