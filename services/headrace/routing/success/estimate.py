"""Define what is expected of a tier's answer to one request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is expected of one tier's answer.

    good     probability that it is good enough, 0 to 1
    tokens   expected number of generated tokens; None if it is not known
    """

    good: float
    tokens: float | None = None
