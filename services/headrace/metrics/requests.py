"""Record the end of a request, in the same words for all services that answer requests."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from headrace import errors
from headrace.metrics import catalogue
from headrace.metrics.instruments import HistogramSeries
from headrace.metrics.words import OTHER, PROVIDER, Outcome, outcome_of
from headrace.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class End:
    """How a request ended.

    outcome   see `words.Outcome`
    error     the reason of its error; empty without one
    finish    why its answer is complete: "stop", "length" or "stop_sequence"; empty if it is not
    """

    outcome: Outcome = "cancelled"
    error: str = errors.RequestCancelled.reason
    finish: str = ""

    @staticmethod
    def by(error: Exception) -> End:
        """Return the end by an error; gRPC's own means that the caller has left."""
        inner = errors.unwrap(error)
        if isinstance(inner, errors.HeadraceError):
            return End(outcome_of(type(inner)), inner.reason)
        if isinstance(inner, grpc.aio.BaseError) and not isinstance(inner, grpc.aio.UsageError):
            return CANCELLED
        return End("failed", errors.InternalError.reason)

    @staticmethod
    def complete(finish: str) -> End:
        """Return the end of a complete answer."""
        return End("ok", "", finish)


CANCELLED = End()


@dataclass(slots=True)
class Timing:
    """When a request reached each stage, in seconds of time.monotonic(); None if it did not.

    first, last   the first and the latest token
    together      tokens that arrived together with the first
    tokens        all new tokens; those of a resumed answer are not among them
    gaps          the times between tokens
    """

    arrived: float
    first: float | None = None
    last: float | None = None
    together: int = 0
    tokens: int = 0
    gaps: HistogramSeries | None = None

    def add(self, tokens: int, now: float) -> None:
        """Add tokens that arrived."""
        if self.last is None:
            self.first, self.together = now, tokens
        else:
            if self.gaps is None:
                self.gaps = HistogramSeries(catalogue.INTER_TOKEN_LATENCY.bounds)
            self.gaps.record(now - self.last)
        self.last = now
        self.tokens += tokens


def record(
    end: End,
    timing: Timing,
    now: float,
    *,
    tier: str,
    model: str,
    chat: bool,
    resumed: bool = False,
    tenant_class: str = "",
) -> None:
    """Record one request.

    tier, model    that answered; empty if none did
    chat           whether it is a chat, or a text to complete
    resumed        whether it resumes an answer, whose first token came earlier
    tenant_class   of the caller
    """
    operation = operation_of(chat=chat)
    catalogue.REQUESTS.of(
        tier=tier, model=model, outcome=end.outcome, error=end.error, finish=end.finish
    ).add()
    catalogue.REQUEST_DURATION.of(
        operation=operation, provider=PROVIDER, model=model, tier=tier, error=end.error
    ).record(now - timing.arrived)
    if end.outcome == "refused":
        catalogue.REFUSED.of(tier=tier, error=end.error, tenant_class=tenant_class).add()
    if timing.first is None or timing.last is None:
        return
    catalogue.DELIVERED_TOKENS.of(tier=tier, model=model).add(timing.tokens)
    labels = {"operation": operation, "provider": PROVIDER, "model": model, "tier": tier}
    if not resumed:
        catalogue.TIME_TO_FIRST_TOKEN.of(**labels).record(timing.first - timing.arrived)
    if timing.gaps is not None:
        catalogue.INTER_TOKEN_LATENCY.of(tier=tier, model=model).merge(timing.gaps)
    if (later := timing.tokens - timing.together) > 0:
        catalogue.TIME_PER_OUTPUT_TOKEN.of(**labels).record((timing.last - timing.first) / later)


def record_refusal(error: errors.HeadraceError) -> None:
    """Record a request that was refused before it was read; any other error is ignored.

    Its tenant is not known yet, nor is its class: credentials may name any, and any number of them.
    """
    if outcome_of(type(error)) == "refused":
        catalogue.REFUSED.of(tier="", error=error.reason, tenant_class="").add()


def finish_name(reason: pb.FinishReason.ValueType) -> str:
    """Return the value of headrace.finish_reason, such as "length"; "other" for an unknown one."""
    return _FINISH_NAMES.get(reason, OTHER)


_FINISH_NAMES = {
    reason: name.removeprefix("FINISH_REASON_").lower() for name, reason in pb.FinishReason.items()
}


def operation_of(*, chat: bool) -> str:
    """Return the value of gen_ai.operation.name."""
    return "chat" if chat else "text_completion"
