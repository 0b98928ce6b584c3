# SPDX-License-Identifier: Apache-2.0
"""One token per row of logits, in passes over splits of the vocabulary; thresholds by searching the bits of a float, no sort."""

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
LOG2_E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(float(1 << 40))  # weight of the likeliest token
DEEPEST = tl.constexpr(40.0)  # the weight of a token below this depth is 0
NUM_BINS = tl.constexpr(64)  # of half a depth each; the last one counts nothing
NO_GAP = tl.constexpr(0xFFFFFFFE)  # larger than any
MOST_TOKENS = 1 << 22


@triton.jit
def load_split(row_ptr, split, V: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr):
    """(logits fp32 [SPLIT / GROUP, GROUP], ids); outside -inf, and one kind of zero so that equal logits have equal bits."""
    start = split.to(tl.int64) * SPLIT
    places = GROUP * tl.arange(0, SPLIT // GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    ids = start.to(tl.int32) + places
    x = tl.load(row_ptr + start + places, mask=ids < V, other=-INFINITY).to(tl.float32)
    return tl.where(x == 0.0, 0.0, x), ids


@triton.jit
def cumulated(x):
    """Running sums in order of ids: in the groups that a lane holds, then over these."""
    sums = tl.sum(x, 1)
    return tl.cumsum(x, 1) + (tl.cumsum(sums, 0) - sums)[:, None]


@triton.jit
def shape(
    x, row, ids, inside,
    counts_ptr, seen_ptr, presence_ptr, frequency_ptr, repetition_ptr, bias_ptr, mask_ptr,
    counts_stride, seen_stride, bias_stride, mask_stride,
    HAS_COUNTS: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_PRESENCE: tl.constexpr, HAS_FREQUENCY: tl.constexpr,
    HAS_REPETITION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Logits after penalties, bias and mask."""
    counts = tl.zeros(x.shape, tl.int32)
    if HAS_COUNTS:
        counts = tl.load(counts_ptr + row * counts_stride + ids, mask=inside, other=0)
    if HAS_REPETITION:
        seen = counts != 0
        if HAS_SEEN:
            seen = seen | (tl.load(seen_ptr + row * seen_stride + ids, mask=inside, other=0) != 0)
        factor = tl.zeros(x.shape, tl.float32) + tl.load(repetition_ptr + row)
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
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def best_of(x, ids, V: tl.constexpr):
    """(the largest, its lowest id)"""
    top = tl.max(x)
    return top, tl.min(tl.where(x == top, ids, V))


@triton.jit
def depths(x, top, rate):
    """By how many factors of two a token is less likely than the likeliest; rate: 1 / (temperature ln 2), which may be inf."""
    return tl.where(x < top, (top - x) * rate, 0.0)


@triton.jit
def rate_of(temperature):
    return tl.maximum(LOG2_E / temperature, 1e-30)


@triton.jit
def weights_of(shares):
    """Integers, so that sums are exact and do not depend on their order."""
    return (shares * UNIT).to(tl.int64)


@triton.jit
def bins_of(x, top, rate):
    """Numbers of tokens per bin of depth."""
    return tl.histogram(tl.minimum(2.0 * depths(x, top, rate), NUM_BINS - 1.0).to(tl.int32), NUM_BINS)


@triton.jit
def sample_scan_kernel(
    tops_ptr,  # [B, 3, S] fp32: the largest logit, +inf if there is a NaN or +inf; of the logits as given; sum of exponentials
    places_ptr,  # [B, 2, S] int32: the lowest ids of the two
    bins_ptr,  # [B, S, NUM_BINS] int16: tokens by depth below the split's largest
    shaped_ptr,  # [B, V] fp32
    logits_ptr,  # [B, V]
    temperature_ptr,  # [B]
    top_k_ptr,
    top_p_ptr,
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
    IS_SHAPED: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The largest of each split, and where top-k or top-p is asked for, how many tokens lie how far below it.

    Split: one program per row and SPLIT tokens.
    Traffic: logits and tables are read once, shaped logits written once.
    Why: greedy rows are done after this; for the others, counts tell how deep a token may lie and still be kept.
    """
    row, split, num_splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    raw, ids = load_split(logits_ptr + row * logits_stride, split, V, SPLIT, GROUP)
    x, inside = raw, ids < V
    if IS_SHAPED:
        x = shape(
            raw, row, ids, inside, counts_ptr, seen_ptr, presence_ptr, frequency_ptr, repetition_ptr, bias_ptr, mask_ptr,
            counts_stride, seen_stride, bias_stride, mask_stride,
            HAS_COUNTS, HAS_SEEN, HAS_PRESENCE, HAS_FREQUENCY, HAS_REPETITION, HAS_BIAS, HAS_MASK,
        )  # fmt: skip
        tl.store(shaped_ptr + row * V + ids, x, mask=inside)
    x = tl.where(inside, tl.where((raw < INFINITY) & (x < INFINITY), x, INFINITY), -INFINITY)
    top, place = best_of(x, ids, V)
    stats_ptr, place_ptr = tops_ptr + row * 3 * num_splits + split, places_ptr + row * 2 * num_splits + split
    tl.store(stats_ptr, top)
    tl.store(place_ptr, place)
    if HAS_LOGPROB:
        raw_top, raw_place = best_of(raw, ids, V)
        base = tl.where(raw_top > -INFINITY, raw_top, 0.0)
        tl.store(stats_ptr + num_splits, raw_top)
        tl.store(place_ptr + num_splits, raw_place)
        tl.store(stats_ptr + 2 * num_splits, tl.sum(tl.exp(raw - base)))
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    has_k = (top_k > 0) & (top_k < V)
    if (temperature > 0.0) & (has_k | (tl.load(top_p_ptr + row) < 1.0)):
        rate = rate_of(temperature)
        found = bins_of(tl.max(x, 1), top, rate) if has_k else bins_of(tl.reshape(x, (SPLIT,)), top, rate)
        bins = tl.arange(0, NUM_BINS)
        tl.store(bins_ptr + (row * num_splits + split) * NUM_BINS + bins, found.to(tl.int16))


@triton.jit
def tops_of(stats_ptr, num_splits, SPLITS: tl.constexpr):
    splits = tl.arange(0, SPLITS)
    return tl.load(stats_ptr + splits, mask=splits < num_splits, other=-INFINITY)


@triton.jit
def is_valid_top(top):
    return (top > -INFINITY) & (top < INFINITY)


@triton.jit
def depth_limit(bins_ptr, tops, top, rate, top_k, top_p, num_splits, V: tl.constexpr, SPLITS: tl.constexpr):
    """No token deeper than this can be kept by top-k, or by top-p alone: a function of the counts of all splits.

    A split's bins move down by the depth of its largest token, so a token in bin b lies at a depth from b / 2 to b / 2 + 1.
    """
    splits, bins = tl.arange(0, SPLITS), tl.arange(0, NUM_BINS)
    shift = tl.minimum(2 * depths(tops, top, rate), NUM_BINS).to(tl.int32)
    own = bins[None, :] - shift[:, None]
    is_counted = (splits < num_splits)[:, None] & (own >= 0) & (own < NUM_BINS - 1)
    counts = tl.load(bins_ptr + splits[:, None] * NUM_BINS + own, mask=is_counted, other=0).to(tl.int32)
    counts = tl.sum(counts, 0)
    if (top_k > 0) & (top_k < V):
        # The k-th largest lies in the first bin up to which there are k tokens.
        last = tl.sum((tl.cumsum(counts, 0) < top_k).to(tl.int32))
    else:
        # What lies beyond may weigh at most 1 - top_p of all. A bin weighs between half of this and this.
        most = counts.to(tl.float32) * tl.exp2(-0.5 * bins.to(tl.float32))
        uncounted = (V - tl.sum(counts)).to(tl.float32) * (1.0 / (1 << 31))
        allowed = (1.0 - top_p) * tl.maximum(0.5 * tl.sum(most), 1.0) * 0.999
        last = tl.sum((tl.cumsum(most, 0, reverse=True) + uncounted > allowed).to(tl.int32)) - 1
        last = tl.where(uncounted > allowed, NUM_BINS, last)
    limit = tl.where(last < NUM_BINS, 0.5 * last + 1.0, DEEPEST)
    return limit + 0.001  # for the rounding of depths


@triton.jit
def sample_weigh_kernel(
    candidates_ptr,  # [B, V] fp32: logits of the tokens that top-k and top-p may keep, those of a split from its start on
    num_candidates_ptr,  # [B, S] int32
    masses_ptr,  # [B, S] int64: of all tokens of a split, or of those that min-p keeps where nothing else is asked for
    tops_ptr,  # [B, 3, S]
    bins_ptr,  # [B, S, NUM_BINS]
    logits_ptr,  # [B, V], shaped
    temperature_ptr,  # [B], as all that follow
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    logits_stride,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What a split has to say in the draw: the sum of its weights, and the few tokens between which thresholds may fall.

    Split: one program per row and SPLIT tokens; those of greedy rows end at once.
    Traffic: logits are read once, and by each program what `sample_scan_kernel` left of the row; logits of candidates are written.
    """
    row, split, num_splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    tops = tops_of(tops_ptr + row * 3 * num_splits, num_splits, SPLITS)
    top = tl.max(tops)
    if (not (temperature > 0.0)) | (not is_valid_top(top)):
        return
    top_k, top_p, rate = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), rate_of(temperature)
    x, _ids = load_split(logits_ptr + row * logits_stride, split, V, SPLIT, GROUP)
    depth = depths(x, top, rate)
    slot = row * num_splits + split
    has_k = (top_k > 0) & (top_k < V)
    is_plain = (not has_k) & (not (top_p < 1.0))
    if not is_plain:
        limit = depth_limit(bins_ptr + row * num_splits * NUM_BINS, tops, top, rate, top_k, top_p, num_splits, V, SPLITS)
        is_candidate = depth <= limit
        place = cumulated(is_candidate.to(tl.int32))
        tl.store(candidates_ptr + row * V + split * SPLIT + place - 1, x, mask=is_candidate)
        tl.store(num_candidates_ptr + slot, tl.max(place))
    mass = tl.zeros([], tl.int64)
    if not has_k:
        shares = tl.exp2(-depth)
        least = tl.where(is_plain, tl.minimum(tl.load(min_p_ptr + row), 1.0), 0.0)
        mass = tl.sum(tl.where(shares >= least, weights_of(shares), 0))
    tl.store(masses_ptr + slot, mass)


@triton.jit
def ordered(x):
    """fp32 -> uint32 in the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def load_candidates(row_ptr, numbers, start, SPLITS: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr):
    """(logits [SPLITS, WIDE], whether there is one) of each split's candidates from `start` on."""
    place = start + tl.arange(0, WIDE)[None, :]
    exists = place < numbers[:, None]
    x = tl.load(row_ptr + tl.arange(0, SPLITS)[:, None] * SPLIT + place, mask=exists, other=-INFINITY)
    return x, exists


@triton.jit
def gap_with(
    row_ptr, numbers, most, span, wanted, top, rate,
    BY_MASS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The smallest gap up to which candidates amount to `wanted`: their number, or their mass. Their largest gap is `span`.

    A gap counts the floats between a logit and the largest. Each pass cuts the range of the answer into four, and the next one cuts
    what this leaves to the gaps that occur.
    """
    low, high = tl.zeros([], tl.uint32), span
    while low < high:
        step = (high - low + 3) // 4
        one = low + step - 1
        two = tl.minimum(one + step, high - 1)
        three = tl.minimum(two + step, high - 1)
        to_one = tl.zeros([SPLITS, WIDE], tl.int64 if BY_MASS else tl.int32)
        to_two, to_three = to_one, to_one
        for start in range(0, most, WIDE):
            x, exists = load_candidates(row_ptr, numbers, start, SPLITS, SPLIT, WIDE)
            own = ordered(top) - ordered(x)
            amount = weights_of(tl.exp2(-depths(x, top, rate))) if BY_MASS else exists.to(tl.int32)
            to_one += tl.where(own <= one, amount, 0)
            to_two += tl.where(own <= two, amount, 0)
            to_three += tl.where(own <= three, amount, 0)
        is_one, is_two, is_three = tl.sum(to_one) >= wanted, tl.sum(to_two) >= wanted, tl.sum(to_three) >= wanted
        low = tl.where(is_one, low, tl.where(is_two, one, tl.where(is_three, two, three)) + 1)
        high = tl.where(is_one, one, tl.where(is_two, two, tl.where(is_three, three, high)))
        least, most_own = tl.full([SPLITS, WIDE], 0xFFFFFFFF, tl.uint32), tl.zeros([SPLITS, WIDE], tl.uint32)
        for start in range(0, most, WIDE):
            x, exists = load_candidates(row_ptr, numbers, start, SPLITS, SPLIT, WIDE)
            own = ordered(top) - ordered(x)
            least = tl.minimum(least, tl.where(exists & (own >= low), own, 0xFFFFFFFF))
            most_own = tl.maximum(most_own, tl.where(exists & (own <= high), own, 0))
        low, high = tl.minimum(tl.min(least), high), tl.max(most_own)
    return high


@triton.jit
def tally(row_ptr, numbers, most, gap, top, rate, min_p, SPLITS: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr):
    """(number and mass of the candidates above `gap`; per split the mass of these that min-p keeps, and the number at `gap`;
    the weight of one at `gap`, and that again or 0 by min-p)"""
    number = tl.zeros([SPLITS, WIDE], tl.int32)
    mass = tl.zeros([SPLITS, WIDE], tl.int64)
    kept = tl.zeros([SPLITS, WIDE], tl.int64)
    ties = tl.zeros([SPLITS, WIDE], tl.int32)
    each = tl.zeros([SPLITS, WIDE], tl.float32)
    for start in range(0, most, WIDE):
        x, exists = load_candidates(row_ptr, numbers, start, SPLITS, SPLIT, WIDE)
        own, shares = ordered(top) - ordered(x), tl.exp2(-depths(x, top, rate))
        is_above, is_tie = exists & (own < gap), exists & (own == gap)
        weights = tl.where(is_above, weights_of(shares), 0)
        number += is_above.to(tl.int32)
        mass += weights
        kept += tl.where(shares >= min_p, weights, 0)
        ties += is_tie.to(tl.int32)
        each = tl.maximum(each, tl.where(is_tie, shares, 0.0))
    return tl.sum(number), tl.sum(mass), tl.sum(kept, 1), tl.sum(ties, 1), tl.max(each)


@triton.jit
def threshold(
    row_ptr, numbers, masses, top, rate, top_k, top_p, min_p,
    V: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(gap, number of tokens at it that stay; per split: mass of those above it that min-p keeps, number at it; share of one)"""
    most = tl.max(numbers)
    lowest = tl.full([SPLITS, WIDE], float("inf"), tl.float32)
    for start in range(0, most, WIDE):
        x, exists = load_candidates(row_ptr, numbers, start, SPLITS, SPLIT, WIDE)
        lowest = tl.minimum(lowest, tl.where(exists, x, lowest))
    span = ordered(top) - ordered(tl.min(lowest))
    gap, num_ties = tl.full([], NO_GAP, tl.uint32), tl.full([], V, tl.int32)
    kept, ties, each, total = masses, numbers, tl.zeros([], tl.float32), tl.sum(masses)
    if (top_k > 0) & (top_k < V):
        gap = gap_with(row_ptr, numbers, most, span, top_k, top, rate, False, SPLITS, SPLIT, WIDE)
        number, mass, kept, ties, each = tally(row_ptr, numbers, most, gap, top, rate, min_p, SPLITS, SPLIT, WIDE)
        num_ties = top_k - number
        total = mass + tl.minimum(num_ties, tl.sum(ties)).to(tl.int64) * weights_of(each)
    if top_p < 1.0:
        exact = top_p.to(tl.float64) * total.to(tl.float64)
        wanted = exact.to(tl.int64)
        wanted = tl.maximum(wanted + (wanted.to(tl.float64) < exact).to(tl.int64), 1)
        found = gap_with(row_ptr, numbers, most, tl.minimum(span, gap), wanted, top, rate, True, SPLITS, SPLIT, WIDE)
        number, mass, kept, ties, each = tally(row_ptr, numbers, most, found, top, rate, min_p, SPLITS, SPLIT, WIDE)
        weight = tl.maximum(weights_of(each), 1)
        needed = tl.minimum((wanted - mass + weight - 1) // weight, V).to(tl.int32)
        num_ties = tl.where(found == gap, tl.minimum(num_ties, needed), needed)
        gap = found
    return gap, num_ties, kept, ties, each


@triton.jit
def uniform(seed, counter):
    """24 random bits from Philox4x32-10 with the seed as key and the counter as low half of the block."""
    low: tl.constexpr = 0xFFFFFFFF
    seed, counter = seed.to(tl.uint64, bitcast=True), counter.to(tl.uint64, bitcast=True)
    k0, k1, c0, c1 = seed & low, seed >> 32, counter & low, counter >> 32
    c2, c3 = c0 & 0, c0 & 0
    for _ in tl.static_range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return (c0 >> 8).to(tl.int64)


@triton.jit
def draw(
    logits_ptr, candidates_ptr, numbers_ptr, masses_ptr, num_splits, top, rate, top_k, top_p, min_p, seed_ptr, counter_ptr,
    V: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The id that the row's random number falls to; V if no token stays, which only broken parameters can cause.

    The split is found by the masses of splits, then the token by the weights in it.
    """
    splits = tl.arange(0, SPLITS)
    masses = tl.load(masses_ptr + splits, mask=splits < num_splits, other=0)
    min_p = tl.minimum(min_p, 1.0)
    gap, num_ties, ties = tl.full([], NO_GAP, tl.uint32), tl.full([], V, tl.int32), tl.zeros([SPLITS], tl.int32)
    if ((top_k > 0) & (top_k < V)) | (top_p < 1.0):
        numbers = tl.load(numbers_ptr + splits, mask=splits < num_splits, other=0)
        gap, num_ties, masses, ties, each = threshold(
            candidates_ptr, numbers, masses, top, rate, top_k, top_p, min_p, V, SPLITS, SPLIT, WIDE
        )
        staying = tl.minimum(tl.maximum(num_ties - (tl.cumsum(ties, 0) - ties), 0), ties)
        masses += staying.to(tl.int64) * tl.where(each >= min_p, weights_of(each), 0)
    total, random = tl.sum(masses), uniform(tl.load(seed_ptr), tl.load(counter_ptr))
    target = (total >> 24) * random + (((total & 0xFFFFFF) * random) >> 24)
    split = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32))
    before = tl.sum(tl.where(splits < split, masses, 0))
    ties_before = tl.sum(tl.where(splits < split, ties, 0))

    x, ids = load_split(logits_ptr, split, V, SPLIT, GROUP)
    own, shares = ordered(top) - ordered(x), tl.exp2(-depths(x, top, rate))
    is_tie = (own == gap).to(tl.int32)
    end = tl.where(ties_before + cumulated(is_tie) - is_tie < num_ties, gap + 1, gap)
    weights = tl.where(own < end, weights_of(tl.where(shares >= min_p, shares, 0.0)), 0)
    return tl.min(tl.where((before + cumulated(weights) > target) & (weights > 0), ids, V))


@triton.jit
def log_sum(stats_ptr, num_splits, SPLITS: tl.constexpr):
    """Logarithm of the sum of the exponentials of the logits as given."""
    tops = tops_of(stats_ptr + num_splits, num_splits, SPLITS)
    splits = tl.arange(0, SPLITS)
    sums = tl.load(stats_ptr + 2 * num_splits + splits, mask=splits < num_splits, other=0.0)
    top = tl.max(tops)
    return top + tl.log(tl.sum(sums * tl.exp(tops - top)))


@triton.jit
def sample_finish_kernel(
    ids_ptr,  # [B] int64
    logprob_ptr,  # [B] fp32
    tops_ptr,  # [B, 3, S]
    places_ptr,  # [B, 2, S]
    candidates_ptr,  # [B, V] fp32
    num_candidates_ptr,  # [B, S] int32
    masses_ptr,  # [B, S] int64
    logits_ptr,  # [B, V], as given
    shaped_ptr,  # [B, V], or the logits again
    temperature_ptr,  # [B], as all that follow
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    counters_ptr,
    logits_stride,
    shaped_stride,
    num_splits,
    V: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The token of a row from what its splits have to say.

    Split: one program per row.
    Traffic: one split of logits, and the candidates twelve times or so, from the L2 cache, for each of top-k and top-p.
    Why: candidates are a few hundred, unless the logits are nearly equal; then they may be the whole row.
    """
    row = tl.program_id(0).to(tl.int64)
    stats_ptr, splits = tops_ptr + row * 3 * num_splits, tl.arange(0, SPLITS)
    tops = tops_of(stats_ptr, num_splits, SPLITS)
    top = tl.max(tops)
    places = tl.load(places_ptr + row * 2 * num_splits + splits, mask=splits < num_splits, other=V)
    token = tl.min(tl.where(tops == top, places, V))
    temperature = tl.load(temperature_ptr + row)
    if is_valid_top(top) & (temperature > 0.0):
        drawn = draw(
            shaped_ptr + row * shaped_stride,
            candidates_ptr + row * V,
            num_candidates_ptr + row * num_splits,
            masses_ptr + row * num_splits,
            num_splits,
            top,
            rate_of(temperature),
            tl.load(top_k_ptr + row),
            tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row),
            seeds_ptr + row,
            counters_ptr + row,
            V,
            SPLITS,
            SPLIT,
            GROUP,
            WIDE,
        )
        token = tl.where(drawn < V, drawn, token)
    tl.store(ids_ptr + row, tl.where(is_valid_top(top), token, -1).to(tl.int64))
    logprob = tl.full([], float("nan"), tl.float32)
    if HAS_LOGPROB:
        chosen = tl.load(logits_ptr + row * logits_stride + tl.minimum(token, V - 1)).to(tl.float32)
        logprob = tl.where(is_valid_top(top), chosen - log_sum(stats_ptr, num_splits, SPLITS), logprob)
    tl.store(logprob_ptr + row, logprob)


@triton.jit(do_not_specialize=["num_top"])
def sample_rank_kernel(
    top_ids_ptr,  # [B, num_top] int64
    top_logprobs_ptr,  # [B, num_top] fp32
    tops_ptr,  # [B, 3, S]
    places_ptr,  # [B, 2, S]
    logits_ptr,  # [B, V], as given
    logits_stride,
    num_splits,
    num_top,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The likeliest tokens with their log-probabilities.

    Split: one program per row.
    Traffic: one split of logits per place.
    Why: a tournament. The next token is the best of the splits' best, and only its own split has to name another.
    """
    row = tl.program_id(0).to(tl.int64)
    stats_ptr, splits = tops_ptr + row * 3 * num_splits, tl.arange(0, SPLITS)
    is_valid = is_valid_top(tl.max(tops_of(stats_ptr, num_splits, SPLITS)))
    total = log_sum(stats_ptr, num_splits, SPLITS)
    best = tops_of(stats_ptr + num_splits, num_splits, SPLITS)
    places = tl.load(places_ptr + (row * 2 + 1) * num_splits + splits, mask=splits < num_splits, other=V)
    for rank in range(num_top):
        value = tl.max(best)
        token = tl.min(tl.where(best == value, places, V))
        tl.store(top_ids_ptr + row * num_top + rank, tl.where(is_valid, token, -1).to(tl.int64))
        tl.store(top_logprobs_ptr + row * num_top + rank, tl.where(is_valid, value - total, float("nan")))
        split = token // SPLIT
        x, ids = load_split(logits_ptr + row * logits_stride, split, V, SPLIT, GROUP)
        follows = (ids < V) & ((x < value) | ((x == value) & (ids > token)))
        following = tl.max(tl.where(follows, x, -INFINITY))
        place = tl.min(tl.where(follows & (x == following), ids, V))
        best = tl.where(splits == split, following, best)
        places = tl.where(splits == split, place, places)


def config(arch: Arch, dims: dict[str, int]) -> dict[str, Any]:
    """dims: V, itemsize (of a logit). 16 tokens per lane of four waves, 16 bytes at a time; a usual vocabulary makes 32 splits."""
    split = min(4096, max(64, triton.next_power_of_2(dims["V"])))
    return {"SPLIT": split, "GROUP": 16 // dims["itemsize"], **options(arch, num_warps=max(1, split // 1024), num_stages=1)}


def supports(call: Any) -> str | None:
    """Masses of that many tokens fit 64 bits."""
    return None if call.dims["V"] <= MOST_TOKENS else f"logits: expected V of at most 2^22, got {call.dims['V']}"


def _is_shaped(present: Any) -> bool:
    """Whether any penalty, bias or mask is given; `present` tells by name."""
    return any(present(name) for name in ("presence", "frequency", "repetition", "bias", "mask"))


def scratch(call: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Logits after penalties, bias and mask, where there are any; then what the kernels tell each other, see there."""
    rows, vocab = call.dims["B"], call.dims["V"]
    chosen = config(archs.current(call.device), {"V": vocab, "itemsize": call.dtypes["logits"].itemsize})
    splits = triton.cdiv(vocab, chosen["SPLIT"])
    shaped = rows if _is_shaped(lambda name: name in call.dtypes) else 0
    return [
        ((shaped, vocab), torch.float32),
        ((rows, 3, splits), torch.float32),
        ((rows, 2, splits), torch.int32),
        ((rows, splits, NUM_BINS.value), torch.int16),
        ((rows, vocab), torch.float32),
        ((rows, splits), torch.int32),
        ((rows, splits), torch.int64),
    ]


def launch(*tensors: torch.Tensor | None, num_logprobs: int) -> None:
    ids, logprob, *rest = tensors
    top_ids, top_logprobs = (rest.pop(0), rest.pop(0)) if num_logprobs > 0 else (None, None)
    shaped, tops, places, bins, candidates, num_candidates, masses, logits, *params = rest
    temperature, top_k, top_p, min_p, seeds, counters, counts, seen, presence, frequency, repetition, bias, mask = params
    assert logits is not None
    assert shaped is not None
    assert tops is not None
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    rows = {"logits": logits, "output_counts": counts, "prompt_seen": seen, "bias": bias, "mask": mask}
    check_rows("sample", **rows)
    chosen = config(archs.current(logits.device), {"V": vocab, "itemsize": logits.element_size()})
    num_splits = tops.shape[2]
    is_shaped = shaped.shape[0] > 0
    source = shaped if is_shaped else logits
    sizes = {"V": vocab, "SPLITS": triton.next_power_of_2(num_splits), **chosen}
    sample_scan_kernel[(num_rows, num_splits)](
        tops,
        places,
        bins,
        shaped,
        logits,
        temperature,
        top_k,
        top_p,
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
        IS_SHAPED=is_shaped,
        HAS_LOGPROB=num_logprobs >= 0,
        **chosen,
    )
    sample_weigh_kernel[(num_rows, num_splits)](
        candidates, num_candidates, masses, tops, bins, source, temperature, top_k, top_p, min_p, source.stride(0), **sizes
    )
    sample_finish_kernel[(num_rows,)](
        ids,
        logprob,
        tops,
        places,
        candidates,
        num_candidates,
        masses,
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
        num_splits,
        HAS_LOGPROB=num_logprobs >= 0,
        WIDE=max(16, 512 // sizes["SPLITS"]),  # two candidates per lane, but whole lines where splits are many
        **sizes,
    )
    if num_logprobs > 0:
        sample_rank_kernel[(num_rows,)](
            top_ids, top_logprobs, tops, places, logits, logits.stride(0), num_splits, num_logprobs, **sizes
        )
