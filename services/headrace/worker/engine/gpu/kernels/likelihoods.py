"""Find the log-probabilities of tokens and the most likely tokens on the device: three kernels.

    survey   finds the maxima of blocks of logits
    rank     finds the most likely tokens of each block, and sums its probabilities
    report   merges the blocks of each place

They run on the logits that a step leaves, after it, and only for places that are asked for, so they are not
captured. The results are those of `worker.engine.likelihoods`, equal in every bit: the arithmetic is that of
`sampling.exact_math`, and sums are of integers. No place depends on the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.validation import MAX_TOP_LOGPROBS
from headrace.worker.engine.gpu.kernels.sampling import BLOCK
from headrace.worker.engine.gpu.kernels.sampling.exact_math import log, weight
from headrace.worker.engine.gpu.kernels.sampling.parameters import ABSOLUTE, is_finite, maximum_of
from headrace.worker.engine.gpu.kernels.variants import Variant

# The columns of a report: whether the logits are finite, the log-probability of the token as bits of float32,
# then the most likely tokens, and their log-probabilities as bits. Tokens beyond the vocabulary are ABSOLUTE.
MOST = tl.constexpr(MAX_TOP_LOGPROBS)
COLUMNS = tl.constexpr(2 + 2 * MAX_TOP_LOGPROBS)

_WEIGHT_UNIT = tl.constexpr(2.0**-40)
_LEAST = tl.constexpr(-(2.0 - 2.0**-23) * 2.0**127)  # see `worker.engine.likelihoods.LEAST`


@triton.jit
def survey(
    logits: tl.tensor, stride: tl.tensor, which: tl.tensor, maxima: tl.tensor, vocabulary: tl.tensor,
    blocks: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store the maximum of a block of logits; infinite if one is NaN."""
    block, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(which + place).to(tl.int64)
    x = tl.load(logits + row * stride + tokens, mask=tokens < vocabulary, other=float("-inf")).to(tl.float32)
    tl.store(maxima + place * blocks + block, tl.max(tl.where(x == x, x, float("inf"))))


@triton.jit(do_not_specialize=["most"])
def rank(
    logits: tl.tensor, stride: tl.tensor, which: tl.tensor, maxima: tl.tensor, masses: tl.tensor,
    best_ids: tl.tensor, best_logits: tl.tensor, most: tl.tensor, vocabulary: tl.tensor, blocks: tl.tensor,
    MAXIMA: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store the *most* likely tokens of a block, in order, and the sum of the weights of all its tokens."""
    block, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    largest = maximum_of(maxima, place, blocks, MAXIMA)
    if not is_finite(largest):
        return
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    left = tokens < vocabulary
    row = tl.load(which + place).to(tl.int64)
    x = tl.load(logits + row * stride + tokens, mask=left, other=float("-inf")).to(tl.float32)
    tl.store(masses + place * blocks + block, tl.sum(weight(x - largest)))
    begin = (place * blocks + block) * MOST
    for index in range(most):
        best = tl.max(tl.where(left, x, float("-inf")))
        id = tl.min(tl.where(left & (x == best), tokens, ABSOLUTE))
        left = left & (tokens != id)
        tl.store(best_ids + begin + index, id)
        tl.store(best_logits + begin + index, best)


@triton.jit(do_not_specialize=["most"])
def report(
    logits: tl.tensor, stride: tl.tensor, which: tl.tensor, ids: tl.tensor, maxima: tl.tensor,
    masses: tl.tensor, best_ids: tl.tensor, best_logits: tl.tensor, results: tl.tensor, most: tl.tensor,
    vocabulary: tl.tensor, blocks: tl.tensor, MAXIMA: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """Store the report of a place."""
    place = tl.program_id(0).to(tl.int64)
    results += place * COLUMNS
    largest = maximum_of(maxima, place, blocks, MAXIMA)
    finite = is_finite(largest)
    tl.store(results, finite.to(tl.int32))
    if finite:
        lanes = tl.arange(0, MAXIMA)
        mass = tl.sum(tl.load(masses + place * blocks + lanes, mask=lanes < blocks, other=0))
        total = log(mass.to(tl.float32) * _WEIGHT_UNIT)
        # Memory outside the logits is never read, whatever a sampled token is.
        id = tl.minimum(tl.maximum(tl.load(ids + place), 0), vocabulary - 1)
        own = tl.load(logits + tl.load(which + place).to(tl.int64) * stride + id).to(tl.float32)
        logprob = tl.maximum((own - largest) - total, _LEAST)
        tl.store(results + 1, logprob.to(tl.int32, bitcast=True))
        lanes = tl.arange(0, CANDIDATES)
        left = (lanes < blocks * MOST) & (lanes % MOST < most)
        begin = place * blocks * MOST
        found = tl.load(best_ids + begin + lanes, mask=left, other=ABSOLUTE)
        x = tl.load(best_logits + begin + lanes, mask=left, other=float("-inf"))
        left = found != ABSOLUTE
        for index in range(most):
            best = tl.max(tl.where(left, x, float("-inf")))
            id = tl.min(tl.where(left & (x == best), found, ABSOLUTE))
            left = left & (found != id)
            logprob = tl.maximum((best - largest) - total, _LEAST)
            tl.store(results + 2 + index, id)
            tl.store(results + 2 + MOST + index, logprob.to(tl.int32, bitcast=True))


def report_likelihoods(
    logits: torch.Tensor, which: torch.Tensor, ids: torch.Tensor, most: int, *, block: int = BLOCK
) -> torch.Tensor:
    """Find the likelihoods of tokens, without waiting for the device.

    logits   [rows, vocabulary], of any float type; the last dimension contiguous
    which    [places] int32, the row of each place
    ids      [places] int32, the token at each place; one outside the vocabulary counts as the nearest inside
    most     how many of the most likely tokens to find, at most MOST
    block    tokens of a program

    Returns [places, COLUMNS] int32 on the device. Columns of more than *most* tokens are undefined, and so
    are all after the first where logits are not finite.
    """
    places, vocabulary = len(which), logits.shape[1]
    blocks = triton.cdiv(vocabulary, block)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima = empty(places, blocks, dtype=torch.float32)
    masses = empty(places, blocks, dtype=torch.int64)
    best_ids = empty(places, blocks * MOST.value, dtype=torch.int32)
    best_logits = empty(places, blocks * MOST.value, dtype=torch.float32)
    results = empty(places, COLUMNS.value, dtype=torch.int32)
    by_block, width = (blocks, places), triton.next_power_of_2(blocks)
    survey[by_block](
        logits, logits.stride(0), which, maxima, vocabulary, blocks,
        BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    rank[by_block](
        logits, logits.stride(0), which, maxima, masses, best_ids, best_logits, most, vocabulary, blocks,
        MAXIMA=width, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    report[(places,)](
        logits, logits.stride(0), which, ids, maxima, masses, best_ids, best_logits, results, most,
        vocabulary, blocks, MAXIMA=width, CANDIDATES=triton.next_power_of_2(blocks * MOST.value),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return results


def variants() -> list[Variant]:
    """Return the variants for a vocabulary of 151,936 tokens, with the types of logits that models have."""
    constants = {"BLOCK": BLOCK, "MAXIMA": 128, "CANDIDATES": 2048}
    types = {"maxima": "*fp32", "best_logits": "*fp32", "masses": "*i64"}
    numbers = ("stride", "vocabulary", "blocks", "most")
    return [
        Variant(
            name=f"{kernel.__name__}, {kind}",
            kernel=kernel,
            signature={
                name: f"*{kind}" if name == "logits"
                else "i32" if name in numbers
                else types.get(name, "*i32")
                for name in kernel.arg_names if name not in constants
            },
            constants={name: constants[name] for name in kernel.arg_names if name in constants},
            num_warps=warps,
            fp_fusion=False,
            aligned=frozenset({"stride", "vocabulary"}),
        )
        for kernel, warps in ((survey, 4), (rank, 4), (report, 8))
        for kind in ("bf16", "fp32")
    ]  # fmt: skip
