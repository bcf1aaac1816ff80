"""Judge whether a candidate scorer is worse than the one in use, with a test that may be read at any time.

Requests are assigned to the candidate by chance, with a known probability. If the candidate makes no
difference, the assignment is independent of the outcome. The test bets on the assignment of each outcome
before it is read: on "candidate" if the outcome is worse than average, on "control" if it is better. The
wealth of the bets then has the mean 1 at any time, for any traffic, any drift and any distribution of
outcomes, so it reaches 1 / alpha with a probability of at most alpha, however often it is read (Ville's
inequality). If the candidate is worse, the wealth grows exponentially. See "Sequential Randomization Tests
Using e-values" (arXiv 2512.04366, 2025), and Ramdas, Gruenwald, Vovk & Shafer, "Game-Theoretic Statistics and
Safe Anytime-Valid Inference" (Statistical Science, 2023).

Independent bets multiply, so the log-wealth of tenants and of processes adds up, and a tenant's weight can be
bounded: see `log_wealth`. This module has no clock and no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Stakes, as shares of the largest one that cannot lose everything. The right one depends on the difference,
# which is not known: the wealth is the mean over all.
STAKES = (0.08, 0.2, 0.45, 0.9)
MAX_TENANTS = 100  # with evidence of their own; further ones share one
OTHERS = "\0others"
# The most of the needed evidence that one of several tenants can supply. With few tenants it is more, so that
# the others can reach what is needed without that one.
TENANT_WEIGHT = 1 / 3
_WEIGHT_OF_FEW = 0.7
FEW = 10  # outcomes of a tenant, below which it is not another tenant


@dataclass(slots=True)
class Bets:
    """The bets on one tenant's outcomes: their number and sum, and the log-wealth of each of `STAKES`."""

    outcomes: int = 0
    badness: float = 0.0
    log_wealth: list[float] = field(default_factory=lambda: [0.0] * len(STAKES))


@dataclass(slots=True)
class Evidence:
    """The outcomes of both arms in one measure, as one process has seen them.

    share     probability with which a request is the candidate's, above 0 and below 1
    typical   an assumed mean outcome, until outcomes are known
    counts    of outcomes, of control and candidate
    sums      of outcomes, each from 0 (good) to 1 (bad)
    """

    share: float
    typical: float = 0.5
    counts: list[int] = field(default_factory=lambda: [0, 0])
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tenants: dict[str, Bets] = field(default_factory=dict)

    def add(self, tenant: str, *, candidate: bool, badness: float) -> None:
        """Add an outcome, 0 (good) to 1 (bad).

        Outcomes must be assigned independently of each other: of a conversation, which stays in its arm, add
        only one.
        """
        bets = self._bets(tenant)
        # The mean of the tenant's earlier outcomes. It must depend neither on this one nor on other tenants'.
        mean = (self.typical * _ASSUMED + bets.badness) / (_ASSUMED + bets.outcomes)
        gain = (badness - mean) * (candidate - self.share) / max(self.share, 1 - self.share)
        for place, stake in enumerate(STAKES):
            bets.log_wealth[place] += math.log1p(stake * gain)
        bets.outcomes += 1
        bets.badness += badness
        self.counts[candidate] += 1
        self.sums[candidate] += badness

    def _bets(self, tenant: str) -> Bets:
        if tenant not in self.tenants and len(self.tenants) >= MAX_TENANTS:
            tenant = OTHERS
        return self.tenants.setdefault(tenant, Bets())


_ASSUMED = 4  # outcomes that `Evidence.typical` counts as


@dataclass(frozen=True, slots=True)
class Rule:
    """When a measure rolls a candidate back.

    alpha      probability of a roll-back of a candidate that is not worse
    fewest     outcomes of the candidate, before which it is not rolled back
    """

    alpha: float
    fewest: int = 30

    @property
    def needed(self) -> float:
        """The log-wealth of a roll-back."""
        return -math.log(self.alpha)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence of all processes shows in one measure.

    counts    of outcomes, of control and candidate
    means     of outcomes; None without any
    p_value   valid at any time: the probability of evidence as strong if the candidate is not worse
    worse     whether the candidate is to be rolled back
    """

    counts: tuple[int, int]
    means: tuple[float | None, float | None]
    p_value: float
    worse: bool


def judge(parts: Sequence[Evidence], rule: Rule) -> Verdict:
    """Return the verdict of the evidence of several processes."""
    counts = tuple(sum(part.counts[arm] for part in parts) for arm in (0, 1))
    sums = tuple(sum(part.sums[arm] for part in parts) for arm in (0, 1))
    log_e = log_wealth(_by_tenant(parts), rule.needed)
    return Verdict(
        counts=(counts[0], counts[1]),
        means=(
            sums[0] / counts[0] if counts[0] else None,
            sums[1] / counts[1] if counts[1] else None,
        ),
        p_value=math.exp(-max(log_e, 0.0)),
        worse=log_e >= rule.needed and counts[1] >= rule.fewest,
    )


def log_wealth(tenants: Mapping[str, Bets], needed: float) -> float:
    """Return the log-wealth of all tenants together, in which no single tenant decides.

    One of several tenants supplies at most a part of the evidence that is needed, `TENANT_WEIGHT` of it if
    there are many: it cannot roll a candidate back alone. The wealth is the mean of two: that of all tenants,
    and the mean of those without one tenant each. So a tenant that reports the opposite of the truth cannot
    keep a bad candidate in use. Neither a bound from above nor a mean of several wealths makes a roll-back
    without a difference more likely.
    """
    known = [name for name, bets in tenants.items() if bets.outcomes >= FEW]
    weight = math.inf
    if len(known) > 1:
        # What all but the last tenant need, whose weight below is the smallest; and a little more.
        enough = 1.05 * (needed + math.log(2 * len(tenants) * (len(tenants) + 1)))
        weight_of_few = enough / ((len(known) - 1) * needed)
        weight = max(TENANT_WEIGHT, min(_WEIGHT_OF_FEW, weight_of_few))
    bounded = {
        name: [min(value, needed * weight) for value in bets.log_wealth] for name, bets in tenants.items()
    }
    total = [sum(own[place] for own in bounded.values()) for place in range(len(STAKES))]
    # The weights are the same for any number of tenants: that of a tenant which has no outcome so far belongs
    # to the wealth of all.
    without = [
        _log_mean([all_ - one for all_, one in zip(total, own, strict=True)])
        - math.log(2 * place * (place + 1))
        for place, own in enumerate(bounded.values(), start=1)
    ]
    return _log_sum([_log_mean(total) + math.log(0.5 + 0.5 / (len(tenants) + 1)), *without])


def _by_tenant(parts: Sequence[Evidence]) -> dict[str, Bets]:
    """Return the bets of each tenant in all processes."""
    merged: dict[str, Bets] = {}
    for part in parts:
        for tenant, bets in part.tenants.items():
            own = merged.setdefault(tenant, Bets())
            own.outcomes += bets.outcomes
            own.log_wealth = [one + two for one, two in zip(own.log_wealth, bets.log_wealth, strict=True)]
    return merged


def _log_mean(logs: Sequence[float]) -> float:
    return _log_sum(logs) - math.log(len(logs))


def _log_sum(logs: Sequence[float]) -> float:
    """Return the logarithm of the sum of exp(logs)."""
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs))
