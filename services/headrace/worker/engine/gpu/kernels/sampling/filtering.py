"""The kernels that find the least score which top-k, top-p and min-p keep.

Scores are logits relative to the greatest one, divided by the temperature. They are 0 or negative: the bits
of their absolute values, as integers, are ordered from likely to unlikely. These are the keys that thresholds
are bits of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.sampling.exact_math import weight
from headrace.worker.engine.gpu.kernels.sampling.parameters import (
    ABSOLUTE,
    MIN_P_LOG,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    is_edited,
    is_filtered,
    is_finite,
    load_logits,
    maximum_of,
    parameter,
    real,
)

BINS = tl.constexpr(256)  # of the histogram: 8 for each power of two, from 2^-9 to 2^23
_BIN_BITS = tl.constexpr(20)
_FIRST_BIN = tl.constexpr((127 - 9) << 3)
_INFINITY = tl.constexpr(0x7F800000)
_SEARCH_BLOCK = tl.constexpr(2048)


@triton.jit
def _key(scores: tl.tensor) -> tl.tensor:
    return scores.to(tl.int32, bitcast=True) & ABSOLUTE


@triton.jit
def _bin(keys: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum((keys >> _BIN_BITS) - _FIRST_BIN, 0), BINS - 1)


@triton.jit
def histogram(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, parameters: tl.tensor, slots: tl.tensor,
    stops: tl.tensor, samples: tl.tensor, maxima: tl.tensor, histograms: tl.tensor, masses: tl.tensor,
    vocabulary: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr, MAXIMA: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Add the scores of a block to the histogram of a filtered row, and their weights to its mass."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(samples + row) == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    if not is_filtered(parameters, slot, WIDTH):
        return
    largest = maximum_of(maxima, row, blocks, MAXIMA)
    if not is_finite(largest):
        return
    edited = is_edited(parameters, slot, WIDTH, tl.load(stops + row), tl.load(samples + row))
    places = block * BLOCK + tl.arange(0, BLOCK)
    x = load_logits(logits, stride, scores, vocabulary, row, places, edited)
    score = tl.div_rn(x - largest, real(parameters, slot, WIDTH, TEMPERATURE))
    # Numbers outside the vocabulary are counted in the last bin, which is never needed to be exact.
    counted = tl.histogram(_bin(_key(score)), BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histograms + row * BINS + bins, counted, mask=counted > 0, sem="relaxed")
    if parameter(parameters, slot, WIDTH, TOP_K) == 0:
        tl.atomic_add(masses + row, tl.sum(weight(score)), sem="relaxed")


@triton.jit
def collect(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, parameters: tl.tensor, slots: tl.tensor,
    stops: tl.tensor, samples: tl.tensor, maxima: tl.tensor, histograms: tl.tensor, found: tl.tensor,
    candidates: tl.tensor, vocabulary: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr,
    MAXIMA: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """Copy the scores of the likeliest tokens of a filtered row, at most CANDIDATES, in any order.

    They are those of the first bins of the histogram; as many bins as fit.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(samples + row) == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    if not is_filtered(parameters, slot, WIDTH):
        return
    largest = maximum_of(maxima, row, blocks, MAXIMA)
    if not is_finite(largest):
        return
    edited = is_edited(parameters, slot, WIDTH, tl.load(stops + row), tl.load(samples + row))
    temperature = real(parameters, slot, WIDTH, TEMPERATURE)
    counted = tl.load(histograms + row * BINS + tl.arange(0, BINS))
    taken = tl.sum((tl.cumsum(counted) <= CANDIDATES).to(tl.int32))
    best = tl.div_rn(tl.load(maxima + row * blocks + block) - largest, temperature)
    if _bin(_key(best)) >= taken:
        return
    places = block * BLOCK + tl.arange(0, BLOCK)
    x = load_logits(logits, stride, scores, vocabulary, row, places, edited)
    score = tl.div_rn(x - largest, temperature)
    likely = ((_bin(_key(score)) < taken) & (places < vocabulary)).to(tl.int32)
    begin = tl.atomic_add(found + row, tl.sum(likely), sem="relaxed")
    index = begin + tl.cumsum(likely) - 1
    tl.store(candidates + row * CANDIDATES + index, score, mask=likely > 0)


@triton.jit
def _kth(keys: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Return the k-th smallest key; there are at least k that are not ABSOLUTE."""
    low = 0
    for step in range(31):
        half = 1 << (30 - step)
        trial = tl.minimum(low + half - 1, _INFINITY)
        low = tl.where(tl.sum((keys <= trial).to(tl.int32)) < k, low + half, low)
    return low


@triton.jit
def _key_of_mass(keys: tl.tensor, weights: tl.tensor, target: tl.tensor) -> tl.tensor:
    """Return the smallest key such that the keys up to it have at least the mass *target*."""
    low = 0
    for step in range(31):
        half = 1 << (30 - step)
        trial = tl.minimum(low + half - 1, _INFINITY)
        mass = tl.sum(tl.where(keys <= trial, weights, 0))
        low = tl.where(mass.to(tl.float64) < target, low + half, low)
    return low


@triton.jit
def _sum_of_all(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, vocabulary: tl.tensor, row: tl.tensor,
    edited: tl.tensor, largest: tl.tensor, temperature: tl.tensor, last: tl.tensor, masses: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the number of tokens with keys up to *last*, or their mass, int64."""
    total = tl.zeros([_SEARCH_BLOCK], tl.int64)
    for start in range(0, vocabulary, _SEARCH_BLOCK):
        places = start + tl.arange(0, _SEARCH_BLOCK)
        x = load_logits(logits, stride, scores, vocabulary, row, places, edited)
        score = tl.div_rn(x - largest, temperature)
        within = (_key(score) <= last) & (places < vocabulary)
        if masses:
            total += tl.where(within, weight(score), 0)
        else:
            total += within.to(tl.int64)
    return tl.sum(total)


@triton.jit
def _search_all(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, vocabulary: tl.tensor, row: tl.tensor,
    edited: tl.tensor, largest: tl.tensor, temperature: tl.tensor, target: tl.tensor, masses: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Do the same as `_kth` or `_key_of_mass` with all tokens of a row."""
    low = 0
    for step in range(31):
        half = 1 << (30 - step)
        trial = tl.minimum(low + half - 1, _INFINITY)
        total = _sum_of_all(
            logits, stride, scores, vocabulary, row, edited, largest, temperature, trial, masses
        )
        low = tl.where(total.to(tl.float64) < target, low + half, low)
    return low


@triton.jit
def threshold(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, parameters: tl.tensor, slots: tl.tensor,
    stops: tl.tensor, samples: tl.tensor, maxima: tl.tensor, found: tl.tensor, masses: tl.tensor,
    candidates: tl.tensor, thresholds: tl.tensor, vocabulary: tl.tensor, blocks: tl.tensor,
    WIDTH: tl.constexpr, MAXIMA: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """Store the least score that min-p, top-k and top-p keep.

    Takes time if the candidates do not suffice: then all tokens of the row are read, again and again.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(samples + row) == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    least = real(parameters, slot, WIDTH, MIN_P_LOG)
    if is_filtered(parameters, slot, WIDTH):
        largest = maximum_of(maxima, row, blocks, MAXIMA)
        if is_finite(largest):
            temperature = real(parameters, slot, WIDTH, TEMPERATURE)
            edited = is_edited(parameters, slot, WIDTH, tl.load(stops + row), tl.load(samples + row))
            top_k = parameter(parameters, slot, WIDTH, TOP_K)
            top_p = real(parameters, slot, WIDTH, TOP_P)
            count = tl.load(found + row)
            lanes = tl.arange(0, CANDIDATES)
            score = tl.load(candidates + row * CANDIDATES + lanes, mask=lanes < count, other=float("-inf"))
            keys = tl.where(lanes < count, _key(score), ABSOLUTE)
            weights = weight(score)
            last = tl.full([], _INFINITY, tl.int32)
            total = tl.load(masses + row)
            if top_k > 0:
                if count >= top_k:
                    last = _kth(keys, top_k)
                    total = tl.sum(tl.where(keys <= last, weights, 0))
                else:
                    last = _search_all(
                        logits, stride, scores, vocabulary, row, edited, largest, temperature,
                        top_k.to(tl.float64), False,
                    )  # fmt: skip
                    total = _sum_of_all(
                        logits, stride, scores, vocabulary, row, edited, largest, temperature, last, True
                    )
            if top_p < 1.0:
                target = top_p.to(tl.float64) * total.to(tl.float64)
                if tl.sum(weights).to(tl.float64) >= target:
                    last = tl.minimum(last, _key_of_mass(keys, weights, target))
                else:
                    last = tl.minimum(
                        last,
                        _search_all(
                            logits, stride, scores, vocabulary, row, edited, largest, temperature, target,
                            True,
                        ),
                    )  # fmt: skip
            least = tl.maximum(least, 0.0 - last.to(tl.float32, bitcast=True))
    tl.store(thresholds + row, least)
