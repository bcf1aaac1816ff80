"""An error is received as the same class with the same fields as it was sent."""

from __future__ import annotations

import pickle

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from headrace import errors


def leaves(cls: type[errors.HeadraceError]) -> list[type[errors.HeadraceError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in leaves(sub))]


ALL = [cls for cls in leaves(errors.HeadraceError) if cls is not errors.HeadraceError]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_round_trip(cls: type[errors.HeadraceError]) -> None:
    error = cls("what to do", retry_after=1.25, field="sampling.top_p", limit=64)

    again = errors.from_status(status_pb2.Status.FromString(errors.to_status(error).SerializeToString()))

    assert type(again) is cls
    assert (again.message, again.retry_after, again.field, again.fields) == (
        "what to do",
        1.25,
        "sampling.top_p",
        {"limit": "64"},
    )


@pytest.mark.parametrize("seconds", [-(2**62), -1, 2**62])
def test_an_invalid_delay_is_replaced_by_a_valid_one(seconds: int) -> None:
    """A router forwards the delay of a batcher."""
    status = errors.to_status(errors.Overloaded("full", retry_after=1.0))
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.seconds = seconds
    status.details[1].Pack(retry)

    again = errors.from_status(status)

    assert 0 <= (again.retry_after or 0) <= errors.MAX_RETRY_SECONDS
    assert errors.from_status(errors.to_status(again)).retry_after == again.retry_after


def test_reasons_are_unique() -> None:
    reasons = [cls.reason for cls in ALL]

    assert len(set(reasons)) == len(reasons)


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
def test_a_status_without_our_reason_becomes_the_nearest_class(
    code: grpc.StatusCode, message: str, expected: type[errors.HeadraceError]
) -> None:
    error = errors.from_status(status_pb2.Status(code=code.value[0], message=message))

    assert type(error) is expected
    assert error.message == message


def test_an_unknown_reason_of_a_newer_server_is_not_taken_for_a_proxy_error() -> None:
    status = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="no such thing")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NEW_REASON", domain="headrace"))

    error = errors.from_status(status)

    assert type(error) is errors.InternalError
    assert error.message == "no such thing"


def test_a_group_of_one_is_unwrapped() -> None:
    inner = errors.WorkerLost("gone")

    assert errors.unwrap(ExceptionGroup("a", [ExceptionGroup("b", [inner])])) is inner


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(errors.Overloaded("full", retry_after=2, limit=3)))

    assert (type(error), error.retry_after, error.fields) == (errors.Overloaded, 2, {"limit": "3"})


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ("Stream removed (Deadline Exceeded)", errors.DeadlineExceeded),
        ("Stream removed", errors.Unavailable),
        ("something else", errors.InternalError),
    ],
)
def test_a_stream_removed_by_grpc_is_classified_by_its_text(
    details: str, expected: type[errors.HeadraceError]
) -> None:
    nothing = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, nothing, nothing, details)

    assert type(errors.from_rpc_error(error)) is expected


def test_a_long_message_is_clipped_in_its_middle() -> None:
    error = errors.UnknownTier(f"tier is {'é' * 5000!r}; the tiers are small, large", field="tier")

    status = errors.to_status(error)

    assert len(status.message.encode()) <= errors.MAX_MESSAGE
    assert status.message.startswith("tier is 'é")
    assert status.message.endswith("the tiers are small, large")
    assert len(status.SerializeToString()) < 3 * errors.MAX_MESSAGE
