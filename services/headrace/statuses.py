"""Translate exceptions of `headrace.errors` to gRPC statuses and back.

`to_status` turns an exception into a google.rpc.Status with ErrorInfo. `from_status` and `from_rpc_error`
turn a status back into an exception of the same class.
"""

from __future__ import annotations

import re

import grpc
from google.protobuf import duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from headrace import errors
from headrace.quoting import clipped
from headrace.tls.hints import hint

DOMAIN = "headrace"
# By the RPC conventions, these are errors of the server. Others are the caller's, such as INVALID_ARGUMENT or
# CANCELLED, or normal operation, such as RESOURCE_EXHAUSTED: they leave the status of a server's span unset.
SERVER_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

# Details of grpc.aio's own status, INTERNAL, if a stream ends during a write; the server's status is lost.
BROKE_IN_WRITE = "Internal error from Core"
DETAILS_KEY = "grpc-status-details-bin"  # where gRPC carries a google.rpc.Status
# Most bytes of a message on the wire. A status travels in headers, which peers limit to 8 KiB in all, and its
# message is there up to three times, escaped.
MAX_MESSAGE = 1000
MAX_FIELD = 200  # most bytes of one of the fields, for the same reason
MAX_RETRY_SECONDS = 1e6


def _leaves(cls: type[errors.HeadraceError]) -> list[type[errors.HeadraceError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _leaves(sub))]


_BY_REASON: dict[str, type[errors.HeadraceError]] = {
    cls.reason: cls for cls in _leaves(errors.HeadraceError) if cls is not errors.HeadraceError
}
# For statuses without our ErrorInfo: from gRPC itself or from a proxy.
_BY_CODE: dict[grpc.StatusCode, type[errors.HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    **{cls.code: cls for cls in errors.Foreign.__subclasses__()},
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_TOO_LARGE = re.compile(r"message larger than max|metadata size exceeds", re.IGNORECASE)
# How gRPC describes a plain HTTP response, which comes from a proxy without a backend or from a web server.
_HTTP_RESPONSE = re.compile(
    r"http2 header with status: (?P<new>\d+)|http1\.x server(?: \(HTTP status (?P<old>\d+))?|"
    r"Data frame with END_STREAM flag"
)


def to_status(error: errors.HeadraceError) -> status_pb2.Status:
    """Return *error* as a status with ErrorInfo, and the other details of google.rpc where they apply."""
    status = status_pb2.Status(code=error.code.value[0], message=clipped(error.message, MAX_MESSAGE))

    def attach(detail: message.Message) -> None:
        status.details.add().Pack(detail)

    fields = {name: clipped(value, MAX_FIELD) for name, value in error.fields.items()}
    attach(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=fields))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        attach(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.field, description=status.message, reason=error.reason)
        attach(bad)
    if isinstance(error, errors.TenantQuota):
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(
            subject=fields.get("subject", ""), description=status.message, quota_id=fields.get("limit", "")
        )
        attach(quota)
    return status


def from_status(status: status_pb2.Status) -> errors.HeadraceError:
    """Return the exception that *status* was made from, or one of the closest class."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    quota = error_details_pb2.QuotaFailure()
    retry_after = None
    field = ""
    for detail in status.details:
        if detail.Unpack(info):
            continue
        if detail.Unpack(retry):
            # A peer may send any value, and the result must fit into a Duration again.
            retry_after = min(max(retry.retry_delay.ToNanoseconds() / 1e9, 0.0), MAX_RETRY_SECONDS)
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        else:
            detail.Unpack(quota)
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    cls = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    fields = dict(info.metadata)
    if cls is None and quota.violations and code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # of a proxy
        cls = errors.TenantQuota
        fields = {"subject": quota.violations[0].subject, "limit": quota.violations[0].quota_id}
    if cls is None:
        cls = (
            errors.MessageTooLarge
            if _TOO_LARGE.search(status.message)
            else _BY_CODE.get(code, errors.InternalError)
        )
        if info.domain == DOMAIN and issubclass(cls, errors.Foreign):
            cls = errors.InternalError  # from a newer server, with a reason that this version does not know
    return errors.rebuild(cls, status.message, retry_after, field, fields)


def from_rpc_error(error: grpc.RpcError) -> errors.HeadraceError:
    """Return the exception for a failed call: the one that the server raised if it is a Headrace server."""
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
    if details == BROKE_IN_WRITE:
        return errors.Unavailable("the stream to the server broke while a message was sent")
    if code is grpc.StatusCode.UNKNOWN and details.startswith("Stream removed"):
        # gRPC reports a lost transport in this form; only the text contains the cause.
        late = "deadline exceeded" in details.lower()
        code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.UNAVAILABLE and (advice := hint(details)):
        translated = from_status(status_pb2.Status(code=code.value[0], message=f"{advice} ({details})"))
        translated.fields[errors.TLS_PROBLEM] = advice
        return translated
    found = _HTTP_RESPONSE.search(details)
    if found is None:
        return from_status(status_pb2.Status(code=code.value[0], message=details))
    number = found["new"] or found["old"] or ""
    what = f"HTTP status {number}" if number else "HTTP"
    translated = from_status(
        status_pb2.Status(
            code=code.value[0],
            message=f"a proxy or web server answered, not a gRPC server: {what} ({details})",
        )
    )
    translated.fields[errors.HTTP_STATUS] = number
    return translated
