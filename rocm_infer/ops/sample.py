# SPDX-License-Identifier: Apache-2.0
"""Choose one token per row of logits, reproducibly from a seed and a counter."""

from __future__ import annotations

from typing import Any

import torch

from rocm_infer.ops._op import Call, Cost, op

FIRST_WIDTH = 1024  # tokens ranked at first for top-p; nearly always enough
WORD = 0xFFFFFFFF


def philox(key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four random 32-bit words from a key of two and a counter of four, all as int64 tensors below 2^32.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """One multiple of 2^-24 in [0, 1) per (seed, counter), float64: the upper 24 bits of Philox's first word.

    The key is the seed, the low half of the counter block is the counter; both as 64 bits, low word first.
    """
    zero = torch.zeros_like(seeds)
    key = (seeds & WORD, (seeds >> 32) & WORD)
    words = philox(key, (counters & WORD, (counters >> 32) & WORD, zero, zero))
    return (words[0] >> 8).double() * 2.0**-24


def _inputs(
    dims: dict[str, int], *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, greedy: bool = False
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    batch = dims["B"]
    return {
        "logits": (3 * torch.randn(batch, dims["V"], generator=generator)).to(device, dtype),
        "temperature": torch.full((batch,), 0.0 if greedy else 0.8, device=device),
        "top_k": torch.full((batch,), 40, dtype=torch.int32, device=device),
        "top_p": torch.full((batch,), 0.95, device=device),
        "min_p": torch.zeros(batch, device=device),
        "seeds": torch.arange(batch, device=device),
        "counters": torch.zeros(batch, dtype=torch.int64, device=device),
    }


def _cost(dims: dict[str, int], *, itemsize: int = 4) -> Cost:
    return Cost(bytes=dims["B"] * (dims["V"] * itemsize + 48), flops=4 * dims["B"] * dims["V"])


def _check(call: Call) -> str | None:
    num_logprobs, vocab = call.scalars["num_logprobs"], call.dims["V"]
    return f"num_logprobs: expected at most V = {vocab}, got {num_logprobs}" if num_logprobs > vocab else None


@op(
    "logits[B, V]:f32|bf16|f16, temperature[B]:f32, top_k[B]:i32, top_p[B]:f32, min_p[B]:f32, seeds[B]:i64, counters[B]:i64, "
    "output_counts?[B, V]:i32, prompt_seen?[B, V]:u8, presence?[B]:f32, frequency?[B]:f32, repetition?[B]:f32, "
    "bias?[B, V]:f32, mask?[B, ceil(V/32)]:i32 -> ids[B]:i64, logprob[B]:f32, "
    "top_ids[B, num_logprobs]:i64 if num_logprobs > 0, top_logprobs[B, num_logprobs]:f32 if num_logprobs > 0",
    inputs=_inputs,
    cost=_cost,
    check=_check,
)
def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
    output_counts: torch.Tensor | None = None,
    prompt_seen: torch.Tensor | None = None,
    presence: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    repetition: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    num_logprobs: int = -1,
) -> tuple[torch.Tensor, ...]:
    """ids = the token whose share of the cumulated probabilities, in order of ids, holds the row's uniform number.

    In this order: penalties, bias, mask; temperature; top-k, top-p, min-p; draw.
    output_counts: how often a token was output; prompt_seen: non-zero where the prompt has it; a missing one counts as zeros.
    repetition: logits of tokens seen in prompt or output are divided by it where positive, multiplied where negative.
    frequency: taken off once per output; presence: taken off once if output. bias: added; -inf forbids.
    mask: bit v % 32 of word v // 32 is 1 where token v is allowed.
    temperature: 0 takes the largest logit, of equals the lowest id, and looks at no other parameter of the draw.
    top_k: only the k largest logits, equals by lowest id; 0 or >= V: all.
    top_p: of these, renormalised, the shortest run of the likeliest whose probabilities reach top_p; >= 1: all.
    min_p: of these, those at least min_p times as likely as the likeliest. The likeliest token always stays.
    seeds, counters: one uniform number per pair, see `uniform`.
    num_logprobs: -1: none, `logprob` is NaN; 0: of the chosen token; n: also the n likeliest with their log-probabilities, by
        falling logit, equals by lowest id. Log-probabilities are of the logits as given, before all the above.
    Numerics: logits and exponentials in fp32, cumulated in float64; another order of summation may choose a neighbour where the
        uniform number or top_p meets a border of the cumulated sum within its rounding.
    Edges: a row with a NaN or +Inf, before or after penalties and bias, or with no allowed token, gives id -1 and logprob NaN.
    Errors: ValueError if num_logprobs > V.
    Source: Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p), Keskar et al. 2019 (repetition penalty).
    """
    raw = logits.float()
    shaped = _shaped(raw, output_counts, prompt_seen, presence, frequency, repetition, bias, mask)
    largest, ids = shaped.max(-1) if raw.numel() else (raw.new_zeros(len(raw)), seeds)
    valid = torch.isfinite(largest)
    if shaped is not raw:
        valid &= torch.isfinite(raw.amax(-1))
    drawn = ((temperature > 0) & valid).nonzero()[:, 0]
    if len(drawn):
        whole = len(drawn) == len(raw)
        rows = shaped if whole else shaped[drawn]
        ids[drawn] = _draw(rows, largest[drawn], *(x[drawn] for x in (temperature, top_k, top_p, min_p, seeds, counters)))
    ids = torch.where(valid, ids, -1)
    if num_logprobs < 0:
        return ids, torch.full_like(largest, torch.nan)
    total = raw.logsumexp(-1)
    logprob = torch.where(valid, raw.gather(1, ids.clamp(min=0)[:, None])[:, 0] - total, torch.nan)
    if num_logprobs == 0:
        return ids, logprob
    ranked = [_ranked(row, num_logprobs) for row in raw.masked_fill(~valid[:, None], 0.0)]
    top_ids = torch.stack(ranked) if ranked else ids.new_zeros(0, num_logprobs)
    top_logprobs = torch.where(valid[:, None], raw.gather(1, top_ids) - total[:, None], torch.nan)
    return ids, logprob, torch.where(valid[:, None], top_ids, -1), top_logprobs


def _shaped(
    raw: torch.Tensor,
    output_counts: torch.Tensor | None,
    prompt_seen: torch.Tensor | None,
    presence: torch.Tensor | None,
    frequency: torch.Tensor | None,
    repetition: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Logits after penalties, bias and mask; `raw` itself when there are none."""
    shaped = raw
    if repetition is not None:
        seen = torch.zeros_like(raw, dtype=torch.bool)
        for counts in (output_counts, prompt_seen):
            seen = seen if counts is None else seen | (counts != 0)
        factor = repetition[:, None]
        shaped = torch.where(seen, torch.where(shaped > 0, shaped / factor, shaped * factor), shaped)
    if frequency is not None and output_counts is not None:
        shaped = shaped - frequency[:, None] * output_counts
    if presence is not None and output_counts is not None:
        shaped = shaped - presence[:, None] * (output_counts > 0)
    if bias is not None:
        shaped = shaped + bias
    if mask is not None:
        allowed = (mask[:, :, None] >> torch.arange(32, device=mask.device)) & 1
        shaped = shaped.masked_fill(allowed.flatten(1)[:, : raw.shape[1]] == 0, -torch.inf)
    return shaped


def _draw(
    logits: torch.Tensor,
    largest: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Ids [B] for rows with temperature > 0. Only rows that ask for top-k or top-p are ranked."""
    vocab = logits.shape[1]
    weights = ((logits - largest[:, None]) / temperature[:, None]).exp()
    share = uniform(seeds, counters)
    for row, (k, p) in enumerate(zip(top_k.tolist(), top_p.tolist())):
        k = k if 0 < k < vocab else vocab
        if k < vocab or p < 1:
            kept = _kept(logits[row], weights[row], k, p)
            weights[row] = torch.zeros_like(weights[row]).index_copy(0, kept, weights[row, kept])
    weights = weights.masked_fill(weights < min_p.clamp(max=1)[:, None], 0.0)
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulated, (share * cumulated[:, -1])[:, None], right=True)[:, 0]


def _kept(logits: torch.Tensor, weights: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Ids of one row that stay after top-k and top-p."""
    vocab = len(logits)
    if top_p >= 1:
        return _ranked(logits, top_k)
    for width in (FIRST_WIDTH, vocab) if top_k == vocab > FIRST_WIDTH else (top_k,):
        ids = _ranked(logits, width)
        cumulated = weights[ids].cumsum(0, dtype=torch.float64)
        total = cumulated[-1] if width == top_k else weights.sum(dtype=torch.float64)
        before = torch.cat([cumulated.new_zeros(1), cumulated[:-1]])
        kept = before < top_p * total
        if not kept[-1]:
            break
    kept[0] = True
    return ids[kept]


def _ranked(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest of a row, by falling value, equals by rising id."""
    smallest = logits.topk(count).values[-1]
    ids = (logits >= smallest).nonzero()[:, 0]
    return ids[logits[ids].sort(descending=True, stable=True).indices[:count]]
