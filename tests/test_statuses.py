"""An error is sent as a status and received as the same class with the same fields."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from headrace import errors, statuses
from tests.test_errors import ALL


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_round_trip(cls: type[errors.HeadraceError]) -> None:
    error = cls("what to do", retry_after=1.25, field="sampling.top_p", limit=64)

    again = statuses.from_status(status_pb2.Status.FromString(statuses.to_status(error).SerializeToString()))

    assert type(again) is cls
    assert (again.message, again.retry_after, again.field, again.fields) == (
        "what to do",
        1.25,
        "sampling.top_p",
        {"limit": "64"},
    )


def test_a_tenant_over_its_limit_receives_a_quota_failure_that_any_client_can_read() -> None:
    error = errors.TenantQuota("too many", retry_after=2.0, subject="tenant:acme", limit="tokens_per_minute")

    details = statuses.to_status(error).details
    quota = error_details_pb2.QuotaFailure()

    assert any(detail.Unpack(quota) for detail in details)
    assert [(each.subject, each.description, each.quota_id) for each in quota.violations] == [
        ("tenant:acme", "too many", "tokens_per_minute")
    ]
    assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details)


def test_a_quota_failure_of_a_proxy_is_read_without_our_error_info() -> None:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="over quota")
    quota = error_details_pb2.QuotaFailure()
    quota.violations.add(subject="project:x", quota_id="per day")
    status.details.add().Pack(quota)

    error = statuses.from_status(status)

    assert type(error) is errors.TenantQuota
    assert error.fields == {"subject": "project:x", "limit": "per day"}


@pytest.mark.parametrize("seconds", [-(2**62), -1, 2**62])
def test_an_invalid_delay_is_forwarded_as_a_valid_one(seconds: int) -> None:
    """A router forwards the delay of a batcher."""
    status = statuses.to_status(errors.Overloaded("full", retry_after=1.0))
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.seconds = seconds
    status.details[1].Pack(retry)

    again = statuses.from_status(status)

    assert 0 <= (again.retry_after or 0) <= statuses.MAX_RETRY_SECONDS
    assert statuses.from_status(statuses.to_status(again)).retry_after == again.retry_after


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "connection refused", errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.DeadlineExceeded),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "Received message larger than max (9 vs. 4)",
            errors.MessageTooLarge,
        ),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", errors.Overloaded),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", errors.Unimplemented),
        (grpc.StatusCode.UNKNOWN, "?", errors.InternalError),
    ],
)
def test_a_status_of_another_server_becomes_the_closest_class(
    code: grpc.StatusCode, message: str, expected: type[errors.HeadraceError]
) -> None:
    error = statuses.from_status(status_pb2.Status(code=code.value[0], message=message))

    assert type(error) is expected
    assert error.message == message


def test_an_unknown_reason_of_a_newer_server_is_not_foreign() -> None:
    status = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="no such thing")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NEW_REASON", domain="headrace"))

    error = statuses.from_status(status)

    assert type(error) is errors.InternalError
    assert error.message == "no such thing"


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ("Stream removed (Deadline Exceeded)", errors.DeadlineExceeded),
        ("Stream removed", errors.Unavailable),
        ("something else", errors.InternalError),
    ],
)
def test_the_text_of_a_removed_stream_decides_its_class(
    details: str, expected: type[errors.HeadraceError]
) -> None:
    nothing = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, nothing, nothing, details)

    assert type(statuses.from_rpc_error(error)) is expected


def test_a_long_message_is_clipped_in_its_middle() -> None:
    error = errors.UnknownTier(f"tier is {'é' * 5000!r}; the tiers are small, large", field="tier")

    status = statuses.to_status(error)

    assert len(status.message.encode()) <= statuses.MAX_MESSAGE
    assert status.message.startswith("tier is 'é")
    assert status.message.endswith("the tiers are small, large")
    assert len(status.SerializeToString()) < 3 * statuses.MAX_MESSAGE
