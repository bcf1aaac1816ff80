"""Draw one token per row: temperature, top-k, top-p, min-p and noise, with torch operations.

The result is that of `worker.engine.sampling`, in every bit. Probabilities are summed as integers, so a row's
token depends neither on the other rows nor on the order in which a device adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine import fixed_math
from headrace.worker.engine.drawing.arithmetic import gumbel, weight
from headrace.worker.engine.interface import SamplingParams

# Filters examine this many of the likeliest tokens first, and all tokens if those do not suffice.
CANDIDATES = 1024
# Numbers that are drawn among at a time: the intermediate results of so many stay in a CPU's caches, or take
# little memory of a GPU.
CPU_NUMBERS, GPU_NUMBERS = 1 << 18, 1 << 25

_NEVER = float("-inf")


def min_p_logs(min_ps: Sequence[float]) -> npt.NDArray[np.float32]:
    """Return the least score, relative to the likeliest token's, that each min_p keeps: its logarithm."""
    values = np.array(min_ps, np.float32)
    if not values.any():
        return np.full_like(values, -np.inf)
    least = np.float32(np.finfo(np.float32).tiny)
    return np.where(values < least, np.float32(-np.inf), fixed_math.log(np.clip(values, least, 1)))


@dataclass(frozen=True, slots=True)
class Filters:
    """The parameters of rows on their device; made once for a batch.

    temperature, min_p_log   [rows] float32
    top_k                    [rows] int64, 0 for all tokens
    top_p                    [rows] float64
    open, filtered           indices of the rows that are drawn among all tokens, and of those with top-k or
                             top-p; the others take their likeliest token
    weighed                  whether a row has top-p without top-k, which needs the mass of all tokens
    """

    temperature: torch.Tensor
    min_p_log: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    open: tuple[int, ...]
    filtered: tuple[int, ...]
    weighed: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> Filters:
        """Return the filters of rows with these parameters."""
        temperatures = np.array([own.temperature for own in params], np.float32)
        top_k = np.array([own.top_k if 0 < own.top_k < vocabulary else 0 for own in params], np.int64)
        top_p = np.array([own.top_p for own in params], np.float32).astype(np.float64)
        drawn, narrow = temperatures > 0, (top_k > 0) | (top_p < 1)
        return cls(
            torch.from_numpy(temperatures).to(device),
            torch.from_numpy(min_p_logs([own.min_p for own in params])).to(device),
            torch.from_numpy(top_k).to(device),
            torch.from_numpy(top_p).to(device),
            tuple(np.flatnonzero(drawn & ~narrow).tolist()),
            tuple(np.flatnonzero(drawn & narrow).tolist()),
            bool((drawn & (top_p < 1) & (top_k == 0)).any()),
        )

    def take(self, index: torch.Tensor) -> Filters:
        """Return the filters of some rows."""
        return Filters(
            self.temperature[index],
            self.min_p_log[index],
            self.top_k[index],
            self.top_p[index],
            open=(),
            filtered=(),
            weighed=self.weighed,
        )


def choose(scores: torch.Tensor, filters: Filters, keys: torch.Tensor) -> torch.Tensor:
    """Draw one token per row.

    scores   [rows, vocabulary] float32, edited logits; not modified
    keys     [rows, 2] int32 from `noise.noise_keys`

    Returns [rows] int64. The token of a row whose scores are not finite is undefined.
    """
    largest, chosen = scores.max(dim=1)
    most = max(1, (CPU_NUMBERS if scores.device.type == "cpu" else GPU_NUMBERS) // scores.shape[1])
    for draw, rows in ((_draw_open, filters.open), (_draw_filtered, filters.filtered)):
        for first in range(0, len(rows), most):
            index = torch.tensor(rows[first : first + most], device=scores.device)
            own = filters.take(index)
            scaled = scores[index].sub_(largest[index, None]).div_(own.temperature[:, None])
            chosen[index] = draw(scaled, own, keys[index])
    return chosen


def _draw_open(scaled: torch.Tensor, own: Filters, keys: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
    kept = scaled >= own.min_p_log[:, None]
    return gumbel(keys, ids[None]).add_(scaled).masked_fill_(~kept, _NEVER).argmax(dim=1)


def _draw_filtered(scaled: torch.Tensor, own: Filters, keys: torch.Tensor) -> torch.Tensor:
    values, ids, least = _likeliest(scaled, own)
    noisy = gumbel(keys, ids.int()).add_(values).masked_fill_(values < least[:, None], _NEVER)
    best = noisy.amax(dim=1, keepdim=True)
    return ids.masked_fill_(noisy < best, scaled.shape[1]).amin(dim=1)


def _likeliest(scaled: torch.Tensor, own: Filters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the greatest scores, their tokens, and the least score that the filters keep.

    They include all that are kept. Looks at the results on the host once, unless *scaled* has few tokens.
    """
    vocabulary = scaled.shape[1]
    for count in (min(CANDIDATES, vocabulary), vocabulary):
        values, ids = scaled.topk(count, dim=1)
        least, known = _least(scaled, values, own)
        # Of scores equal to the last one, some may be missing.
        if count == vocabulary or bool((known & (least > values[:, -1])).all()):
            break
    return values, ids, least


def _least(scaled: torch.Tensor, values: torch.Tensor, own: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least scores that the filters keep, and whether the scores *values* suffice to know them.

    values   [rows, count], the greatest scores in descending order
    """
    count = values.shape[1]
    kth = values.gather(1, (own.top_k - 1).clamp(0, count - 1)[:, None])
    kth = kth.masked_fill_((own.top_k == 0)[:, None], _NEVER)
    weights = weight(values)
    total = weights.mul(values >= kth).sum(dim=1)
    if own.weighed:
        total = torch.where(own.top_k > 0, total, weight(scaled).sum(dim=1))
    below = weights.cumsum(dim=1).double() < (own.top_p * total.double())[:, None]
    place = below.sum(dim=1)
    nucleus = values.gather(1, place.clamp(max=count - 1)[:, None])
    nucleus = nucleus.masked_fill_((own.top_p >= 1)[:, None], _NEVER)
    known = (own.top_k <= count) & ((own.top_p >= 1) | (place < count))
    return torch.maximum(torch.maximum(kth, nucleus)[:, 0], own.min_p_log), known
