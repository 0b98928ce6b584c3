# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.attn_prefill import attn_prefill
from tests import strategies as data
from tests.close import assert_close
from tests.ops import paged

heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (8, 1), (5, 1)])
head_sizes = st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
options = st.sampled_from(
    [
        {},
        {},
        {"causal": False},
        {"window": 1},
        {"window": 20},
        {"cap": 5.0},
        {"sinks": True},
        {"window": 33, "cap": 2.0, "sinks": True},
    ]
)
chunks = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 15, 16, 17, 40, 65]), st.sampled_from([0, 0, 1, 15, 16, 47])), min_size=1, max_size=3
)


def call(backend, device, q, made, query_lens, *, sinks=None, **scalars):
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    return attn_prefill.using(backend)(
        q.to(device),
        made.k_cache.to(device),
        made.v_cache.to(device),
        made.page_table.to(device),
        query_start.to(device),
        made.kv_len.to(device),
        None if sinks is None else sinks.to(device),
        **scalars,
    ).cpu()


def check(got, q, made, query_lens, backend, *, k_scale=1.0, v_scale=1.0, scale, **scalars):
    start = 0
    for row, (k, v, count) in enumerate(zip(made.k, made.v, query_lens)):
        k, v, own = k.double() * k_scale, v.double() * v_scale, slice(start, start + count)
        want, noise = paged.attention(q[own], k, v, len(k) - count, scale=scale, weight_type=q.dtype, **scalars)
        assert_close(got[own], want, noise=noise, backend=backend, what=f"sequence {row}: {count} of {len(k)} tokens")
        start += count


@given(chunks, heads, head_sizes, data.page_sizes, data.float_types, options, data.seeds, st.booleans())
def test_agrees_with_float64(backend, device, chunks, heads, sizes, page, dtype, options, seed, gaps):
    (num_heads, num_kv_heads), (size, v_size) = heads, sizes
    query_lens = [count for count, _ in chunks]
    made = paged.paged([sum(chunk) for chunk in chunks], page, num_kv_heads, size, v_size, dtype, seed, gap=gaps)
    q = data.normal((sum(query_lens), num_heads, size), seed, dtype)
    sinks = data.normal((num_heads,), seed + 5) if "sinks" in options else None
    scalars = {**options, "sinks": sinks, "scale": size**-0.5}
    got = call(backend, device, data.strided(q, device=device) if gaps else q, made, query_lens, **scalars)
    check(got, q, made, query_lens, backend, **scalars)


@paged.both_dialects
@paged.few
@given(data.page_sizes, st.sampled_from([(64, 64), (128, 128), (192, 128)]), data.seeds)
def test_fp8_cache(backend, device, fp8, page, sizes, seed):
    query_lens, kv_lens = [17, 1], [33, 16]
    made = paged.paged(kv_lens, page, 2, *sizes, fp8, seed)
    q = data.normal((18, 4, sizes[0]), seed, torch.bfloat16)
    scalars = {"scale": sizes[0] ** -0.5, "k_scale": 0.5, "v_scale": 3.0}
    check(call(backend, device, q, made, query_lens, **scalars), q, made, query_lens, backend, **scalars)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"cap": 3.0}, {"causal": False}])
def test_several_blocks_of_queries(backend, device, options):
    made = paged.paged([330, 200], 16, 1, 64, 64, torch.bfloat16, 3)
    query_lens = [300, 131]
    q = data.normal((431, 2, 64), 4, torch.bfloat16, 2.0)
    scalars = {"scale": 0.125, **options}
    check(call(backend, device, q, made, query_lens, **scalars), q, made, query_lens, backend, **scalars)


@paged.few
@given(data.page_sizes, data.seeds)
def test_sequences_do_not_know_each_other(backend, device, page, seed):
    query_lens, kv_lens = [40, 0, 7, 1], [60, 9, 7, 64]
    made = paged.paged(kv_lens, page, 2, 64, 64, torch.bfloat16, seed)
    q = data.normal((48, 4, 64), seed, torch.bfloat16)
    together = call(backend, device, q, made, query_lens, scale=0.125)
    start = 0
    for row, count in enumerate(query_lens):
        alone = paged.Paged([], [], made.k_cache, made.v_cache, made.page_table[row : row + 1], made.kv_len[row : row + 1])
        own = slice(start, start + count)
        assert torch.equal(call(backend, device, q[own], alone, [count], scale=0.125), together[own])
        start += count


def test_rows_that_no_sequence_owns_are_zeros(backend, device):
    made = paged.paged([9], 16, 2, 64, 64, torch.bfloat16, 0)
    got = call(backend, device, data.normal((12, 4, 64), 1, torch.bfloat16), made, [9], scale=0.125)
    assert not got[9:].any()
    made.page_table, made.kv_len = made.page_table[:0], made.kv_len[:0]
    assert not call(backend, device, torch.ones(3, 4, 64, dtype=torch.bfloat16), made, [], scale=0.125).any()


def test_a_page_beyond_2_to_31_elements(backend, device):
    """4.3 GB of address space, of which only the touched pages are backed by memory."""
    num_pages = 2**31 // (128 * 16) + 2
    cache = torch.empty(num_pages, 16, 1, 128, dtype=torch.float8_e4m3fn, device=device)
    last = num_pages - 1
    cache[last] = data.normal((16, 1, 128), 1).to(cache.dtype)
    rows = [cache[last].cpu()]
    table = torch.tensor([[last]], dtype=torch.int32)
    made = paged.Paged(rows, rows, cache, cache, table, torch.tensor([16], dtype=torch.int32))
    q = data.normal((5, 4, 128), 2, torch.bfloat16)
    check(call(backend, device, q, made, [5], scale=0.1), q, made, [5], backend, scale=0.1)


def test_wrong_arguments_are_named(backend):
    made = paged.paged([3], 16, 2, 64, 64, torch.float32, 0)
    with pytest.raises(ValueError, match=r"attn_prefill: query_start: expected size B \+ 1 = 2"):
        call(backend, "cpu", torch.zeros(3, 4, 64), made, [1, 2], scale=1.0)
    with pytest.raises(ValueError, match=r"attn_prefill: q: expected heads a multiple of the 2 kv heads, got 3"):
        call(backend, "cpu", torch.zeros(3, 3, 64), made, [3], scale=1.0)
