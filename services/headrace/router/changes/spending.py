"""Report what each request has cost, for a budget."""

from __future__ import annotations

from collections.abc import Callable

from headrace.router.changes.answered import Answered, Rating
from headrace.routing.request import RoutingRequest
from headrace.v1 import generation_pb2 as pb


class Spending:
    """Calls *spend* with the cost of each request that has ended, and its expected cost. A `Watcher`."""

    def __init__(self, spend: Callable[[float, float], None]) -> None:
        self._spend = spend

    def wants_text(self, request: pb.GenerateRequest, facts: RoutingRequest) -> bool:
        """See `Watcher`."""
        return False

    def answered(self, answered: Answered) -> None:
        """See `Watcher`."""
        decision, expected = answered.decision, 0.0
        if decision is not None and (weighed := decision.considered.weighed) is not None:
            expected = weighed.cost[decision.place]
        cost = answered.bill.known_cost
        if cost or expected:
            self._spend(cost, expected)

    def rated(self, rating: Rating) -> None:
        """See `Watcher`."""
