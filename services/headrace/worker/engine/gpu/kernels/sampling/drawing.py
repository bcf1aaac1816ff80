"""The kernels that draw a token with noise."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.sampling.exact_math import gumbel, log, weight
from headrace.worker.engine.gpu.kernels.sampling.parameters import (
    ABSOLUTE,
    FLAGS,
    LOGPROBS,
    PENALISED,
    SEEN,
    TEMPERATURE,
    is_edited,
    is_finite,
    load_logits,
    maximum_of,
    parameter,
    real,
)

_WEIGHT_UNIT = tl.constexpr(2.0**-40)


@triton.jit
def draw(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, parameters: tl.tensor, slots: tl.tensor,
    stops: tl.tensor, samples: tl.tensor, noise_keys: tl.tensor, maxima: tl.tensor, own_maxima: tl.tensor,
    thresholds: tl.tensor, bests: tl.tensor, best_ids: tl.tensor, own_masses: tl.tensor,
    vocabulary: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr, MAXIMA: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store the best score of a block, with noise unless the row is greedy, and its first token."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(samples + row) == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    largest = maximum_of(maxima, row, blocks, MAXIMA)
    if not is_finite(largest):
        return
    places = block * BLOCK + tl.arange(0, BLOCK)
    inside = places < vocabulary
    temperature = real(parameters, slot, WIDTH, TEMPERATURE)
    edited = is_edited(parameters, slot, WIDTH, tl.load(stops + row), tl.load(samples + row))
    best = tl.full([], float("-inf"), tl.float32)
    best_id = tl.full([], ABSOLUTE, tl.int32)
    own_best = tl.load(maxima + row * blocks + block)
    if temperature > 0.0:
        least = tl.load(thresholds + row)
        # The score of the block's best token, as it is computed below.
        if tl.div_rn(own_best - largest, temperature) >= least:
            x = load_logits(logits, stride, scores, vocabulary, row, places, edited)
            score = tl.div_rn(x - largest, temperature)
            noise = gumbel(places, tl.load(noise_keys + 2 * row), tl.load(noise_keys + 2 * row + 1))
            noisy = tl.where((score >= least) & inside, score + noise, float("-inf"))
            best = tl.max(noisy)
            best_id = tl.min(tl.where(noisy == best, places, ABSOLUTE))
    elif own_best == largest:
        x = load_logits(logits, stride, scores, vocabulary, row, places, edited)
        best = own_best
        best_id = tl.min(tl.where((x == own_best) & inside, places, ABSOLUTE))
    tl.store(bests + row * blocks + block, best)
    tl.store(best_ids + row * blocks + block, best_id)
    if (parameter(parameters, slot, WIDTH, FLAGS) & LOGPROBS) != 0:
        own_largest = maximum_of(own_maxima, row, blocks, MAXIMA)
        if is_finite(own_largest):
            x = tl.load(logits + row * stride + places, mask=inside, other=float("-inf")).to(tl.float32)
            tl.store(own_masses + row * blocks + block, tl.sum(weight(x - own_largest)))


@triton.jit(do_not_specialize=["rows"])
def choose(
    logits: tl.tensor, stride: tl.tensor, parameters: tl.tensor, counts: tl.tensor, slots: tl.tensor,
    samples: tl.tensor, maxima: tl.tensor, own_maxima: tl.tensor, bests: tl.tensor, best_ids: tl.tensor,
    own_masses: tl.tensor, latest: tl.tensor, results: tl.tensor, rows: tl.tensor, vocabulary: tl.tensor,
    blocks: tl.tensor, WIDTH: tl.constexpr, MAXIMA: tl.constexpr,
) -> None:  # fmt: skip
    """Store the results of a row, and count its token.

    results   [3, rows] int32: tokens, whether logits were finite, log-probabilities as bits
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.zeros([], tl.int32)
    finite = tl.zeros([], tl.int32)
    logprob = tl.zeros([], tl.float32)
    if tl.load(samples + row) != 0:
        slot = tl.load(slots + row).to(tl.int64)
        flags = parameter(parameters, slot, WIDTH, FLAGS)
        lanes = tl.arange(0, MAXIMA)
        if is_finite(maximum_of(maxima, row, blocks, MAXIMA)):
            best = tl.load(bests + row * blocks + lanes, mask=lanes < blocks, other=float("-inf"))
            ids = tl.load(best_ids + row * blocks + lanes, mask=lanes < blocks, other=ABSOLUTE)
            finite = tl.full([], 1, tl.int32)
            token = tl.min(tl.where(best == tl.max(best), ids, ABSOLUTE))
            # Memory outside the counts is never written, whatever happens.
            token = tl.minimum(token, vocabulary - 1)
            if (flags & LOGPROBS) != 0:
                masses = tl.load(own_masses + row * blocks + lanes, mask=lanes < blocks, other=0)
                own = tl.load(logits + row * stride + token).to(tl.float32)
                mass = tl.sum(masses).to(tl.float32) * _WEIGHT_UNIT
                own_largest = maximum_of(own_maxima, row, blocks, MAXIMA)
                logprob = tl.where(is_finite(own_largest), (own - own_largest) - log(mass), float("nan"))
            if (flags & PENALISED) != 0:
                place = counts + slot * vocabulary + token
                tl.store(place, (tl.load(place) + 1) | SEEN)
        tl.store(latest + slot, token)
    tl.store(results + row, token)
    tl.store(results + rows + row, finite)
    tl.store(results + 2 * rows + row, logprob.to(tl.int32, bitcast=True))
