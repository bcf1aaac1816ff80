"""Report what each request has cost, for a budget."""

from __future__ import annotations

from collections.abc import Callable

from headrace.router.changes.answered import Answered, Rating
from headrace.routing.request import RoutingRequest
from headrace.v1 import generation_pb2 as pb


class Spending:
    """Calls *spend* with the cost of each request that has ended. A `Watcher`."""

    def __init__(self, spend: Callable[[float], None]) -> None:
        self._spend = spend

    def wants_text(self, request: pb.GenerateRequest, facts: RoutingRequest) -> bool:
        """See `Watcher`."""
        return False

    def answered(self, answered: Answered) -> None:
        """See `Watcher`."""
        if cost := answered.bill.known_cost:
            self._spend(cost)

    def rated(self, rating: Rating) -> None:
        """See `Watcher`."""
