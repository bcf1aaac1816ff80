"""Log-probabilities of tokens, and the most likely tokens, under the model's own distribution.

They are of the logits as the model computes them, before temperature, filters, penalties and biases. The
arithmetic is that of `fixed_math`: a row does not depend on other rows, the log-probability of a token has
the same bits wherever it is reported, and equal logits give equal bits on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine import fixed_math
from headrace.worker.engine.cpu.kernels.sampling.likelihoods import LIKELIHOOD, compute_likelihoods
from headrace.worker.engine.interface import Fault, PromptLogprobs, Result, Row, Token, TopTokens

NOT_FINITE = Fault("the model's logits are not finite")

# Instead of minus infinity, which JSON cannot represent.
LEAST = np.float32(np.finfo(np.float32).min)

_UNIT = np.float32(1 / fixed_math.WEIGHT_ONE)


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """The likelihoods of tokens at some places.

    finite         [places] whether the logits are finite; if not, the other values are undefined
    logprobs       [places] float32, of the token at each place
    top_ids        [places, most] of the most likely tokens, most likely first; of equally likely ones, those
                   with the smallest ids come first
    top_logprobs   [places, most] float32
    """

    finite: npt.NDArray[np.bool]
    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]

    def top(self, place: int, most: int) -> TopTokens:
        """Return the *most* likely tokens at a place; fewer if the vocabulary has fewer."""
        return TopTokens(self.top_ids[place, :most].tolist(), self.top_logprobs[place, :most].tolist())


def likelihoods(logits: torch.Tensor, ids: Sequence[int], most: int) -> Likelihoods:
    """Compute the likelihoods of tokens on the CPU.

    logits   [places, vocabulary], any float type
    ids      the token at each place
    most     how many of the most likely tokens to find
    """
    logits = logits.float().contiguous()
    places, vocabulary = logits.shape
    most = min(most, vocabulary)
    top_ids = np.zeros((places, most), np.int32)
    top_logits = np.zeros((places, most), np.float32)
    table: npt.NDArray[Any] = np.zeros(places, LIKELIHOOD)
    order = np.arange(places)
    table["id"] = ids
    for name, address, numbers in (
        ("logits", logits.data_ptr(), vocabulary),
        ("top_ids", top_ids.ctypes.data, most),
        ("top_logits", top_logits.ctypes.data, most),
    ):
        table[name] = address + 4 * numbers * order
    compute_likelihoods(table, vocabulary, most=most, threads=torch.get_num_threads())
    largest, mass = table["largest"], table["mass"]
    return Likelihoods(
        table["finite"] != 0,
        logprobs(table["own"], largest, mass),
        top_ids,
        logprobs(top_logits, largest[:, None], mass[:, None]),
    )


def logprobs(
    logits: npt.NDArray[np.float32], largest: npt.NDArray[np.float32], mass: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return log-probabilities, at least LEAST, given logits and what is known of their rows.

    largest   the greatest logit of the row
    mass      sum of `fixed_math.weight` over the row
    """
    total = np.maximum(mass, fixed_math.WEIGHT_ONE).astype(np.float32) * _UNIT
    with np.errstate(all="ignore"):
        return np.asarray(np.maximum((logits - largest) - fixed_math.log(total), LEAST))


def joined(parts: Sequence[Likelihoods]) -> Likelihoods:
    """Join likelihoods of consecutive places, with equally many of the most likely tokens."""
    return Likelihoods(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("finite", "logprobs", "top_ids", "top_logprobs")
        )
    )


def most_of_prompts(rows: Sequence[Row]) -> int:
    """Return how many of the most likely tokens the scored prompts of rows ask for, at most."""
    return max((row.params.prompt_logprobs or 0 for row in rows if row.scored), default=0)


def scored_ids(rows: Sequence[Row]) -> list[int]:
    """Return the tokens of all `Row.scored`, in order."""
    return [id for row in rows if row.scored for id in row.ids[row.scored.start : row.scored.stop]]


def prompt_parts(rows: Sequence[Row], found: Likelihoods) -> dict[int, PromptLogprobs | Fault]:
    """Return the parts of prompts that rows score, by the index of the row.

    found   of the tokens of all `Row.scored`, in order
    """
    parts: dict[int, PromptLogprobs | Fault] = {}
    begin = 0
    for index, row in enumerate(rows):
        if not row.scored:
            continue
        end = begin + len(row.scored)
        if found.finite[begin:end].all():
            most = row.params.prompt_logprobs or 0
            ids = found.top_ids[begin:end, :most].tolist()
            tops = found.top_logprobs[begin:end, :most].tolist()
            parts[index] = PromptLogprobs(
                row.scored.start,
                found.logprobs[begin:end].tolist(),
                [TopTokens(*top) for top in zip(ids, tops, strict=True)] if most else (),
            )
        else:
            parts[index] = NOT_FINITE
        begin = end
    return parts


def add_prompts(results: list[Result], prompts: Mapping[int, PromptLogprobs | Fault]) -> None:
    """Add scored parts of prompts to the results of a step, by the index of the row."""
    for index, part in prompts.items():
        result = results[index]
        if isinstance(part, PromptLogprobs) and isinstance(result, Token):
            result.prompt = part
        elif not isinstance(result, Fault):
            results[index] = part
