# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocm_infer.ops.mla_decode import mla_decode
from rocm_infer.ops.store_mla import store_mla
from tests import strategies as data
from tests.close import HALF_ULP, assert_close
from tests.ops import paged

sizes = st.sampled_from([(64, 32), (96, 16), (128, 64)])
num_heads = st.sampled_from([1, 4, 16, 17, 32])
num_new = st.sampled_from([1, 1, 2, 3, 4])


@dataclass
class Case:
    """Sequences whose last `num_new` tokens are still to be written; all other cache rows are there, the rest is NaN."""

    q: torch.Tensor
    kv_new: torch.Tensor
    cache: torch.Tensor
    page_table: torch.Tensor
    kv_len: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor
    old: list[torch.Tensor]  # per sequence the rows before the new ones
    slots: torch.Tensor  # [B, S], -1 for a query before the start
    latent: int


def make(lens, page, heads, new, sizes, dtype, seed, cache_type=None, gap=False):
    latent, rope = sizes
    table, num_pages = data.scattered_pages(lens, page, seed)
    shape = (num_pages, 2, page, latent + rope) if gap else (num_pages, page, latent + rope)
    cache = paged.filled(shape, cache_type or dtype)
    cache = cache[:, 1] if gap else cache
    old, slots = [], torch.full((len(lens), new), -1)
    for row, length in enumerate(lens):
        own = data.slots_of(table, row, length, page)
        before = own[: max(0, length - new)]
        old.append(data.normal((len(before), latent + rope), seed + 7 * row).to(cache.dtype))
        cache[before // page, before % page] = old[-1]
        slots[row, new - len(own[len(before) :]) :] = own[len(before) :]
    positions = (torch.tensor(lens)[:, None] - new + torch.arange(new)).clamp(min=0)
    return Case(
        data.normal((len(lens), new, heads, latent + rope), seed + 1, dtype),
        data.normal((len(lens), new, latent + rope), seed + 2, dtype),
        cache,
        table,
        torch.tensor(lens, dtype=torch.int32),
        positions,
        paged.angle_table(max([*lens, 1]) + 4, rope, seed),
        old,
        slots,
        latent,
    )


def call(backend, device, case, cache, **scalars):
    return mla_decode.using(backend)(
        case.q.to(device),
        case.kv_new.to(device),
        cache,
        case.page_table.to(device),
        case.kv_len.to(device),
        case.positions.to(device),
        case.table.to(device),
        latent=case.latent,
        **scalars,
    ).cpu()


def stored_rows(backend, device, case, cache, interleaved, kv_scale):
    """The cache after store_mla wrote the new rows."""
    flat, width = case.kv_new.flatten(0, 1).to(device), case.latent
    q_pe = torch.zeros(flat.shape[0], 1, flat.shape[1] - width, dtype=flat.dtype, device=device)
    rope_args = (q_pe, case.positions.flatten().to(device), case.table.to(device))
    store_mla.using(backend)(
        flat[:, :width],
        flat[:, width:],
        cache,
        case.slots.flatten().to(device),
        *rope_args,
        interleaved=interleaved,
        kv_scale=kv_scale,
    )
    return cache


def check(got, case, cache, backend, *, interleaved=True, kv_scale=1.0, scale, cap=0.0):
    """Against float64 over the rows of `cache`, in which the new rows are."""
    factor, num_queries = kv_scale if cache.dtype.itemsize == 1 else 1.0, case.q.shape[1]
    page = cache.shape[1]
    for row, old in enumerate(case.old):
        length = int(case.kv_len[row])
        seen = min(length, num_queries)
        assert not got[row, : num_queries - seen].any()
        if seen == 0:
            continue
        own = case.slots[row, -seen:]
        keys = torch.cat([old.double(), cache.cpu()[own // page, own % page].double()])[:, None] * factor
        q = case.q[row, -seen:].double()
        turned = paged.rotated(q[..., case.latent :], case.positions[row, -seen:], case.table, interleaved)
        q = torch.cat([q[..., : case.latent], turned], -1)
        want, noise = paged.attention(
            q, keys, keys[..., : case.latent], length - seen, scale=scale, cap=cap, weight_type=case.q.dtype
        )
        # The rotated part of q is rounded to q's type, which moves every score, and so every weight, a little.
        moved = scale * HALF_ULP[case.q.dtype] * 2 * turned.abs().amax() * keys[..., case.latent :].abs().sum(-1).amax()
        noise = noise + 2 * moved * keys[..., : case.latent].abs().amax()
        assert_close(got[row, -seen:], want, noise=noise, backend=backend, what=f"sequence {row} of {length} tokens")


@given(data.ragged_lens(4), data.page_sizes, num_heads, num_new, sizes, data.float_types, st.booleans(), st.sampled_from([0.0, 3.0]), data.seeds, st.booleans())  # fmt: skip
def test_agrees_with_float64_and_writes_what_store_mla_writes(
    backend, device, lens, page, heads, new, sizes, dtype, interleaved, cap, seed, gap
):
    case = make(lens, page, heads, new, sizes, dtype, seed, gap=gap)
    scalars = {"scale": sum(sizes) ** -0.5, "cap": cap, "interleaved": interleaved}
    cache, twin = case.cache.clone().to(device), case.cache.clone().to(device)
    got = call(backend, device, case, cache, **scalars)
    stored_rows(backend, device, case, twin, interleaved, 1.0)
    assert torch.equal(paged.bits(cache), paged.bits(twin))
    check(got, case, cache, backend, **scalars)


@paged.both_dialects
@paged.few
@given(data.ragged_lens(3), data.page_sizes, num_new, st.sampled_from([1.0, 0.125]), data.seeds)
def test_fp8_cache(backend, device, fp8, lens, page, new, kv_scale, seed):
    case = make(lens, page, 16, new, (64, 32), torch.bfloat16, seed, fp8)
    scalars = {"scale": 0.1, "kv_scale": kv_scale}
    cache, twin = case.cache.clone().to(device), case.cache.clone().to(device)
    got = call(backend, device, case, cache, **scalars)
    stored_rows(backend, device, case, twin, True, kv_scale)
    assert torch.equal(paged.bits(cache), paged.bits(twin))
    check(got, case, cache, backend, **scalars)


@pytest.mark.parametrize(("heads", "new", "length"), [(16, 1, 513), (16, 2, 1025), (128, 1, 300)])
def test_real_sizes_and_many_splits(backend, device, heads, new, length):
    case = make([length, 1, 256], 64, heads, new, (512, 64), torch.bfloat16, length)
    cache = case.cache.clone().to(device)
    check(call(backend, device, case, cache, scale=0.1352338), case, cache, backend, scale=0.1352338)


@pytest.mark.parametrize("fp8", [None, torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("new", [1, 3])
def test_the_widths_of_deepseek_at_few_tokens(backend, device, new, fp8):
    """512 + 64 has kernels of its own, which the sanitizers should see too."""
    case = make([33, 0, 2, 5], 4, 16, new, (512, 64), torch.bfloat16, new, fp8)
    cache, scalars = case.cache.clone().to(device), {"scale": 0.1352338, "kv_scale": 0.5 if fp8 else 1.0}
    check(call(backend, device, case, cache, **scalars), case, cache, backend, **scalars)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_that_do_not_start_at_16_bytes(backend, device, interleaved):
    case = make([33, 2], 4, 4, 2, (64, 32), torch.bfloat16, 5)
    cache, twin = case.cache.clone().to(device), case.cache.clone().to(device)
    got = mla_decode.using(backend)(
        data.strided(case.q, device=device),
        data.strided(case.kv_new, device=device),
        cache,
        case.page_table.to(device),
        case.kv_len.to(device),
        case.positions.to(device),
        case.table.to(device),
        latent=64,
        scale=0.1,
        interleaved=interleaved,
    ).cpu()
    stored_rows(backend, device, case, twin, interleaved, 1.0)
    assert torch.equal(paged.bits(cache), paged.bits(twin))
    check(got, case, cache, backend, scale=0.1, interleaved=interleaved)


@paged.few
@given(data.ragged_lens(3), num_new, data.seeds)
def test_a_complete_cache_needs_no_new_rows(backend, device, lens, new, seed):
    """The two ways to call it agree: rotate and store first, or leave both to the op."""
    case = make(lens, 4, 4, new, (64, 32), torch.bfloat16, seed)
    cache = case.cache.clone().to(device)
    fused = call(backend, device, case, cache, scale=0.1)
    q = case.q.clone()
    turned = paged.rotated(q[..., 64:].flatten(0, 1), case.positions.flatten(), case.table, True)
    q[..., 64:] = turned.view(*q.shape[:3], 32).to(q.dtype)
    plain = mla_decode.using(backend)(
        q.to(device), None, cache, case.page_table.to(device), case.kv_len.to(device), latent=64, scale=0.1
    ).cpu()
    case.q, case.table = q, torch.cat([torch.ones(100, 16), torch.zeros(100, 16)], -1)
    check(plain, case, cache, backend, scale=0.1)
    assert (fused.float() - plain.float()).abs().amax() < 0.05 if fused.numel() else True


@paged.few
@given(data.page_sizes, num_new, data.seeds)
def test_sequences_do_not_know_each_other(backend, device, page, new, seed):
    case = make([600, 17, 0, 64], page, 4, new, (64, 32), torch.bfloat16, seed)
    together = call(backend, device, case, case.cache.clone().to(device), scale=0.1)
    for row in range(4):
        own = slice(row, row + 1)
        alone = Case(case.q[own], case.kv_new[own], case.cache, case.page_table[own], case.kv_len[own], case.positions[own], case.table, [], case.slots, 64)  # fmt: skip
        assert torch.equal(call(backend, device, alone, case.cache.clone().to(device), scale=0.1), together[own])


def test_no_sequences(backend, device):
    case = make([3], 1, 4, 1, (64, 32), torch.bfloat16, 0)
    none = Case(*(x[:0] for x in (case.q, case.kv_new)), case.cache, *(x[:0] for x in (case.page_table, case.kv_len, case.positions)), case.table, [], case.slots, 64)  # fmt: skip
    assert call(backend, device, none, case.cache.to(device), scale=1.0).shape == (0, 1, 4, 64)


def test_a_page_beyond_2_to_31_elements(backend, device):
    """Address space only: of the cache, just the touched pages are backed by memory."""
    case = make([20], 64, 16, 1, (64, 32), torch.bfloat16, 3, torch.float8_e4m3fn)
    num_pages = 2**31 // (64 * 96) + 2
    cache = torch.empty(num_pages, 64, 96, dtype=torch.float8_e4m3fn, device=device)
    small, case.cache = case.cache, cache
    cache[-1] = small[int(case.page_table[0, 0])].to(device)
    case.page_table[:] = num_pages - 1
    case.slots = torch.tensor([[(num_pages - 1) * 64 + 19]])
    got = call(backend, device, case, cache, scale=0.1)
    page = Case(**{**vars(case), "slots": torch.tensor([[19]])})
    check(got, page, cache[-1:], backend, scale=0.1)


def test_wrong_arguments_are_named(backend):
    case = make([3], 1, 4, 1, (64, 32), torch.bfloat16, 0)
    with pytest.raises(ValueError, match="mla_decode: kv_new, positions, table: expected all or none of them, got some"):
        mla_decode.using(backend)(case.q, case.kv_new, case.cache, case.page_table, case.kv_len, latent=64, scale=1.0)
    with pytest.raises(ValueError, match="mla_decode: latent: expected 1 to Q = 96, got 512"):
        mla_decode.using(backend)(case.q, None, case.cache, case.page_table, case.kv_len, scale=1.0)
    with pytest.raises(ValueError, match=r"mla_decode: cache: expected size Q = 96 \(from q\), got 90"):
        mla_decode.using(backend)(
            case.q, None, torch.zeros(1, 1, 90, dtype=torch.bfloat16), case.page_table, case.kv_len, latent=64, scale=1.0
        )
