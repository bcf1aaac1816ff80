"""The kernel that applies bias, penalties, min_tokens and masks to logits."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.sampling.filtering import BINS
from headrace.worker.engine.gpu.kernels.sampling.parameters import (
    ABSOLUTE,
    BAN_UNTIL,
    BIASES,
    ENDINGS,
    FLAGS,
    FREQUENCY,
    LISTS,
    LOGPROBS,
    PENALISED,
    PRESENCE,
    REPETITION,
    SEEN,
    is_edited,
    is_filtered,
    parameter,
    real,
)


@triton.jit
def _edited(
    x: tl.tensor, places: tl.tensor, start: tl.tensor, parameters: tl.tensor, counts: tl.tensor,
    slot: tl.tensor, stop: tl.tensor, mask: tl.tensor, words: tl.tensor, masked: tl.tensor,
    vocabulary: tl.tensor, WIDTH: tl.constexpr, LIST: tl.constexpr, BIAS_ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Apply the edits of a slot, and the mask of a row that is masked, to the logits x of a block."""
    lists = parameters + slot * WIDTH + LISTS
    lanes = tl.arange(0, LIST)
    biases = parameter(parameters, slot, WIDTH, BIASES)
    ids = tl.load(lists + lanes, mask=lanes < biases, other=ABSOLUTE)
    first, after = tl.sum((ids < start).to(tl.int32)), tl.sum((ids < start + BLOCK).to(tl.int32))
    for index in range(first, after):
        bias = tl.load(lists + BIAS_ROOM + index).to(tl.float32, bitcast=True)
        x = tl.where(places == tl.load(lists + index), x + bias, x)
    if (parameter(parameters, slot, WIDTH, FLAGS) & PENALISED) != 0:
        repetition = real(parameters, slot, WIDTH, REPETITION)
        found = tl.load(counts + slot * vocabulary + places, mask=places < vocabulary, other=0)
        penalised = tl.where(x < 0.0, x * repetition, tl.div_rn(x, repetition))
        x = tl.where((found & SEEN) != 0, penalised, x)
        number = (found & (SEEN - 1)).to(tl.float32)
        added = real(parameters, slot, WIDTH, FREQUENCY) * number
        added = added - real(parameters, slot, WIDTH, PRESENCE)
        x = tl.where(number > 0.0, x + added, x)
    lifted = tl.load(mask + words - 1, mask=masked, other=0)
    if (stop < parameter(parameters, slot, WIDTH, BAN_UNTIL)) & (lifted == 0):
        for index in range(parameter(parameters, slot, WIDTH, ENDINGS)):
            x = tl.where(places == tl.load(lists + 2 * BIAS_ROOM + index), float("-inf"), x)
    if masked:
        bits = tl.load(mask + places // 32, mask=places < vocabulary, other=0) >> (places % 32)
        # What is not below infinity stays, so that it is noticed.
        x = tl.where(((bits & 1) != 0) | (x != x) | (x == float("inf")), x, float("-inf"))
    return x


@triton.jit
def edit(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, parameters: tl.tensor, counts: tl.tensor,
    slots: tl.tensor, stops: tl.tensor, samples: tl.tensor, maxima: tl.tensor, own_maxima: tl.tensor,
    histograms: tl.tensor, found: tl.tensor, masses: tl.tensor, masks: tl.tensor, words: tl.tensor,
    vocabulary: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr, LIST: tl.constexpr,
    BIAS_ROOM: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Edit a block of a row, store it if that changes it, and store its maxima after and before that.

    A maximum is infinite if a logit is NaN. The first block of a row also clears what later kernels add to.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sampled = tl.load(samples + row)
    if sampled == 0:
        return
    slot, stop = tl.load(slots + row).to(tl.int64), tl.load(stops + row)
    start = block * BLOCK
    places = start + tl.arange(0, BLOCK)
    inside = places < vocabulary
    own = tl.load(logits + row * stride + places, mask=inside, other=float("-inf")).to(tl.float32)
    x = own
    if is_edited(parameters, slot, WIDTH, stop, sampled):
        mask = masks + tl.maximum(sampled - 2, 0).to(tl.int64) * words
        x = _edited(
            x, places, start, parameters, counts, slot, stop, mask, words, sampled > 1, vocabulary,
            WIDTH, LIST, BIAS_ROOM, BLOCK,
        )  # fmt: skip
        tl.store(scores + row * vocabulary + places, x, mask=inside)
    tl.store(maxima + row * blocks + block, tl.max(tl.where(x == x, x, float("inf"))))
    if (parameter(parameters, slot, WIDTH, FLAGS) & LOGPROBS) != 0:
        tl.store(own_maxima + row * blocks + block, tl.max(tl.where(own == own, own, float("inf"))))
    if (block == 0) & is_filtered(parameters, slot, WIDTH):
        tl.store(histograms + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(found + row, 0)
        tl.store(masses + row, tl.zeros([], tl.int64))
