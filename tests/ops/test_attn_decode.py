# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.attn_decode import attn_decode
from tests import strategies as data
from tests.close import assert_close
from tests.ops import paged

heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (8, 2), (5, 1), (8, 1), (7, 1)])
head_sizes = st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
options = st.sampled_from(
    [{}, {}, {"window": 1}, {"window": 20}, {"cap": 5.0}, {"sinks": True}, {"window": 33, "cap": 2.0, "sinks": True}]
)


def call(backend, device, q, made, *, sinks=None, **scalars):
    return attn_decode.using(backend)(
        q.to(device),
        made.k_cache.to(device),
        made.v_cache.to(device),
        made.page_table.to(device),
        made.kv_len.to(device),
        None if sinks is None else sinks.to(device),
        **scalars,
    ).cpu()


def check(got, q, made, backend, *, k_scale=1.0, v_scale=1.0, scale, **scalars):
    for row, (k, v) in enumerate(zip(made.k, made.v)):
        k, v = k.double() * k_scale, v.double() * v_scale
        want, noise = paged.attention(q[row : row + 1], k, v, len(k) - 1, scale=scale, weight_type=q.dtype, **scalars)
        assert_close(got[row : row + 1], want, noise=noise, backend=backend, what=f"sequence {row} of {len(k)} tokens")


@given(data.ragged_lens(4), heads, head_sizes, data.page_sizes, data.float_types, options, data.seeds, st.booleans())
def test_agrees_with_float64(backend, device, lens, heads, sizes, page, dtype, options, seed, gaps):
    (num_heads, num_kv_heads), (size, v_size) = heads, sizes
    made = paged.paged(lens, page, num_kv_heads, size, v_size, dtype, seed, gap=gaps)
    q = data.normal((len(lens), num_heads, size), seed, dtype)
    sinks = data.normal((num_heads,), seed + 5) if "sinks" in options else None
    scalars = {**options, "sinks": sinks, "scale": size**-0.5}
    got = call(backend, device, data.strided(q, device=device) if gaps else q, made, **scalars)
    check(got, q, made, backend, **scalars)
    assert not got[[length == 0 for length in lens]].any()


@paged.both_dialects
@paged.few
@given(data.page_sizes, st.sampled_from([(64, 64), (80, 80), (128, 128)]), data.seeds)
def test_fp8_cache(backend, device, fp8, page, sizes, seed):
    lens = [33, 0, 16, 1]
    made = paged.paged(lens, page, 2, *sizes, fp8, seed)
    q = data.normal((len(lens), 8, sizes[0]), seed, torch.bfloat16)
    scalars = {"scale": sizes[0] ** -0.5, "k_scale": 0.5, "v_scale": 3.0}
    check(call(backend, device, q, made, **scalars), q, made, backend, **scalars)


@paged.both_dialects
def test_every_code_of_an_fp8_cache_arrives(backend, device, fp8):
    """One token, so the result is its values: subnormal codes, both zeros and NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8)[None, None, None]
    index = torch.zeros(1, 1, dtype=torch.int32)
    made = paged.Paged([], [], torch.zeros(1, 1, 1, 256).to(fp8), codes, index, torch.ones(1, dtype=torch.int32))
    got = call(backend, device, torch.zeros(1, 1, 256, dtype=torch.bfloat16), made, scale=1.0).float()[0, 0]
    want = codes[0, 0, 0].float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("length", [255, 256, 257, 700])
def test_many_splits(backend, device, length):
    made = paged.paged([length, 5, 513], 16, 2, 64, 64, torch.bfloat16, length)
    q = data.normal((3, 8, 64), length, torch.bfloat16, 2.0)
    for options in ({}, {"window": 100}):
        scalars = {"scale": 0.125, **options}
        check(call(backend, device, q, made, **scalars), q, made, backend, **scalars)


@paged.few
@given(data.page_sizes, data.seeds)
def test_sequences_do_not_know_each_other(backend, device, page, seed):
    lens = [300, 17, 0, 64]
    made = paged.paged(lens, page, 2, 64, 64, torch.bfloat16, seed)
    q = data.normal((4, 4, 64), seed, torch.bfloat16)
    together = call(backend, device, q, made, scale=0.125)
    for row in range(4):
        alone = paged.Paged([], [], made.k_cache, made.v_cache, made.page_table[row : row + 1], made.kv_len[row : row + 1])
        assert torch.equal(call(backend, device, q[row : row + 1], alone, scale=0.125), together[row : row + 1])


@paged.few
@given(data.seeds)
def test_where_pages_lie_does_not_matter(backend, device, seed):
    lens = [70, 33]
    q = data.normal((2, 4, 64), seed, torch.bfloat16)
    results = []
    for page, order in ((16, seed), (16, seed + 1), (1, seed)):
        made = paged.paged(lens, page, 2, 64, 64, torch.bfloat16, seed)
        table, num_pages = data.scattered_pages(lens, page, order)
        moved = paged.Paged(
            [],
            [],
            paged.filled((num_pages, page, 2, 64), torch.bfloat16),
            paged.filled((num_pages, page, 2, 64), torch.bfloat16),
            table,
            made.kv_len,
        )
        for row, length in enumerate(lens):
            slots = data.slots_of(table, row, length, page)
            moved.k_cache[slots // page, slots % page] = made.k[row]
            moved.v_cache[slots // page, slots % page] = made.v[row]
        results.append(call(backend, device, q, moved, scale=0.125))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_sequences(backend, device):
    made = paged.paged([3], 16, 2, 64, 64, torch.float32, 0)
    made.page_table, made.kv_len = made.page_table[:0], made.kv_len[:0]
    assert call(backend, device, torch.zeros(0, 4, 64), made, scale=1.0).shape == (0, 4, 64)


def test_a_page_beyond_2_to_31_elements(backend, device):
    """4.3 GB of address space, of which only the touched pages are backed by memory."""
    num_pages = 2**31 // (128 * 16) + 2
    cache = torch.empty(num_pages, 16, 1, 128, dtype=torch.float8_e4m3fn, device=device)
    last = num_pages - 1
    cache[last] = data.normal((16, 1, 128), 1).to(cache.dtype)
    q = data.normal((1, 4, 128), 2, torch.bfloat16)
    made = paged.Paged(
        [cache[last].cpu()],
        [cache[last].cpu()],
        cache,
        cache,
        torch.tensor([[last]], dtype=torch.int32),
        torch.tensor([16], dtype=torch.int32),
    )
    check(call(backend, device, q, made, scale=0.1), q, made, backend, scale=0.1)


def test_wrong_arguments_are_named(backend):
    made = paged.paged([3], 16, 2, 64, 64, torch.float32, 0)
    with pytest.raises(ValueError, match=r"attn_decode: q: expected dtype|attn_decode: k_cache: expected dtype"):
        call(backend, "cpu", torch.zeros(1, 4, 64, dtype=torch.float16), made, scale=1.0)
    with pytest.raises(ValueError, match="attn_decode: page_table: expected size B = 2"):
        call(backend, "cpu", torch.zeros(2, 4, 64), made, scale=1.0)
    with pytest.raises(ValueError, match=r"attn_decode: q: expected heads a multiple of the 2 kv heads, got 3"):
        call(backend, "cpu", torch.zeros(1, 3, 64), made, scale=1.0)
