# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.store_mla import store_mla
from tests import strategies as data
from tests.close import EPS32, assert_close
from tests.ops import paged

sizes = st.sampled_from([(512, 64), (64, 32), (96, 16), (128, 64)])


@given(
    data.num_tokens,
    st.sampled_from([1, 3, 16]),
    sizes,
    data.page_sizes,
    data.float_types,
    st.booleans(),
    data.seeds,
    st.booleans(),
)
def test_rows_arrive_rotated_and_nothing_else_changes(
    backend, device, tokens, heads, sizes, page, dtype, interleaved, seed, gaps
):
    latent, rope = sizes
    c, k_pe = data.normal((tokens, latent), seed, dtype), data.normal((tokens, rope), seed + 1, dtype)
    q_pe = data.normal((tokens, heads, rope), seed + 2, dtype)
    table = paged.angle_table(40, rope, seed)
    positions = torch.randint(0, 40, (tokens,), generator=torch.Generator().manual_seed(seed))
    num_pages = -(-tokens // page) + 2
    slots = torch.randperm(num_pages * page, generator=torch.Generator().manual_seed(seed))[:tokens]
    slots[::4] = -1
    untouched = paged.filled((num_pages, 2, page, latent + rope), dtype)
    cache = untouched.clone().to(device)
    given_c, given_pe = (data.strided(c, device=device), data.strided(k_pe, device=device)) if gaps else (c, k_pe)
    given_q = (data.strided(q_pe, device=device) if gaps else q_pe.clone()).to(device)
    given_k = given_pe.to(device)
    store_mla.using(backend)(
        given_c.to(device),
        given_k,
        cache[:, 1],
        slots.to(device),
        given_q,
        positions.to(device),
        table.to(device),
        interleaved=interleaved,
    )
    kept = slots >= 0
    page_of, offset = slots[kept] // page, slots[kept] % page
    stored = cache.cpu()[page_of, 1, offset]
    noise = 40 * EPS32
    assert torch.equal(stored[:, :latent], c[kept])
    want = paged.rotated(k_pe[:, None], positions, table, interleaved)[:, 0]
    assert_close(stored[:, latent:], want[kept], noise=noise, backend=backend, what="k_pe")
    assert_close(given_q, paged.rotated(q_pe, positions, table, interleaved), noise=noise, backend=backend, what="q_pe")
    assert torch.equal(given_k.cpu(), k_pe)
    untouched[page_of, 1, offset] = stored
    assert torch.equal(paged.bits(cache), paged.bits(untouched))


@paged.both_dialects
@paged.few
@given(data.num_tokens, sizes, st.sampled_from([1.0, 0.3]), data.seeds)
def test_fp8_cache_without_rope(backend, device, fp8, tokens, sizes, scale, seed):
    latent, rope = sizes
    c = data.normal((tokens, latent), seed, torch.bfloat16, 100.0)
    k_pe = data.normal((tokens, rope), seed + 1, torch.bfloat16, 100.0)
    slots = torch.randperm(tokens + 5, generator=torch.Generator().manual_seed(seed))[:tokens]
    cache = paged.filled((tokens + 5, 1, latent + rope), fp8, 0.0).to(device)
    store_mla.using(backend)(c.to(device), k_pe.to(device), cache, slots.to(device), kv_scale=scale)
    want = paged.as_stored(torch.cat([c, k_pe], -1), fp8, scale).float().to(fp8)
    assert torch.equal(paged.bits(cache[slots.to(device), 0]), paged.bits(want))


def test_a_slot_beyond_2_to_31_elements(backend, device):
    """Address space only: of the cache, just the touched pages are backed by memory."""
    row, page = 576, 64
    num_pages = 2**31 // (row * page) + 2
    cache = torch.empty(num_pages, page, row, dtype=torch.float8_e4m3fn, device=device)
    ones = torch.ones(1, row, dtype=torch.bfloat16, device=device)
    store_mla.using(backend)(ones[:, :512], ones[:, 512:], cache, torch.tensor([num_pages * page - 1], device=device))
    assert (cache[-1, -1].float() == 1).all()


def test_wrong_arguments_are_named(backend):
    c, k_pe, slots = torch.zeros(3, 64), torch.zeros(3, 16), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"store_mla: cache: expected size L \+ R = 80, got 96"):
        store_mla.using(backend)(c, k_pe, torch.zeros(4, 1, 96), slots)
    with pytest.raises(ValueError, match="store_mla: q_pe, positions, table: expected all or none of them, got some"):
        store_mla.using(backend)(c, k_pe, torch.zeros(4, 1, 80), slots, positions=slots)
