"""Sample one token per row on the device: six kernels, which can be captured.

    edit        applies bias, penalties, min_tokens and masks to blocks of logits, and finds their maxima
    histogram   counts the tokens of a filtered row by score
    collect     copies the scores of its likeliest tokens
    threshold   finds the least score that the filters of a row keep
    draw        adds noise, and finds the best token of each block
    choose      finds the best token of each row, and counts it

A program computes one row, or a block of it; it ends at once if its row does not sample or needs no such
step. Results are those of `worker.engine.sampling`, equal in every bit, see `exact_math`. Sums are of
integers, so that they do not depend on the order, and no row depends on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from headrace.worker.engine.gpu.kernels.sampling.drawing import choose, draw
from headrace.worker.engine.gpu.kernels.sampling.editing import edit
from headrace.worker.engine.gpu.kernels.sampling.filtering import BINS, collect, histogram, threshold
from headrace.worker.engine.gpu.kernels.sampling.parameters import LISTS
from headrace.worker.engine.gpu.kernels.variants import Variant
from headrace.worker.engine.gpu.step_inputs import StepInputs

BLOCK = 2048  # tokens of a program
CANDIDATES = 4096  # likeliest tokens that filters examine first; a power of two

_WARPS = {edit: 4, histogram: 4, collect: 8, threshold: 8, draw: 4, choose: 1}


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of the parameters of a slot: `parameters` names the first ones, lists follow.

    biases    room for biases
    endings   room for ids that would end the answer
    """

    biases: int
    endings: int

    @property
    def bias_ids(self) -> slice:
        """Columns of the ids of biases."""
        return slice(LISTS.value, LISTS.value + self.biases)

    @property
    def bias_values(self) -> slice:
        """Columns of the biases, as bits of float32."""
        return slice(LISTS.value + self.biases, LISTS.value + 2 * self.biases)

    @property
    def ending_ids(self) -> slice:
        """Columns of ids that would end the answer."""
        return slice(LISTS.value + 2 * self.biases, self.width)

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(LISTS.value) + 2 * self.biases + self.endings


class SamplingMemory:
    """The tensors that sampling keeps on the device, at fixed addresses.

    slots        number of slots, without that of padding rows; also the most rows of a step
    vocabulary   number of tokens
    block        tokens of a program
    candidates   likeliest tokens that filters examine first; changes no result

    parameters   [slots + 1, layout.width] int32
    counts       [slots + 1, vocabulary] int32: how often each id has occurred in the answer, and SEEN
    latest       [slots + 1] int32: the token sampled last
    masks        [slots, words] int32: number t // 32 has the bit t % 32 of token t, set if it may be sampled;
                 the last number is 1 if the ban of min_tokens does not apply. `StepInputs.samples` has the
                 mask of a row
    """

    def __init__(
        self,
        slots: int,
        vocabulary: int,
        layout: Layout,
        device: torch.device,
        *,
        block: int = BLOCK,
        candidates: int = CANDIDATES,
    ) -> None:
        self.slots, self.vocabulary, self.layout = slots, vocabulary, layout
        self.block, self.candidates = block, candidates
        self.blocks = triton.cdiv(vocabulary, block)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.parameters = zeros(slots + 1, layout.width)
        self.counts = zeros(slots + 1, vocabulary)
        self.latest = zeros(slots + 1)
        self.words = triton.cdiv(vocabulary, 32) + 1
        self.masks = zeros(slots, self.words)
        # The rest is scratch, by row of a step.
        self.scores = zeros(slots, vocabulary, dtype=torch.float32)
        self.maxima, self.own_maxima, self.bests = zeros(3, slots, self.blocks, dtype=torch.float32)
        self.best_ids = zeros(slots, self.blocks)
        self.own_masses = zeros(slots, self.blocks, dtype=torch.int64)
        self.histograms, self.found = zeros(slots, BINS.value), zeros(slots)
        self.masses = zeros(slots, dtype=torch.int64)
        self.candidate_scores = zeros(slots, candidates, dtype=torch.float32)
        self.thresholds = zeros(slots, dtype=torch.float32)


def sample(logits: torch.Tensor, step: StepInputs, memory: SamplingMemory, results: torch.Tensor) -> None:
    """Sample the rows of a step whose `samples` is not 0, and update `latest` and the counts of their slots.

    logits    [rows, vocabulary], of any float type; the last dimension contiguous
    results   [3, rows] int32, contiguous: receives tokens, whether the logits were finite, and
              log-probabilities as bits of float32. Zeros for rows that do not sample
    """
    m, rows = memory, len(step.slots)
    if rows > m.slots or logits.shape != (rows, m.vocabulary):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {rows} rows, at most {m.slots}")
    by_block, by_row = (m.blocks, rows), (rows,)
    width, maxima = m.layout.width, triton.next_power_of_2(m.blocks)
    source = (logits, logits.stride(0), m.scores, m.parameters)
    which = (step.slots, step.stops, step.samples)
    edit[by_block](
        *source, m.counts, *which, m.maxima, m.own_maxima, m.histograms, m.found, m.masses,
        m.masks, m.words, m.vocabulary, m.blocks,
        WIDTH=width, LIST=triton.next_power_of_2(m.layout.biases), BIAS_ROOM=m.layout.biases, BLOCK=m.block,
        num_warps=_WARPS[edit], enable_fp_fusion=False,
    )  # fmt: skip
    histogram[by_block](
        *source, *which, m.maxima, m.histograms, m.masses, m.vocabulary, m.blocks,
        WIDTH=width, MAXIMA=maxima, BLOCK=m.block, num_warps=_WARPS[histogram], enable_fp_fusion=False,
    )  # fmt: skip
    collect[by_block](
        *source, *which, m.maxima, m.histograms, m.found, m.candidate_scores, m.vocabulary, m.blocks,
        WIDTH=width, MAXIMA=maxima, BLOCK=m.block, CANDIDATES=m.candidates,
        num_warps=_WARPS[collect], enable_fp_fusion=False,
    )  # fmt: skip
    threshold[by_row](
        *source, *which, m.maxima, m.found, m.masses, m.candidate_scores, m.thresholds,
        m.vocabulary, m.blocks,
        WIDTH=width, MAXIMA=maxima, CANDIDATES=m.candidates,
        num_warps=_WARPS[threshold], enable_fp_fusion=False,
    )  # fmt: skip
    draw[by_block](
        *source, *which, step.keys, m.maxima, m.own_maxima, m.thresholds, m.bests, m.best_ids, m.own_masses,
        m.vocabulary, m.blocks,
        WIDTH=width, MAXIMA=maxima, BLOCK=m.block, num_warps=_WARPS[draw], enable_fp_fusion=False,
    )  # fmt: skip
    choose[by_row](
        logits, logits.stride(0), m.parameters, m.counts, step.slots, step.samples, m.maxima, m.own_maxima,
        m.bests, m.best_ids, m.own_masses, m.latest, results, rows, m.vocabulary, m.blocks,
        WIDTH=width, MAXIMA=maxima, num_warps=_WARPS[choose], enable_fp_fusion=False,
    )  # fmt: skip


_FLOATS = ("scores", "maxima", "own_maxima", "candidates", "thresholds", "bests")
_LONGS = ("masses", "own_masses")
_NUMBERS = ("stride", "rows", "words", "vocabulary", "blocks")


def variants() -> list[Variant]:
    """Return the variants for a vocabulary of 151,936 tokens, with the types of logits that models have."""
    constants = {
        "WIDTH": Layout(300, 72).width, "LIST": 512, "BIAS_ROOM": 300, "BLOCK": BLOCK, "MAXIMA": 128,
        "CANDIDATES": CANDIDATES,
    }  # fmt: skip
    found = []
    for kernel, warps in _WARPS.items():
        for kind in ("bf16", "fp32"):
            signature = {
                name: f"*{kind}" if name == "logits"
                else "*fp32" if name in _FLOATS
                else "*i64" if name in _LONGS
                else "i32" if name in _NUMBERS
                else "*i32"
                for name in kernel.arg_names if name not in constants
            }  # fmt: skip
            found.append(
                Variant(
                    name=f"{kernel.__name__}, {kind}",
                    kernel=kernel,
                    signature=signature,
                    constants={name: constants[name] for name in kernel.arg_names if name in constants},
                    num_warps=warps,
                    fp_fusion=False,
                    aligned=frozenset({"stride", "vocabulary"}),
                )
            )
    return found
