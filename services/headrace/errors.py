"""What may go wrong, as exceptions inside and gRPC statuses with google.rpc details at the edge.

    HeadraceError
    ├── InvalidRequest          the caller's to mend; retrying does not help
    │   ├── EmptyInput  InvalidText  InvalidSampling  ContextTooLong
    │   └── UnknownTier  UnknownModel  HintsConflict
    ├── UnknownRequest  AlreadyRated
    ├── MessageTooLarge
    ├── Overloaded              retry after the delay
    │   └── Shed  SlowReader  Busy  FeedbackQuota
    ├── DeadlineExceeded
    │   └── DeadlineInQueue  DeadlineInDecode  TtftUnattainable  DeadlineUnattainable
    ├── RequestCancelled
    ├── Unavailable             may pass; retry before `accepted`
    │   └── NoWorkers  WorkerLost  BatcherLost  WorkerDraining  Draining  NotReady
    ├── SequenceFault           this request failed in the engine, its neighbours did not
    ├── PoisonRequest           the workers that took this request in died of it, it seems
    ├── Unimplemented
    ├── Foreign                 no server of ours sends these: a proxy, or another service, answered
    │   └── Unauthenticated  PermissionDenied  Aborted  NotFound  AlreadyExists  FailedPrecondition
    │       OutOfRange  DataLoss
    └── InternalError           a fault of the server; its log has it in full

`to_status` turns an exception into a google.rpc.Status; `from_status` and `from_rpc_error` turn it
back into the same class. `reason` is for programs and never changes; the message is for people.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import grpc
from google.protobuf import duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "headrace"
DETAILS_KEY = "grpc-status-details-bin"  # where gRPC carries a google.rpc.Status
# Bytes of a message that cross the wire; many a message quotes what the caller sent. A status travels in
# headers, of which peers take 8 KiB together, and there a message stands up to three times, escaped.
MAX_MESSAGE = 1000
MAX_QUOTED = 64  # characters that a message quotes of one text that the caller sent
MAX_RETRY_SECONDS = 1e6
MAX_FIELD = 200  # bytes of one of the fields, for the same reason


class HeadraceError(Exception):
    """Anything that Headrace reports to a caller.

    message       what happened and what to do, for people
    fields        facts for programs, carried as ErrorInfo.metadata
    retry_after   seconds after which trying again makes sense; None if it never does
    field         the request's field at fault, such as "sampling.top_p"; carried as BadRequest
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
        """Add what else a person should know to the message."""
        self.message = f"{self.message}; {advice}"
        self.args = (self.message,)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.retry_after, self.field, self.fields))


class InvalidRequest(HeadraceError):
    """A field is missing, out of range or at odds with another. Mend the request."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class EmptyInput(InvalidRequest):
    """There is nothing to answer."""

    reason = "EMPTY_INPUT"


class InvalidText(InvalidRequest):
    """The request's bytes cannot be read: text that is not UTF-8, or no message of this kind."""

    reason = "INVALID_UTF8"


class InvalidSampling(InvalidRequest):
    """A sampling field is out of its range."""

    reason = "INVALID_SAMPLING"


class ContextTooLong(InvalidRequest):
    """Prompt and answer do not fit the model's context. Shorten the prompt or pick another tier."""

    reason = "CONTEXT_TOO_LONG"


class UnknownTier(InvalidRequest):
    """No tier of that name."""

    reason = "UNKNOWN_TIER"


class UnknownModel(InvalidRequest):
    """No tier serves a model of that name."""

    reason = "UNKNOWN_MODEL"


class HintsConflict(InvalidRequest):
    """The routing hints leave no tier."""

    reason = "HINTS_CONFLICT"


class UnknownRequest(HeadraceError):
    """The router does not remember a request of that id; it may be too old, or another router's."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_REQUEST"


class AlreadyRated(HeadraceError):
    """This answer has another outcome already, and the first one counts."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_RATED"


class MessageTooLarge(HeadraceError):
    """The request is larger than a server takes. Send less."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"


class Overloaded(HeadraceError):
    """The batcher's queue is full. Retry after the delay; nothing was generated."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class Shed(Overloaded):
    """The request waited, and gave its place to one that matters more. Retry after the delay."""

    reason = "SHED"


class SlowReader(Overloaded):
    """The caller read its answer too slowly for the server to keep it."""

    reason = "SLOW_READER"


class Busy(Overloaded):
    """The server has as many calls, or bytes of requests, in hand as it takes. Retry after the delay."""

    reason = "SERVER_BUSY"


class FeedbackQuota(Overloaded):
    """The tenant has reported more outcomes than one may. Report this one after the delay."""

    reason = "FEEDBACK_QUOTA"


class DeadlineExceeded(HeadraceError):
    """The deadline passed. Give more time, or ask for less."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE"


class DeadlineInQueue(DeadlineExceeded):
    """The deadline passed before a worker took the request."""

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
    """The caller left."""

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class Unavailable(HeadraceError):
    """The server cannot be reached or cannot serve now."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class NoWorkers(Unavailable):
    """Nothing healthy stands behind the tier."""

    reason = "NO_WORKERS"


class WorkerLost(Unavailable):
    """The worker vanished with the request. The batcher may carry on elsewhere."""

    reason = "WORKER_LOST"


class BatcherLost(Unavailable):
    """The batcher vanished with the request. The router may carry on elsewhere."""

    reason = "BATCHER_LOST"


class WorkerDraining(Unavailable):
    """The worker is stopping and handed the request back."""

    reason = "WORKER_DRAINING"


class Draining(Unavailable):
    """The server is stopping and takes no new requests. Another one will."""

    reason = "DRAINING"


class NotReady(Unavailable):
    """The server is still starting."""

    reason = "NOT_READY"


class SequenceFault(HeadraceError):
    """The engine failed on this request; others in the batch are unharmed."""

    code = grpc.StatusCode.INTERNAL
    reason = "SEQUENCE_FAULT"


class PoisonRequest(HeadraceError):
    """Each worker that took this request in was lost before its first token. Nobody should try again."""

    reason = "POISON_REQUEST"


class Unimplemented(HeadraceError):
    """The server does not have this RPC."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNIMPLEMENTED"


class Foreign(HeadraceError):
    """A status that no Headrace server sends: a proxy on the way, or another service, answered."""

    code = grpc.StatusCode.UNKNOWN
    reason = "FOREIGN"


class Unauthenticated(Foreign):
    """Something on the way asks for credentials, or does not accept those that were sent."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(Foreign):
    """Something on the way does not allow this caller this call."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class Aborted(Foreign):
    """Something on the way ended the call. It may work when tried again."""

    code = grpc.StatusCode.ABORTED
    reason = "ABORTED"


class NotFound(Foreign):
    """Something on the way does not know what the call names."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class AlreadyExists(Foreign):
    """Something on the way found that what the call would make is there."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class FailedPrecondition(Foreign):
    """Something on the way is not in a state for the call."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class OutOfRange(Foreign):
    """Something on the way found a value of the call out of range."""

    code = grpc.StatusCode.OUT_OF_RANGE
    reason = "OUT_OF_RANGE"


class DataLoss(Foreign):
    """Something on the way lost or garbled data."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "DATA_LOSS"


class InternalError(HeadraceError):
    """A fault of the server, or of something on the way that does not say more."""

    reason = "INTERNAL"


def _leaves(cls: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _leaves(sub))]


_BY_REASON: dict[str, type[HeadraceError]] = {
    cls.reason: cls for cls in _leaves(HeadraceError) if cls is not HeadraceError
}
# For statuses without our ErrorInfo: gRPC's own, a proxy's.
_BY_CODE: dict[grpc.StatusCode, type[HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    **{cls.code: cls for cls in Foreign.__subclasses__()},
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_TOO_LARGE = re.compile(r"message larger than max|metadata size exceeds", re.IGNORECASE)
# gRPC's words for an answer in HTTP: of a proxy that cannot reach what is behind it, or of a web server.
_IN_HTTP = re.compile(
    r"http2 header with status: (?P<new>\d+)|http1\.x server(?: \(HTTP status (?P<old>\d+))?|"
    r"Data frame with END_STREAM flag"
)
HTTP_STATUS = "http_status"  # of `fields`: such an answer's status, empty where gRPC does not pass it on


def quoted(text: str) -> str:
    """What a caller sent, as a message may quote it: on one line, its first 64 characters and its length."""
    if len(text) <= MAX_QUOTED:
        return repr(text)
    return f"{text[:MAX_QUOTED]!r}... ({len(text)} characters)"


def unwrap(error: BaseException) -> BaseException:
    """The one exception inside a group of one, however deep; anything else as it is.

    A TaskGroup wraps what its tasks raise, and a group says nothing to a caller.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def to_status(error: HeadraceError) -> status_pb2.Status:
    """The error with its details: ErrorInfo always, RetryInfo and BadRequest where they apply."""
    status = status_pb2.Status(code=error.code.value[0], message=_clipped(error.message, MAX_MESSAGE))

    def attach(detail: message.Message) -> None:
        status.details.add().Pack(detail)

    fields = {name: _clipped(value, MAX_FIELD) for name, value in error.fields.items()}
    attach(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=fields))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        attach(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.field, description=status.message, reason=error.reason)
        attach(bad)
    return status


def _clipped(text: str, limit: int) -> str:
    """The beginning and the end of a long message: what is quoted stands in its middle."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return text
    half = limit // 2 - 10
    return f"{data[:half].decode(errors='ignore')} [...] {data[-half:].decode(errors='ignore')}"


def from_status(status: status_pb2.Status) -> HeadraceError:
    """The exception that the status was made from; the nearest one for statuses of other making."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    retry_after = None
    field = ""
    for detail in status.details:
        if detail.Unpack(info):
            continue
        if detail.Unpack(retry):
            # A peer may say anything, and what it says must fit a Duration again.
            retry_after = min(max(retry.retry_delay.ToNanoseconds() / 1e9, 0.0), MAX_RETRY_SECONDS)
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    cls = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    if cls is None:
        cls = MessageTooLarge if _TOO_LARGE.search(status.message) else _BY_CODE.get(code, InternalError)
        if info.domain == DOMAIN and issubclass(cls, Foreign):
            cls = InternalError  # a newer server's, for a reason that is not known here
    return _rebuild(cls, status.message, retry_after, field, dict(info.metadata))


def from_rpc_error(error: grpc.RpcError) -> HeadraceError:
    """What a failed call means: our own exception where the server sent one."""
    assert isinstance(error, grpc.aio.AioRpcError), f"not an asyncio call's error: {error!r}"
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value if isinstance(value, bytes) else value.encode())
            except message.DecodeError:
                break
            return from_status(status)
    code = error.code() or grpc.StatusCode.UNKNOWN
    details = error.details() or code_pb2.Code.Name(code.value[0])
    if code is grpc.StatusCode.UNKNOWN and details.startswith("Stream removed"):
        # gRPC's word for a call whose transport went away under it; what it knows stands in the text.
        late = "deadline exceeded" in details.lower()
        code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.UNAVAILABLE
    answered = _IN_HTTP.search(details)
    if answered is None:
        return from_status(status_pb2.Status(code=code.value[0], message=details))
    number = answered["new"] or answered["old"] or ""
    said = f"HTTP status {number}" if number else "HTTP"
    translated = from_status(
        status_pb2.Status(
            code=code.value[0],
            message=f"a proxy or web server, and no gRPC server, answered with {said} ({details})",
        )
    )
    translated.fields[HTTP_STATUS] = number
    return translated


def _rebuild(
    cls: type[HeadraceError], message: str, retry_after: float | None, field: str, fields: dict[str, str]
) -> HeadraceError:
    error = cls(message, retry_after=retry_after, field=field)
    error.fields = fields
    return error
