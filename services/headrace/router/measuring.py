"""Record the metrics of the router's requests: how they ended, what they used, and for whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

from headrace import errors
from headrace.metrics import catalogue
from headrace.metrics.instruments import Counter
from headrace.metrics.rare import create_for_router
from headrace.metrics.requests import CANCELLED, End, Timing, record
from headrace.metrics.tenants import TenantNames
from headrace.router.answering.journey import Journey
from headrace.router.optional import optional
from headrace.router.permissions import tenant_of
from headrace.router.state.bills import Bill, Charge
from headrace.runtime.security.identity import Identity
from headrace.v1 import generation_pb2 as pb


@dataclass
class Measured:
    """One request that is measured.

    timing    of its answer, which the journey completes
    journey   once it has begun
    """

    timing: Timing
    journey: Journey | None = None


class Measuring:
    """Records the requests of one router.

    tenants    most tenants that metrics name
    class_of   returns the class of a tenant from its name and the class that its credentials have; None:
               there are no classes
    """

    def __init__(
        self, tiers: Iterable[str], *, tenants: int, class_of: Callable[[str, str], str] | None = None
    ) -> None:
        create_for_router(tiers)
        self._tenants = TenantNames(tenants)
        self._class_of = class_of

    @contextmanager
    def request(
        self, request: pb.GenerateRequest, identity: Identity, seconds: float | None
    ) -> Generator[Measured, None, None]:
        """Record a request at the end of the block, however it ends.

        seconds   until its deadline
        """
        measured, end = Measured(Timing(time.monotonic())), CANCELLED
        try:
            yield measured
            end = End.complete(measured.journey.finish if measured.journey is not None else "")
        except Exception as error:
            end = End.by(error)
            raise
        finally:
            now = time.monotonic()
            lasted = now - measured.timing.arrived
            # gRPC cancels a call for its deadline, often before the router has noticed it.
            if end is CANCELLED and seconds is not None and lasted >= seconds:
                end = End("deadline", errors.DeadlineExceeded.reason)
            with optional("metrics"):
                self._record(measured, end, now, request, identity)
            if measured.journey is not None:
                with optional("watching decisions"):
                    measured.journey.ended(end.outcome, lasted)

    def _record(
        self,
        measured: Measured,
        end: End,
        now: float,
        request: pb.GenerateRequest,
        identity: Identity,
    ) -> None:
        journey = measured.journey
        tenant = tenant_of(request, identity)
        tenant_class = "" if self._class_of is None else self._class_of(tenant, identity.quota)
        record(
            end,
            measured.timing,
            now,
            tier=journey.tier if journey is not None else "",
            model=journey.model if journey is not None else "",
            chat=request.HasField("chat"),
            resumed=bool(request.resume.token_ids),
            tenant_class=tenant_class,
        )
        labels = {"tenant": self._tenants.name(tenant), "tenant_class": tenant_class}
        catalogue.TENANT_REQUESTS.of(**labels, outcome=end.outcome).add()
        if journey is not None:
            _record_bill(journey.bill, labels)


def _record_bill(bill: Bill, labels: dict[str, str]) -> None:
    total = Charge()
    for tier, charge in bill.charges:
        total.add(charge)
        _add_tokens(catalogue.BILLED_TOKENS, charge, tier=tier)
        if (cost := bill.cost_of(tier)) is not None:
            catalogue.COST.of(tier=tier).add(cost)
    _add_tokens(catalogue.TENANT_TOKENS, total, **labels)
    if bill.cost is not None:
        catalogue.TENANT_COST.of(**labels).add(bill.cost)
    if bill.largest_tier_cost is not None:
        catalogue.LARGEST_TIER_COST.of().add(bill.largest_tier_cost)


def _add_tokens(metric: Counter, charge: Charge, **labels: str) -> None:
    for kind, tokens in (
        ("prompt", charge.prompt_tokens),
        ("completion", charge.completion_tokens),
        ("wasted", charge.wasted_tokens),
    ):
        if tokens:
            metric.of(**labels, kind=kind).add(tokens)
