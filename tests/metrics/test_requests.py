"""The end of a request is recorded in the same words, whoever answers it."""

from __future__ import annotations

import math
from collections.abc import Callable

import grpc
import pytest

from headrace import attributes, errors
from headrace.metrics.catalogue import INTER_TOKEN_LATENCY
from headrace.metrics.requests import CANCELLED, End, Timing, record
from headrace.metrics.tenants import TenantNames
from headrace.metrics.words import Outcome, outcome_of


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.RequestCancelled, "cancelled"),
        (errors.DeadlineInQueue, "deadline"),
        (errors.DeadlineInDecode, "deadline"),
        (errors.TtftUnattainable, "refused"),
        (errors.Shed, "refused"),
        (errors.Overloaded, "refused"),
        (errors.TenantQuota, "refused"),
        (errors.Draining, "refused"),
        (errors.CredentialsInvalid, "refused"),
        (errors.ContextTooLong, "invalid"),
        (errors.UnknownTier, "invalid"),
        (errors.SlowReader, "failed"),
        (errors.NoWorkers, "failed"),
        (errors.WorkerLost, "failed"),
        (errors.InternalError, "failed"),
    ],
)
def test_every_error_has_one_outcome(kind: type[errors.HeadraceError], expected: Outcome) -> None:
    assert outcome_of(kind) == expected
    assert End.by(kind("x")) == End(expected, kind.reason)


def test_an_error_of_grpc_means_that_the_caller_has_left() -> None:
    assert End.by(grpc.aio.AbortError()) is CANCELLED
    assert End.by(ExceptionGroup("", [errors.Shed("x")])) == End("refused", "SHED")
    assert End.by(ZeroDivisionError()) == End("failed", "INTERNAL")


def test_a_request_is_recorded_once_in_each_metric(count: Callable[..., float]) -> None:
    timing = Timing(arrived=10.0)
    timing.add(1, 10.5)
    timing.add(3, 11.5)
    timing.add(1, 11.6)
    names = ("requests", "requests.refused", "tokens.delivered", "inter_token_latency")
    conventional = ("request.duration", "time_to_first_token", "time_per_output_token")

    record(End.complete("stop"), timing, 12.0, tier="recorded", model="m", chat=True)
    record(End("refused", "SHED"), Timing(1.0), 2.0, tier="recorded", model="", chat=False)

    assert [count(f"headrace.{name}", tier="recorded") for name in names] == [2, 1, 5, 2]
    assert [count(f"gen_ai.server.{name}", tier="recorded") for name in conventional] == [2, 1, 1]
    assert count("headrace.requests", tier="recorded", outcome="ok", finish="stop", error="") == 1
    assert count("gen_ai.server.request.duration", tier="recorded", operation="text_completion") == 1


def test_the_latency_between_tokens_is_that_of_each_arrival(count: Callable[..., float]) -> None:
    timing = Timing(arrived=0.0)
    for now in (1.0, 1.004, 1.008, 1.108):
        timing.add(2, now)

    record(End.complete("stop"), timing, 1.2, tier="between", model="m", chat=True)

    (series,) = (one for labels, one in INTER_TOKEN_LATENCY if labels[attributes.TIER] == "between")
    between = dict(zip((*INTER_TOKEN_LATENCY.bounds, math.inf), series.counts, strict=True))
    assert {bound: number for bound, number in between.items() if number} == {0.005: 2, 0.15: 1}
    assert series.total == pytest.approx(0.108)


def test_a_resumed_answer_has_no_time_to_its_first_token(count: Callable[..., float]) -> None:
    timing = Timing(arrived=1.0)
    timing.add(1, 2.0)

    record(End.complete("length"), timing, 3.0, tier="resumed", model="m", chat=True, resumed=True)

    assert count("gen_ai.server.time_to_first_token", tier="resumed") == 0
    assert count("gen_ai.server.time_per_output_token", tier="resumed") == 0, "there was one token"


def test_the_first_tenants_have_names_in_metrics_and_the_others_are_one() -> None:
    tenants = TenantNames(2)
    called = [tenants.name(name) for name in ("a", "", "b", "c", "a", "d")]

    assert called == ["a", "", "b", "other", "a", "other"]
    assert len(TenantNames(1).name("x" * 1000)) < 100
    assert TenantNames(0).name("a") == "other"
