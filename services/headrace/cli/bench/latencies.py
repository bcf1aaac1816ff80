"""Compute latencies of one answer and statistics of many, as pure functions with the definitions of vLLM.

TTFT    from the start of a request to its first token
TPOT    of one request, the mean time per token after the first: (E2EL - TTFT) / (tokens - 1)
ITL     times between consecutive messages with tokens of one request. A message with several tokens counts
        once, as in `vllm bench serve`: ITL shows how evenly text appears, and TPOT how fast
E2EL    from the start of a request to its last token

The start of a request is when it was sent, or when it was to be sent if there is a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def time_per_output_token(ttft: float, e2el: float, tokens: int) -> float | None:
    """Return the TPOT of an answer; None for fewer than two tokens."""
    return (e2el - ttft) / (tokens - 1) if tokens > 1 else None


def gaps(times: Sequence[float]) -> list[float]:
    """Return the times between consecutive arrivals."""
    return np.diff(np.asarray(times, dtype=float)).tolist() if len(times) > 1 else []


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, linearly interpolated; *values* must not be empty."""
    return float(np.percentile(np.asarray(values, dtype=float), percent))


@dataclass(frozen=True)
class Spread:
    """Statistics of one latency, in the unit of its values.

    std           of the population, as in numpy
    percentiles   by percent
    """

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]


def spread(values: Sequence[float], percents: Sequence[float]) -> Spread | None:
    """Return the statistics of *values*; None if there are none."""
    if not len(values):
        return None
    array = np.asarray(values, dtype=float)
    found = np.percentile(array, list(percents)) if percents else []
    return Spread(
        float(array.mean()),
        float(np.median(array)),
        float(array.std()),
        {percent: float(value) for percent, value in zip(percents, found, strict=True)},
    )
