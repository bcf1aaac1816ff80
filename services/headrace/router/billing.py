"""Report bills as messages for callers."""

from __future__ import annotations

from headrace.router.state.bills import Bill
from headrace.v1 import generation_pb2 as pb


def bill_message(bill: Bill) -> pb.Bill:
    """Return a bill as callers receive it."""
    message = pb.Bill(cost=bill.cost, largest_tier_cost=bill.largest_tier_cost)
    for tier, charge in bill.charges:
        message.charges.add(
            tier=tier,
            answers=charge.answers,
            attempts=charge.attempts,
            prompt_tokens=charge.prompt_tokens,
            cached_tokens=charge.cached_tokens,
            completion_tokens=charge.completion_tokens,
            wasted_tokens=charge.wasted_tokens,
            cost=bill.cost_of(tier),
        )
    return message
