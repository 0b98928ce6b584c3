# SPDX-License-Identifier: Apache-2.0
"""One token per row of logits: thresholds by searching the bits of a float, no sort."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rocm_infer import arch as archs
from rocm_infer.arch import Arch
from rocm_infer.triton_kernels._paged import check_rows
from rocm_infer.triton_kernels.common import options

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def shape_kernel(
    shaped_ptr,  # [B, V] fp32
    logits_ptr,  # [B, V]
    counts_ptr,  # [B, V] int32, or None
    seen_ptr,  # [B, V] uint8, or None
    presence_ptr,  # [B] fp32, each or None
    frequency_ptr,
    repetition_ptr,
    bias_ptr,  # [B, V] fp32, or None
    mask_ptr,  # [B, ceil(V / 32)] int32, or None
    logits_stride,
    counts_stride,
    seen_stride,
    bias_stride,
    mask_stride,
    V: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HAS_PRESENCE: tl.constexpr,
    HAS_FREQUENCY: tl.constexpr,
    HAS_REPETITION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Logits after penalties, bias and mask.

    Split: one program per row and BLOCK tokens.
    Traffic: every table is read once; the result is what the passes of `sample_kernel` read.
    """
    row = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < V
    x = tl.load(logits_ptr + row * logits_stride + ids, mask=inside, other=0.0).to(tl.float32)
    counts = tl.zeros([BLOCK], tl.int32)
    if HAS_COUNTS:
        counts = tl.load(counts_ptr + row * counts_stride + ids, mask=inside, other=0)
    if HAS_REPETITION:
        seen = counts != 0
        if HAS_SEEN:
            seen = seen | (tl.load(seen_ptr + row * seen_stride + ids, mask=inside, other=0) != 0)
        factor = tl.zeros([BLOCK], tl.float32) + tl.load(repetition_ptr + row)
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, factor), x * factor), x)
    if HAS_FREQUENCY:
        x = x - tl.load(frequency_ptr + row) * counts.to(tl.float32)
    if HAS_PRESENCE:
        x = x - tl.load(presence_ptr + row) * (counts > 0).to(tl.float32)
    if HAS_BIAS:
        x = x + tl.load(bias_ptr + row * bias_stride + ids, mask=inside, other=0.0)
    if HAS_MASK:
        word = tl.load(mask_ptr + row * mask_stride + ids // 32, mask=inside, other=0)
        x = tl.where((word >> (ids % 32)) & 1 != 0, x, -INFINITY)
    tl.store(shaped_ptr + row * V + ids, x, mask=inside)


@triton.jit
def load_logits(row_ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """(logits fp32, ids, whether inside); outside -inf, and one kind of zero so that equal logits have equal bits."""
    ids = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + ids, mask=ids < V, other=-INFINITY).to(tl.float32)
    return tl.where(x == 0.0, 0.0, x), ids, ids < V


@triton.jit
def next_best(row_ptr, last, last_id, V: tl.constexpr, BLOCK: tl.constexpr):
    """(largest logit, its id, whether there is a NaN or +inf) among what comes after (last, last_id) by falling logit, rising id."""
    best = tl.full([BLOCK], -INFINITY, tl.float32)
    best_id = tl.full([BLOCK], V, tl.int32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        x, ids, inside = load_logits(row_ptr, start, V, BLOCK)
        follows = inside & ((x < last) | ((x == last) & (ids > last_id)))
        better = follows & ((x > best) | (best_id == V))
        best = tl.where(better, x, best)
        best_id = tl.where(better, ids, best_id)
        broken = broken | ((x != x) | (x == INFINITY)).to(tl.int32)
    top = tl.max(best)
    return top, tl.min(tl.where(best == top, best_id, V)), tl.max(broken) != 0


@triton.jit
def sum_of_exponentials(row_ptr, top, V: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x, _ids, _inside = load_logits(row_ptr, start, V, BLOCK)
        total += tl.exp(x - top)
    return tl.sum(total)


@triton.jit
def ordered(x):
    """fp32 -> uint32 in the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def from_ordered(key):
    bits = tl.where(key >> 31 != 0, key ^ 0x80000000, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def amount_from(row_ptr, key, top, temperature, BY_MASS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """(amount of tokens whose logit is at least `key`, of those above it); amount: number, or sum of weights."""
    at_least = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x, _ids, inside = load_logits(row_ptr, start, V, BLOCK)
        amount = tl.exp((x - top) / temperature) if BY_MASS else tl.where(inside, 1.0, 0.0)
        at_least += tl.where(ordered(x) >= key, amount, 0.0)
        above += tl.where(ordered(x) > key, amount, 0.0)
    return tl.sum(at_least), tl.sum(above)


@triton.jit
def largest_key_with(row_ptr, wanted, top, temperature, BY_MASS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key such that the tokens from it upwards amount to `wanted`: two bits per pass over the row.

    Sums of fewer non-negative terms in the same order are never larger, so the search cannot go astray by rounding.
    """
    key = tl.zeros([], tl.uint32)
    for step in range(16):
        unit = tl.full([], 1, tl.uint32) << (30 - 2 * step)
        one, two, three = key + unit, key + 2 * unit, key + 3 * unit
        from_one = tl.zeros([BLOCK], tl.float32)
        from_two = tl.zeros([BLOCK], tl.float32)
        from_three = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            x, _ids, inside = load_logits(row_ptr, start, V, BLOCK)
            code = ordered(x)
            amount = tl.exp((x - top) / temperature) if BY_MASS else tl.where(inside, 1.0, 0.0)
            from_one += tl.where(code >= one, amount, 0.0)
            from_two += tl.where(code >= two, amount, 0.0)
            from_three += tl.where(code >= three, amount, 0.0)
        key = tl.where(tl.sum(from_one) >= wanted, one, key)
        key = tl.where(tl.sum(from_two) >= wanted, two, key)
        key = tl.where(tl.sum(from_three) >= wanted, three, key)
    return key


@triton.jit
def kept_weights(
    row_ptr, start, key, num_ties, is_tight, num_before, min_p, top, temperature, V: tl.constexpr, BLOCK: tl.constexpr
):
    """(weights of a chunk, 0 where dropped; ids; ties with `key` up to here). is_tight: not all ties may stay, so they are counted."""
    x, ids, inside = load_logits(row_ptr, start, V, BLOCK)
    code = ordered(x)
    weights = tl.exp((x - top) / temperature)
    stays = (code >= key) & inside & (weights >= tl.minimum(min_p, 1.0))
    if is_tight:
        is_tie = ((code == key) & inside).to(tl.int32)
        rank = num_before + tl.cumsum(is_tie, 0) - is_tie
        stays = stays & ((is_tie == 0) | (rank < num_ties))
        num_before += tl.sum(is_tie)
    return tl.where(stays, weights, 0.0), ids, num_before


@triton.jit
def uniform(seed, counter):
    """A multiple of 2^-24 in [0, 1), fp64, from Philox4x32-10 with the seed as key and the counter as low half of the block."""
    low: tl.constexpr = 0xFFFFFFFF
    seed, counter = seed.to(tl.uint64, bitcast=True), counter.to(tl.uint64, bitcast=True)
    k0, k1, c0, c1 = seed & low, seed >> 32, counter & low, counter >> 32
    c2, c3 = c0 & 0, c0 & 0
    for _ in tl.static_range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return (c0 >> 8).to(tl.float64) * (1.0 / (1 << 24))


@triton.jit
def draw(row_ptr, top, temperature, top_k, top_p, min_p, seed, counter, V: tl.constexpr, BLOCK: tl.constexpr):
    """The id that the row's uniform number falls to; V if no token stays, which only broken parameters can cause."""
    key = tl.zeros([], tl.uint32)  # tokens from this one upwards stay; of its equals the first num_ties
    num_ties, is_tight = V, False
    if (top_k > 0) & (top_k < V):
        key = largest_key_with(row_ptr, top_k.to(tl.float32), top, temperature, False, V, BLOCK)
        at_least, above = amount_from(row_ptr, key, top, temperature, False, V, BLOCK)
        num_ties = top_k - above.to(tl.int32)
        is_tight = at_least.to(tl.int32) > top_k
    if top_p < 1.0:
        mass, above = amount_from(row_ptr, key, top, temperature, True, V, BLOCK)
        if is_tight:
            mass = above + num_ties.to(tl.float32) * tl.exp((from_ordered(key) - top) / temperature)
        wanted = top_p * mass
        found = largest_key_with(row_ptr, wanted, top, temperature, True, V, BLOCK)
        found = tl.minimum(tl.maximum(found, key), ordered(top))
        _mass, above = amount_from(row_ptr, found, top, temperature, True, V, BLOCK)
        weight = tl.exp((from_ordered(found) - top) / temperature)
        needed = tl.where(weight > 0.0, tl.minimum(tl.ceil((wanted - above) / weight), V), V)
        needed = tl.maximum(needed, 1.0).to(tl.int32)
        num_ties = tl.where(found == key, tl.minimum(num_ties, needed), needed)
        key, is_tight = found, True

    total = tl.zeros([], tl.float64)
    num_before = 0
    for start in range(0, V, BLOCK):
        weights, _ids, num_before = kept_weights(
            row_ptr, start, key, num_ties, is_tight, num_before, min_p, top, temperature, V, BLOCK
        )
        total += tl.sum(weights).to(tl.float64)
    target = uniform(seed, counter) * total
    before = tl.zeros([], tl.float64)
    num_before = 0
    token, start = V, 0
    while (token == V) & (start < V):
        weights, ids, num_before = kept_weights(
            row_ptr, start, key, num_ties, is_tight, num_before, min_p, top, temperature, V, BLOCK
        )
        here = tl.sum(weights).to(tl.float64)
        if before + here > target:
            passed = before + tl.cumsum(weights, 0).to(tl.float64) > target
            # The last one of the chunk where rounding leaves its running sum below the chunk's sum.
            last = tl.max(tl.where(weights > 0.0, ids, 0))
            token = tl.minimum(tl.min(tl.where(passed & (weights > 0.0), ids, V)), last)
        before += here
        start += BLOCK
    return token


@triton.jit(do_not_specialize=["num_top"])
def sample_kernel(
    ids_ptr,  # [B] int64
    logprob_ptr,  # [B] fp32
    top_ids_ptr,  # [B, num_top] int64, or None
    top_logprobs_ptr,  # [B, num_top] fp32, or None
    logits_ptr,  # [B, V]
    shaped_ptr,  # [B, V] fp32, or the logits again
    temperature_ptr,  # [B], as all that follow
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    counters_ptr,
    logits_stride,
    shaped_stride,
    num_top,
    V: tl.constexpr,
    IS_SHAPED: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split: one program per row.
    Traffic: the row stays in the L2 cache while passes go over it: one for the largest, two to draw; top-k and top-p add 17 each.
    Why: a threshold found in the bits of a float replaces the sort; per-lane sums in a fixed order, so a row is a function of its
        own arguments.
    """
    row = tl.program_id(0).to(tl.int64)
    raw_ptr, row_ptr = logits_ptr + row * logits_stride, shaped_ptr + row * shaped_stride
    top, token, broken = next_best(row_ptr, INFINITY, -1, V, BLOCK)
    raw_top = top
    if IS_SHAPED:
        raw_top, _raw_id, raw_broken = next_best(raw_ptr, INFINITY, -1, V, BLOCK)
        broken = broken | raw_broken | (raw_top == -INFINITY)
    is_valid = (top > -INFINITY) & (broken == 0)
    # Before the draw, whose searches fill the scalar registers: what logarithms need is forgotten by then.
    if HAS_LOGPROB:
        total = raw_top + tl.log(sum_of_exponentials(raw_ptr, raw_top, V, BLOCK))
        if HAS_TOP:
            last, last_id = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
            for place in range(num_top):
                last, last_id, _broken = next_best(raw_ptr, last, last_id, V, BLOCK)
                tl.store(top_ids_ptr + row * num_top + place, tl.where(is_valid, last_id, -1).to(tl.int64))
                tl.store(top_logprobs_ptr + row * num_top + place, tl.where(is_valid, last - total, float("nan")))
    temperature = tl.load(temperature_ptr + row)
    if is_valid & (temperature > 0.0):
        drawn = draw(
            row_ptr,
            top,
            temperature,
            tl.load(top_k_ptr + row),
            tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row),
            tl.load(seeds_ptr + row),
            tl.load(counters_ptr + row),
            V,
            BLOCK,
        )
        token = tl.where(drawn < V, drawn, token)
    tl.store(ids_ptr + row, tl.where(is_valid, token, -1).to(tl.int64))
    logprob = tl.full([], float("nan"), tl.float32)
    if HAS_LOGPROB:
        chosen = tl.load(raw_ptr + tl.minimum(token, V - 1)).to(tl.float32)
        logprob = tl.where(is_valid, chosen - total, logprob)
    tl.store(logprob_ptr + row, logprob)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: V. Rows are few and long: a whole workgroup of 16 waves per row, 16 bytes per lane."""
    block = min(4096, max(64, triton.next_power_of_2(dims["V"])))
    return {"BLOCK": block, **options(arch, num_warps=max(1, min(16, block // 256)), num_stages=1)}


def supports(call: Any) -> str | None:
    """Tokens are counted in fp32."""
    return None if call.dims["V"] <= 1 << 24 else f"logits: expected V of at most 2^24, got {call.dims['V']}"


def _is_shaped(present: Any) -> bool:
    """Whether any penalty, bias or mask is given; `present` tells by name."""
    return any(present(name) for name in ("presence", "frequency", "repetition", "bias", "mask"))


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Logits after penalties, bias and mask, where there are any."""
    shaped = _is_shaped(lambda name: name in call.dtypes)
    return [((call.dims["B"] if shaped else 0, call.dims["V"]), torch.float32)]


def launch(*tensors: torch.Tensor | None, num_logprobs: int) -> None:
    ids, logprob, *rest = tensors
    top_ids, top_logprobs = (rest.pop(0), rest.pop(0)) if num_logprobs > 0 else (None, None)
    shaped, logits, temperature, top_k, top_p, min_p, seeds, counters, *tables = rest
    counts, seen, presence, frequency, repetition, bias, mask = tables
    assert logits is not None
    assert shaped is not None
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    rows = {"logits": logits, "output_counts": counts, "prompt_seen": seen, "bias": bias, "mask": mask}
    check_rows("sample", **rows)
    chosen = config(archs.current(logits.device), {"V": vocab})
    is_shaped = shaped.shape[0] > 0
    if is_shaped:
        shape_kernel[(triton.cdiv(vocab, chosen["BLOCK"]), num_rows)](
            shaped,
            logits,
            counts,
            seen,
            presence,
            frequency,
            repetition,
            bias,
            mask,
            *(0 if table is None else table.stride(0) for table in rows.values()),
            V=vocab,
            HAS_COUNTS=counts is not None,
            HAS_SEEN=seen is not None,
            HAS_PRESENCE=presence is not None and counts is not None,
            HAS_FREQUENCY=frequency is not None and counts is not None,
            HAS_REPETITION=repetition is not None,
            HAS_BIAS=bias is not None,
            HAS_MASK=mask is not None,
            **chosen,
        )
    source = shaped if is_shaped else logits
    sample_kernel[(num_rows,)](
        ids,
        logprob,
        top_ids,
        top_logprobs,
        logits,
        source,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        counters,
        logits.stride(0),
        source.stride(0),
        max(num_logprobs, 0),
        V=vocab,
        IS_SHAPED=is_shaped,
        HAS_LOGPROB=num_logprobs >= 0,
        HAS_TOP=num_logprobs > 0,
        **chosen,
    )
