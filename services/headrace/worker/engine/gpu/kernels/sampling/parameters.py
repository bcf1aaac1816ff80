"""What all sampling kernels read: the parameters of a slot, and the logits of a row."""

from __future__ import annotations

import triton
import triton.language as tl

# The parameters of a slot: columns of int32, in which float32 numbers are stored as bits.
TEMPERATURE = tl.constexpr(0)  # 0 for the likeliest token
TOP_K = tl.constexpr(1)  # 0 for all tokens
TOP_P = tl.constexpr(2)  # 1 for all tokens
MIN_P_LOG = tl.constexpr(3)
REPETITION = tl.constexpr(4)
FREQUENCY = tl.constexpr(5)  # negated
PRESENCE = tl.constexpr(6)
BAN_UNTIL = tl.constexpr(7)  # the answer may end from this position on
FLAGS = tl.constexpr(8)
BIASES = tl.constexpr(9)  # number of biases
ENDINGS = tl.constexpr(10)  # number of ids that would end the answer
LISTS = tl.constexpr(16)  # first column of the lists: ids of biases in ascending order, biases, endings

EDITED = tl.constexpr(1)  # flag: there are biases or penalties
PENALISED = tl.constexpr(2)  # flag: there are penalties, and ids are counted
LOGPROBS = tl.constexpr(4)  # flag: log-probabilities are wanted

# In the counts of a slot: the id has occurred in the prompt or the answer. The other bits count the answer.
SEEN = tl.constexpr(1 << 30)

ABSOLUTE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def parameter(parameters: tl.tensor, slot: tl.tensor, WIDTH: tl.constexpr, column: tl.tensor) -> tl.tensor:
    """Return an integer parameter of a slot."""
    return tl.load(parameters + slot * WIDTH + column)


@triton.jit
def real(parameters: tl.tensor, slot: tl.tensor, WIDTH: tl.constexpr, column: tl.tensor) -> tl.tensor:
    """Return a parameter that is a real number."""
    return tl.load(parameters + slot * WIDTH + column).to(tl.float32, bitcast=True)


@triton.jit
def is_edited(
    parameters: tl.tensor, slot: tl.tensor, WIDTH: tl.constexpr, stop: tl.tensor, sampled: tl.tensor
) -> tl.tensor:  # fmt: skip
    """Return whether parameters or a mask change the logits at position *stop*.

    sampled   the row's number in `StepInputs.samples`
    """
    flagged = (parameter(parameters, slot, WIDTH, FLAGS) & EDITED) != 0
    banned = (stop < parameter(parameters, slot, WIDTH, BAN_UNTIL)) & (
        parameter(parameters, slot, WIDTH, ENDINGS) > 0
    )
    return flagged | banned | (sampled > 1)


@triton.jit
def is_filtered(parameters: tl.tensor, slot: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Return whether a slot samples with top-k or top-p."""
    narrow = (parameter(parameters, slot, WIDTH, TOP_K) > 0) | (real(parameters, slot, WIDTH, TOP_P) < 1.0)
    return narrow & (real(parameters, slot, WIDTH, TEMPERATURE) > 0.0)


@triton.jit
def maximum_of(maxima: tl.tensor, row: tl.tensor, blocks: tl.tensor, MAXIMA: tl.constexpr) -> tl.tensor:
    """Return the maximum of a row, given those of its blocks."""
    lanes = tl.arange(0, MAXIMA)
    return tl.max(tl.load(maxima + row * blocks + lanes, mask=lanes < blocks, other=float("-inf")))


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    """Return whether x is a finite number."""
    return (x < float("inf")) & (x > float("-inf"))


@triton.jit
def load_logits(
    logits: tl.tensor, stride: tl.tensor, scores: tl.tensor, vocabulary: tl.tensor, row: tl.tensor,
    places: tl.tensor, edited: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Load logits after edits; -inf outside the vocabulary."""
    inside = places < vocabulary
    if edited:
        x = tl.load(scores + row * vocabulary + places, mask=inside, other=float("-inf"))
    else:
        x = tl.load(logits + row * stride + places, mask=inside, other=float("-inf")).to(tl.float32)
    return x
