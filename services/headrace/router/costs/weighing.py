"""Weigh each tier's expected quality against what its answer will probably cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from headrace.router.costs.budget import Budget
from headrace.router.costs.usage import TierUsage
from headrace.router.siblings import Siblings
from headrace.routing.request import RoutingRequest
from headrace.routing.success.choosing import Weighed, cost_weight
from headrace.routing.tier_view import Price
from headrace.v1 import generation_pb2 as pb

_SPENT = "spent"


class Weighing:
    """What is expected of each tier's answer to a request, and how much cost counts.

    tiers         names, smallest first
    prices        of the tiers that have one; the others are free. Without any, each tier is ten times as
                  expensive as the one before
    cost_weight   how much higher the probability of a good answer must be to be worth the typical cost of an
                  answer of the most expensive tier
    per_day       budget, in the currency of *prices*; None: there is none
    siblings      the other processes of this router, which spend the same budget
    clock         returns the seconds since 1970
    """

    def __init__(
        self,
        tiers: Sequence[str],
        prices: Mapping[str, Price],
        *,
        cost_weight: float = 0.1,
        per_day: float | None = None,
        siblings: Siblings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        free = Price(0.0, 0.0)
        self._prices = {
            tier: prices.get(tier, free) if prices else Price(10.0**place, 10.0**place)
            for place, tier in enumerate(tiers)
        }
        self._usages = {tier: TierUsage() for tier in tiers}
        self._cost_weight = cost_weight
        self._clock = clock
        self._siblings = siblings or Siblings()
        self._budget = Budget(per_day, clock()) if per_day is not None else None
        self._siblings.on_tell(_SPENT, self._add)

    def estimated(self, request: RoutingRequest) -> bool:
        """Whether the scorer has estimated the answers of all tiers."""
        return all(tier in request.estimates for tier in self._usages)

    def weigh(self, request: RoutingRequest, reached: str) -> Weighed | None:
        """Return what is expected of each tier's answer; None if the scorer has not estimated all of them.

        reached   the tier that answered the previous turn of the conversation; empty: none
        """
        if not self.estimated(request):
            return None
        estimates = request.estimates
        names = list(self._usages)
        costs = (
            usage.cost(
                self._prices[tier],
                prompt_bytes=request.prompt_bytes,
                tokens=estimates[tier].tokens,
                max_tokens=request.max_tokens,
                follows=tier == reached,
            )
            for tier, usage in self._usages.items()
        )
        return Weighed(
            tuple(estimates[tier].good for tier in names),
            tuple(costs),
            cost_weight(self._base_weight(), request.hints.quality_preference),
            previous=names.index(reached) if reached else -1,
        )

    def record(self, request: RoutingRequest, tier: str, usage: pb.Usage, *, follows: bool) -> None:
        """Record the tokens of an answer.

        follows   whether the tier has answered the previous turn of the conversation
        """
        self._usages[tier].record(
            prompt_bytes=request.prompt_bytes,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            tokens=usage.completion_tokens,
            follows=follows,
        )

    def expect(self, cost: float) -> None:
        """Record the expected cost of a request that begins, which many others may do before it ends."""
        if self._budget is not None:
            self._budget.expect(cost, self._clock())

    def spend(self, cost: float, expected: float = 0.0) -> None:
        """Record the cost of a request that has ended, here and in the siblings.

        expected   the cost that was expected
        """
        if self._budget is not None:
            self._budget.expect(-expected, self._clock())
            self._add(cost)
            self._siblings.tell(_SPENT, cost)

    def _add(self, cost: float) -> None:
        if self._budget is not None:
            self._budget.spend(cost, self._clock())

    def _base_weight(self) -> float:
        """Return how much P(good) a unit of cost is worth at a quality preference of 0.5."""
        factor = 1.0 if self._budget is None else self._budget.factor(self._clock())
        dearest = max(usage.typical_cost(self._prices[tier]) for tier, usage in self._usages.items())
        return self._cost_weight * factor / dearest if dearest else 0.0
