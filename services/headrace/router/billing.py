"""Report bills: as messages for callers, and as metrics."""

from __future__ import annotations

from opentelemetry import metrics

from headrace import attributes
from headrace.router.state.bills import Bill
from headrace.v1 import generation_pb2 as pb

_meter = metrics.get_meter("headrace.router")
_billed = _meter.create_counter(
    attributes.METRIC_BILLED_TOKENS, unit="{token}", description="tokens on bills, by tier and kind"
)
_cost = _meter.create_counter(attributes.METRIC_COST, description="cost at the configured prices, by tier")
_largest_cost = _meter.create_counter(
    attributes.METRIC_LARGEST_COST, description="cost of the same tokens on the largest tier"
)


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


def measure(bill: Bill) -> None:
    """Add the bill of one request to the metrics."""
    for tier, charge in bill.charges:
        for kind, tokens in (
            ("prompt", charge.prompt_tokens),
            ("completion", charge.completion_tokens),
            ("wasted", charge.wasted_tokens),
        ):
            _billed.add(tokens, {attributes.TIER: tier, attributes.TOKEN_KIND: kind})
        if (cost := bill.cost_of(tier)) is not None:
            _cost.add(cost, {attributes.TIER: tier})
    if bill.largest_tier_cost is not None:
        _largest_cost.add(bill.largest_tier_cost)
