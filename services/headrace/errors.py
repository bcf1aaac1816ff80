"""Define every error that Headrace reports to a caller: one exception class per reason.

    HeadraceError
    ├── InvalidRequest          the request must change; a retry does not help
    │   ├── EmptyInput  InvalidText  InvalidSampling  ContextTooLong  AnswerCutOff
    │   └── UnknownTier  UnknownModel  HintsConflict
    ├── UnknownRequest  AlreadyRated
    ├── MessageTooLarge
    ├── CredentialsRequired  CredentialsInvalid  Forbidden
    ├── Overloaded              retry after the delay
    │   └── Shed  SlowReader  Busy  FeedbackQuota  TenantQuota
    ├── DeadlineExceeded
    │   └── DeadlineInQueue  DeadlineInDecode  TtftUnattainable  DeadlineUnattainable
    ├── RequestCancelled
    ├── Unavailable             may be temporary; retry before `accepted`
    │   └── NoWorkers  WorkerLost  BatcherLost  UpstreamLost  WorkerDraining  Draining  NotReady
    ├── SequenceFault           the engine failed on this request, not on others in the batch
    ├── PoisonRequest           the workers that took this request crashed, probably because of it
    ├── Unimplemented
    ├── Foreign                 not sent by a Headrace server, but by a proxy or another service
    │   └── Unauthenticated  PermissionDenied  Aborted  NotFound  AlreadyExists  FailedPrecondition
    │       OutOfRange  DataLoss
    └── InternalError           a fault of the server; its log has the details

`statuses` translates these exceptions to gRPC statuses and back. `reason` is for programs and never changes;
the message is for people.
"""

from __future__ import annotations

from typing import Any, ClassVar

import grpc

# The key in `fields` of the HTTP status of a response that is not gRPC; empty where gRPC does not report it.
HTTP_STATUS = "http_status"
# The key in `fields` of the optional feature that a tier's engines lack; those of another tier may have it.
FEATURE = "feature"
# The key in `fields` of an error whose message explains a connection that failed because of TLS, or without.
TLS_PROBLEM = "tls"


class HeadraceError(Exception):
    """The base class of all errors that Headrace reports to a caller.

    message       what happened and what to do, for people
    fields        facts for programs, sent as ErrorInfo.metadata
    retry_after   seconds to wait before a retry; None if a retry does not help
    field         the request field at fault, such as "sampling.top_p"; sent as BadRequest
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, retry_after: float | None = None, field: str = "", **fields: object
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.field = field
        self.fields = {name: str(value) for name, value in fields.items()}

    def add(self, advice: str) -> None:
        """Append *advice* to the message."""
        self.message = f"{self.message}; {advice}"
        self.args = (self.message,)

    def __reduce__(self) -> tuple[Any, ...]:
        return (rebuild, (type(self), self.message, self.retry_after, self.field, self.fields))


class InvalidRequest(HeadraceError):
    """A field is missing, out of range or in conflict with another one. Correct the request."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class EmptyInput(InvalidRequest):
    """The request has no input."""

    reason = "EMPTY_INPUT"


class InvalidText(InvalidRequest):
    """The request cannot be parsed: its text is not UTF-8, or it is not a message of the right type."""

    reason = "INVALID_UTF8"


class InvalidSampling(InvalidRequest):
    """A sampling field is out of range."""

    reason = "INVALID_SAMPLING"


class ContextTooLong(InvalidRequest):
    """Prompt and answer exceed the model's context length. Shorten the prompt or use another tier."""

    reason = "CONTEXT_TOO_LONG"


class AnswerCutOff(InvalidRequest):
    """The answer ended before it had its form. Raised by the client library, by no server."""

    reason = "ANSWER_CUT_OFF"


class UnknownTier(InvalidRequest):
    """There is no tier of that name."""

    reason = "UNKNOWN_TIER"


class UnknownModel(InvalidRequest):
    """No tier serves a model of that name."""

    reason = "UNKNOWN_MODEL"


class HintsConflict(InvalidRequest):
    """No tier satisfies all routing hints."""

    reason = "HINTS_CONFLICT"


class UnknownRequest(HeadraceError):
    """The router has no record of the request id: the request is too old, or another router served it."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_REQUEST"


class AlreadyRated(HeadraceError):
    """A different outcome was reported for this answer before. The first one is kept."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_RATED"


class MessageTooLarge(HeadraceError):
    """The request is larger than the server accepts. Send a smaller one."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"


class CredentialsRequired(HeadraceError):
    """The call has no credentials, and the server requires them. Send a token or use a client certificate."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "CREDENTIALS_REQUIRED"


class CredentialsInvalid(HeadraceError):
    """The credentials are unknown, expired or malformed. Obtain new ones."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "CREDENTIALS_INVALID"


class Forbidden(HeadraceError):
    """The caller is known but may not make this call. Ask the operator for the scope that is named."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "FORBIDDEN"


class Overloaded(HeadraceError):
    """The batcher's queue is full. Retry after the delay; nothing was generated."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class Shed(Overloaded):
    """The queued request was dropped in favour of a more urgent one. Retry after the delay."""

    reason = "SHED"


class SlowReader(Overloaded):
    """The caller read its answer too slowly, and the server discarded it."""

    reason = "SLOW_READER"


class Busy(Overloaded):
    """The server reached its limit of in-flight calls or request bytes. Retry after the delay."""

    reason = "SERVER_BUSY"


class FeedbackQuota(Overloaded):
    """The tenant reached its limit of reported outcomes. Report this one after the delay."""

    reason = "FEEDBACK_QUOTA"


class TenantQuota(Overloaded):
    """The tenant reached a limit; retry after the delay. Sent as QuotaFailure, with `subject` and `limit`."""

    reason = "TENANT_QUOTA"


class DeadlineExceeded(HeadraceError):
    """The deadline passed. Set a later deadline or request fewer tokens."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE"


class DeadlineInQueue(DeadlineExceeded):
    """The deadline passed before a worker accepted the request."""

    reason = "DEADLINE_QUEUE"


class DeadlineInDecode(DeadlineExceeded):
    """The deadline passed while the answer was being generated."""

    reason = "DEADLINE_DECODE"


class TtftUnattainable(DeadlineExceeded):
    """The first token cannot arrive before the deadline at the current rates; nothing was generated."""

    reason = "TTFT_UNATTAINABLE"


class DeadlineUnattainable(DeadlineExceeded):
    """The last token cannot arrive before the deadline at the current rates; nothing was generated."""

    reason = "DEADLINE_UNATTAINABLE"


class RequestCancelled(HeadraceError):
    """The caller cancelled the request."""

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class Unavailable(HeadraceError):
    """The server cannot be reached, or cannot serve at the moment."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class NoWorkers(Unavailable):
    """The tier has no healthy worker or batcher."""

    reason = "NO_WORKERS"


class WorkerLost(Unavailable):
    """The worker was lost with the request. The batcher may resume it on another worker."""

    reason = "WORKER_LOST"


class BatcherLost(Unavailable):
    """The batcher was lost with the request. The router may resume it on another batcher."""

    reason = "BATCHER_LOST"


class UpstreamLost(Unavailable):
    """A service outside of the mesh broke off its answer. It cannot be resumed; a new request starts over."""

    reason = "UPSTREAM_LOST"


class WorkerDraining(Unavailable):
    """The worker is stopping and returned the request."""

    reason = "WORKER_DRAINING"


class Draining(Unavailable):
    """The server is stopping and accepts no new requests. Retry on another server."""

    reason = "DRAINING"


class NotReady(Unavailable):
    """The server is still starting."""

    reason = "NOT_READY"


class SequenceFault(HeadraceError):
    """The engine failed on this request. Other requests in the batch are not affected."""

    code = grpc.StatusCode.INTERNAL
    reason = "SEQUENCE_FAULT"


class PoisonRequest(HeadraceError):
    """Each worker that accepted this request was lost before its first token. Do not retry."""

    reason = "POISON_REQUEST"


class Unimplemented(HeadraceError):
    """The server does not implement this RPC."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNIMPLEMENTED"


class Foreign(HeadraceError):
    """A status that no Headrace server sends: it comes from a proxy or another service."""

    code = grpc.StatusCode.UNKNOWN
    reason = "FOREIGN"


class Unauthenticated(Foreign):
    """A proxy or another service requires credentials, or rejected those that were sent."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(Foreign):
    """A proxy or another service does not allow this call."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class Aborted(Foreign):
    """A proxy or another service aborted the call. A retry may succeed."""

    code = grpc.StatusCode.ABORTED
    reason = "ABORTED"


class NotFound(Foreign):
    """A proxy or another service does not know the target of the call."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class AlreadyExists(Foreign):
    """A proxy or another service found that the target of the call already exists."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class FailedPrecondition(Foreign):
    """A proxy or another service is not in a state that allows the call."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class OutOfRange(Foreign):
    """A proxy or another service found a value out of range."""

    code = grpc.StatusCode.OUT_OF_RANGE
    reason = "OUT_OF_RANGE"


class DataLoss(Foreign):
    """A proxy or another service lost or corrupted data."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "DATA_LOSS"


class InternalError(HeadraceError):
    """A fault of the server, or of a proxy that gives no details."""

    reason = "INTERNAL"


def unwrap(error: BaseException) -> BaseException:
    """Return the only exception inside nested groups of one; return any other exception unchanged.

    A TaskGroup wraps the exceptions of its tasks, and callers need the original one.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def rebuild(
    cls: type[HeadraceError], message: str, retry_after: float | None, field: str, fields: dict[str, str]
) -> HeadraceError:
    """Return an error of class *cls* from its parts, for `pickle` and `statuses`."""
    error = cls(message, retry_after=retry_after, field=field)
    error.fields = fields
    return error
