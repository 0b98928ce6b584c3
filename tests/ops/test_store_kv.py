# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.store_kv import store_kv
from tests import strategies as data
from tests.close import EPS32, assert_close
from tests.ops import paged

heads = st.sampled_from([(1, 1), (4, 2), (3, 3), (8, 1)])
head_sizes = st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])


def random_slots(num: int, total: int, seed: int, num_skipped: int = 0) -> torch.Tensor:
    slots = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num]
    slots[torch.randperm(num, generator=torch.Generator().manual_seed(seed + 1))[:num_skipped]] = -1
    return slots


def rope_noise(x: torch.Tensor) -> float:
    """Two products and a sum in fp32."""
    return 4 * EPS32 * 2 * float(x.double().abs().max()) if x.numel() else 0.0


@given(data.num_tokens, heads, head_sizes, data.page_sizes, data.float_types, data.seeds, st.booleans())
def test_plain_rows_arrive_and_nothing_else_changes(backend, device, tokens, heads, sizes, page, dtype, seed, gaps):
    (_, num_kv_heads), (size, v_size) = heads, sizes
    k = data.normal((tokens, num_kv_heads, size), seed, dtype)
    v = data.normal((tokens, num_kv_heads, v_size), seed + 1, dtype)
    num_pages = -(-tokens // page) + 2
    slots = random_slots(tokens, num_pages * page, seed, tokens // 4)
    k_cache = paged.filled((num_pages, 2, page, num_kv_heads, size), dtype)
    v_cache = paged.filled((num_pages, 2, page, num_kv_heads, v_size), dtype)
    want = [cache.clone() for cache in (k_cache, v_cache)]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[0][slot // page, 1, slot % page], want[1][slot // page, 1, slot % page] = k[token], v[token]
    k_cache, v_cache = k_cache.to(device), v_cache.to(device)
    given_k, given_v = (data.strided(k, device=device), data.strided(v, device=device)) if gaps else (k, v)
    store_kv.using(backend)(given_k.to(device), given_v.to(device), k_cache[:, 1], v_cache[:, 1], slots.to(device))
    assert torch.equal(paged.bits(k_cache), paged.bits(want[0]))
    assert torch.equal(paged.bits(v_cache), paged.bits(want[1]))


@given(
    data.num_tokens,
    heads,
    st.sampled_from([(64, 64), (128, 128), (128, 64), (96, 32), (80, 80)]),
    st.booleans(),
    data.float_types,
    data.seeds,
    st.booleans(),
)
def test_rope_is_fused(backend, device, tokens, heads, sizes, interleaved, dtype, seed, gaps):
    (num_heads, num_kv_heads), (size, width), page = heads, sizes, 4
    q = data.normal((tokens, num_heads, size), seed, dtype)
    k = data.normal((tokens, num_kv_heads, size), seed + 1, dtype)
    table = paged.angle_table(50, width, seed)
    positions = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(seed))
    slots = random_slots(tokens, (tokens + 2) * page, seed, tokens // 4)
    cache = paged.filled((tokens + 2, page, num_kv_heads, size), dtype).to(device)
    given_q = (data.strided(q, device=device) if gaps else q.clone()).to(device)
    given_k = k.to(device)
    store_kv.using(backend)(
        given_k,
        given_k,
        cache,
        torch.zeros_like(cache),
        slots.to(device),
        given_q,
        positions.to(device),
        table.to(device),
        interleaved=interleaved,
    )
    want_q = paged.rotated(q, positions, table, interleaved)
    want_k = paged.rotated(k, positions, table, interleaved)
    assert_close(given_q, want_q, noise=rope_noise(q), backend=backend, what="q")
    assert torch.equal(given_k.cpu(), k)
    kept = slots >= 0
    stored = cache.cpu()[slots[kept] // page, slots[kept] % page]
    assert_close(stored, want_k[kept], noise=rope_noise(k), backend=backend, what="k")
    if width < size:
        assert torch.equal(given_q[..., width:].cpu(), q[..., width:])


@paged.both_dialects
@paged.few
@given(st.sampled_from([1, 7, 16]), st.sampled_from([1.0, 0.25, 3.0]), st.booleans(), data.seeds)
def test_fp8_cache_is_scaled_clamped_and_rounded_once(backend, device, fp8, tokens, scale, rope, seed):
    size, page = 64, 16
    q, k, v = (data.normal((tokens, 2, size), seed + n, torch.bfloat16, 100.0) for n in range(3))
    table, positions = paged.angle_table(9, size, seed), torch.arange(tokens) % 9
    slots = random_slots(tokens, 2 * page, seed)
    k_cache, v_cache = paged.filled((2, page, 2, size), fp8, 0.0), paged.filled((2, page, 2, size), fp8, 0.0)
    caches = k_cache.to(device), v_cache.to(device)
    rope_args = (q.to(device), positions.to(device), table.to(device)) if rope else ()
    store_kv.using(backend)(k.to(device), v.to(device), *caches, slots.to(device), *rope_args, k_scale=scale, v_scale=2 * scale)
    want_k = paged.rotated(k, positions, table, False) if rope else k
    for cache, rows, own_scale in ((caches[0], want_k, scale), (caches[1], v, 2 * scale)):
        stored = cache.cpu()[slots // page, slots % page]
        want = paged.as_stored(rows, fp8, own_scale)
        assert_close(stored.float(), want, noise=rope_noise(k) / scale, rounded_to=fp8, backend=backend)
        if rows is v:
            assert torch.equal(paged.bits(stored), paged.bits(want.float().to(fp8)))


@paged.both_dialects
def test_nan_stays_nan_in_an_fp8_cache(backend, device, fp8):
    k = torch.full((1, 1, 16), float("nan"), dtype=torch.bfloat16, device=device)
    cache = paged.filled((1, 1, 1, 16), fp8, 0.0).to(device)
    store_kv.using(backend)(k, k, cache, cache.clone(), torch.zeros(1, dtype=torch.int64, device=device))
    assert cache.float().isnan().all()


def test_a_slot_beyond_2_to_31_elements(backend, device):
    """4.3 GB of address space, of which only the touched pages are backed by memory."""
    size, page, num_pages = 128, 16, 2**31 // (128 * 16) + 2
    cache = torch.empty(num_pages, page, 1, size, dtype=torch.float8_e4m3fn, device=device)
    k = torch.ones(2, 1, size, dtype=torch.bfloat16, device=device)
    slots = torch.tensor([num_pages * page - 1, num_pages * page - page], device=device)
    assert slots.min() * size > 2**31
    store_kv.using(backend)(k, k, cache, cache, slots)
    assert (cache[-1, [0, page - 1]].float() == 1).all()


def test_wrong_arguments_are_named(backend):
    k = torch.zeros(3, 2, 8)
    cache, slots = torch.zeros(4, 1, 2, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="store_kv: q, positions, table: expected all or none of them, got some"):
        store_kv.using(backend)(k, k, cache, cache, slots, k)
    with pytest.raises(ValueError, match=r"store_kv: k_cache: expected size G = 2 \(from k\), got 3"):
        store_kv.using(backend)(k, k, torch.zeros(4, 1, 3, 8), cache, slots)
    with pytest.raises(ValueError, match="store_kv: slots: expected dtype int64"):
        store_kv.using(backend)(k, k, cache, cache, slots.int())
