"""Represent what a request takes from the budgets of its tenant, and why it may not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Amounts:
    """Amounts of each kind of budget. What is added over time may also be negative: what was taken back."""

    requests: float = 0.0
    tokens: float = 0.0
    cost: float = 0.0
    streams: int = 0

    def add(self, other: Amounts) -> None:
        """Add another amount to this one."""
        self.requests += other.requests
        self.tokens += other.tokens
        self.cost += other.cost
        self.streams += other.streams


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not admitted.

    limit         name of the limit that was reached, as in the file of limits
    most          its value
    retry_after   seconds until the request may be admitted; None: never
    """

    limit: str
    most: float
    retry_after: float | None
