"""Translate leases of quotas between protobuf and plain values, and check those of other processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from headrace import errors
from headrace.router.quotas.accounts import MANY, OTHERS, Key
from headrace.router.quotas.amounts import Amounts
from headrace.router.quotas.keeper import MAX_BYTES, Ask, State, message_bytes
from headrace.v1 import quota_service_pb2 as pb
from headrace.validation import MAX_NAME

MAX_ENTRIES = MAX_BYTES // message_bytes(("", "")) + 1


def fill_request(request: pb.LeaseRequest, asks: Iterable[Ask], states: Iterable[State]) -> pb.LeaseRequest:
    """Add asks and states to a request."""
    for ask in asks:
        entry = request.asks.add(tenant=ask.key[0], quota_class=ask.key[1], serial=ask.serial)
        _fill(entry.used, ask.used)
        entry.used.streams = ask.streams
        _fill(entry.must, ask.must)
        _fill(entry.extra, ask.extra)
    request.states.extend(_state(state) for state in states)
    return request


def fill_response(
    response: pb.LeaseResponse, grants: Iterable[Amounts], states: Iterable[State]
) -> pb.LeaseResponse:
    """Add slices and states to a response."""
    for granted in grants:
        _fill(response.grants.add(), granted)
    response.states.extend(_state(state) for state in states)
    return response


def asks_of(request: pb.LeaseRequest) -> list[Ask]:
    """Return the asks of a request. Raises InvalidRequest."""
    if len(request.asks) > MAX_ENTRIES:
        raise errors.InvalidRequest(f"asks has {len(request.asks)} entries, the most is {MAX_ENTRIES}")
    return [
        Ask(
            _key(ask.tenant, ask.quota_class),
            ask.serial,
            _amounts(ask.used),
            min(ask.used.streams, MANY),
            _amounts(ask.must, least=0.0),
            _amounts(ask.extra, least=0.0),
        )
        for ask in request.asks
    ]


def grants_of(response: pb.LeaseResponse, count: int) -> list[Amounts]:
    """Return the *count* slices of a response. Raises InvalidRequest."""
    if len(response.grants) != count or not 0 < response.share <= 1:
        raise errors.InvalidRequest("the keeper's response does not match the request")
    return [_amounts(grant, least=0.0, most=math.inf) for grant in response.grants]


def states_of(message: pb.LeaseRequest | pb.LeaseResponse) -> list[State]:
    """Return the states of a message. Raises InvalidRequest."""
    if len(message.states) > MAX_ENTRIES:
        raise errors.InvalidRequest(f"states has {len(message.states)} entries, the most is {MAX_ENTRIES}")
    for state in message.states:
        if any(math.isnan(value) for value in (state.requests, state.tokens, state.cost, state.spent)):
            raise errors.InvalidRequest("a state has an amount that is not a number")
    return [
        State(
            _key(state.tenant, state.quota_class),
            state.requests,
            state.tokens,
            state.cost,
            max(state.spent, 0.0),
            state.day,
        )
        for state in message.states
    ]


def _key(tenant: str, quota_class: str) -> Key:
    if max(len(tenant), len(quota_class)) > MAX_NAME + len(OTHERS):
        raise errors.InvalidRequest("a tenant or class has a name that is too long")
    return tenant, quota_class


def _state(state: State) -> pb.QuotaState:
    return pb.QuotaState(
        tenant=state.key[0],
        quota_class=state.key[1],
        requests=state.requests,
        tokens=state.tokens,
        cost=state.cost,
        spent=state.spent,
        day=state.day,
    )


def _fill(message: pb.QuotaAmounts, amounts: Amounts) -> None:
    message.requests, message.tokens, message.cost = amounts.requests, amounts.tokens, amounts.cost
    message.streams = max(amounts.streams, 0)


def _amounts(message: pb.QuotaAmounts, *, least: float = -1e18, most: float = 1e18) -> Amounts:
    values = (message.requests, message.tokens, message.cost)
    if not all(least <= value <= most for value in values):  # also of NaN
        raise errors.InvalidRequest("an amount is out of range")
    return Amounts(*values, streams=min(message.streams, MANY))
