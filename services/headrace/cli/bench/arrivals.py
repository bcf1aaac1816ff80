"""Plan when requests are sent, for a rate: a Poisson process, or burstier or more even than that.

The times between requests follow a gamma distribution of mean 1/rate and shape *burstiness*, as in
`vllm bench serve`: 1 is a Poisson process, less is burstier, infinity is a constant interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024


def arrivals(
    rate: float,
    *,
    burstiness: float = 1.0,
    seed: int = 0,
    requests: int | None = None,
    seconds: float | None = None,
) -> Iterator[float]:
    """Yield the times of the requests in seconds from the start, in order.

    rate       requests per second, above 0
    requests   how many; None: unlimited. Without *seconds*, they are stretched to last exactly requests/rate
               seconds, as in vLLM, so that all seeds have the same mean rate
    seconds    none later than this; None: unlimited
    """
    rng = np.random.default_rng(seed)
    if requests is not None and seconds is None:
        times = np.cumsum(_gaps(rng, rate, burstiness, requests))
        if requests and times[-1] > 0:
            times *= requests / rate / times[-1]
        yield from times.tolist()
        return
    at, made = 0.0, 0
    while True:
        for gap in _gaps(rng, rate, burstiness, _BLOCK).tolist():
            at += gap
            if (seconds is not None and at > seconds) or (requests is not None and made >= requests):
                return
            made += 1
            yield at


def _gaps(rng: np.random.Generator, rate: float, burstiness: float, count: int) -> NDArray[np.float64]:
    if math.isinf(burstiness):
        return np.full(count, 1 / rate)
    return rng.gamma(burstiness, 1 / (rate * burstiness), count)
