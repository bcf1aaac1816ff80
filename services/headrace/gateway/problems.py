"""Describe what a caller did wrong, or what the mesh could not do, as an HTTP status and an OpenAI error.

`problem_of` translates each error of `headrace.errors`; the table at the end has a row for each class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from headrace import errors

# OpenAI's SDKs choose the class of an exception by the HTTP status. `type` is for people and other clients.
ErrorType: TypeAlias = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "insufficient_quota",
    "timeout_error",
    "overloaded_error",
    "server_error",
]

CLIENT_LEFT: Final = 499  # only in metrics and spans: nobody receives it
_UNAUTHORIZED: Final = 401
NO_PARAMS: Final[Mapping[str, str]] = {}


class Problem(Exception):
    """An error that ends an HTTP request.

    status       of the HTTP response
    type, code   as in OpenAI's error object: a class of errors, and a reason for programs
    param        the field of the request at fault
    headers      additional headers of the response, such as Retry-After
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """Return the error object of OpenAI's API."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def retry_headers(seconds: float) -> dict[str, str]:
    """Return the headers that ask for a retry after *seconds*.

    Retry-After has whole seconds, at least 1; OpenAI's SDKs prefer the exact time of retry-after-ms.
    """
    return {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }


def problem_of(error: errors.HeadraceError, params: Mapping[str, str] = NO_PARAMS) -> Problem:
    """Return the problem that reports an error of the mesh.

    params   the names of the HTTP request for fields of the contract, such as {"sampling.top_p": "top_p"}. A
             name also stands for what it contains: "chat.messages" for "chat.messages[3].content"
    """
    row = _ROWS[next(kind for kind in type(error).__mro__ if kind in _ROWS)]
    message, param = error.message, None
    if error.field:
        param = translated(error.field, params)
        message = message.replace(error.field, param or error.field)
        message = _OTHER_FIELD.sub(lambda found: translated(found[0], params) or found[0], message)
    headers = {"www-authenticate": "Bearer"} if row.status == _UNAUTHORIZED else {}
    wait = error.retry_after if error.retry_after is not None else row.retry_after
    return Problem(
        row.status,
        message,
        type=row.type,
        code=row.code or error.reason.lower(),
        param=param,
        headers=headers if wait is None else retry_headers(wait),
    )


def translated(field: str, params: Mapping[str, str]) -> str | None:
    """Return the name in the HTTP request of a field of the contract; None if it is not in *params*.

    "chat.tools[]" in *params* stands for each element, and [] in its name for its place. "chat.tools[3]"
    takes precedence.
    """
    end = len(field)
    while end > 0:
        start, numbers = field[:end], _PLACE.findall(field[:end])
        name = params.get(start)
        if name is None and numbers and (name := params.get(_PLACE.sub("[]", start))) is not None:
            for number in numbers:
                name = name.replace("[]", number, 1)
        if name is not None:
            return (name + field[end:]).lstrip(".") or None
        end = max(field.rfind(".", 0, end), field.rfind("[", 0, end))
    return None


_PLACE = re.compile(r"\[\d+\]")
# Fields that a message names besides the one at fault; not in quotes, which contain text of the caller.
_OTHER_FIELD = re.compile(r"""(?<![\w.'"])(?:chat|sampling)(?:\.[\w\[\]]+)+""")


@dataclass(frozen=True)
class _Row:
    """How a class of errors is reported.

    code          empty: the error's reason, in lower case
    retry_after   seconds, if the error itself names none; None: a retry does not help
    """

    status: int
    type: ErrorType
    code: str = ""
    retry_after: float | None = None


_INVALID = _Row(400, "invalid_request_error")
_LATE = _Row(504, "timeout_error")
_BUSY = _Row(429, "rate_limit_error", retry_after=1.0)
_DOWN = _Row(503, "overloaded_error", retry_after=1.0)
_FAULT = _Row(500, "server_error")
_GATEWAY = _Row(502, "server_error")

_ROWS: Final[Mapping[type[errors.HeadraceError], _Row]] = {
    errors.HeadraceError: _FAULT,
    # The request must change.
    errors.InvalidRequest: _INVALID,
    errors.EmptyInput: _INVALID,
    errors.InvalidText: _INVALID,
    errors.InvalidSampling: _INVALID,
    errors.AnswerCutOff: _INVALID,  # no server raises it
    errors.ContextTooLong: _Row(400, "invalid_request_error", "context_length_exceeded"),
    errors.UnknownTier: _Row(404, "not_found_error", "model_not_found"),
    errors.UnknownModel: _Row(404, "not_found_error", "model_not_found"),
    errors.HintsConflict: _INVALID,
    errors.UnknownRequest: _Row(404, "not_found_error"),
    errors.AlreadyRated: _Row(409, "invalid_request_error"),
    errors.MessageTooLarge: _Row(413, "invalid_request_error"),
    # Who calls.
    errors.CredentialsRequired: _Row(401, "authentication_error", "invalid_api_key"),
    errors.CredentialsInvalid: _Row(401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: _Row(403, "permission_error"),
    # Too much at the moment.
    errors.Overloaded: _BUSY,
    errors.Shed: _BUSY,
    errors.SlowReader: _Row(429, "rate_limit_error"),
    errors.Busy: _BUSY,
    errors.FeedbackQuota: _BUSY,
    errors.TenantQuota: _Row(429, "insufficient_quota", "rate_limit_exceeded", retry_after=1.0),
    # A deadline of the request, which the caller has set or the router's default.
    errors.DeadlineExceeded: _LATE,
    errors.DeadlineInQueue: _LATE,
    errors.DeadlineInDecode: _LATE,
    errors.TtftUnattainable: _LATE,
    errors.DeadlineUnattainable: _LATE,
    errors.RequestCancelled: _DOWN,  # not by the client: it would have left
    # The mesh cannot serve at the moment.
    errors.Unavailable: _DOWN,
    errors.NoWorkers: _DOWN,
    errors.WorkerLost: _DOWN,
    errors.BatcherLost: _DOWN,
    errors.UpstreamLost: _GATEWAY,
    errors.WorkerDraining: _DOWN,
    errors.Draining: _DOWN,
    errors.NotReady: _DOWN,
    # Faults.
    errors.SequenceFault: _FAULT,
    errors.PoisonRequest: _FAULT,
    errors.Unimplemented: _Row(501, "server_error"),
    errors.InternalError: _FAULT,
    # From a proxy between this gateway and its router, or a server that is not a router.
    errors.Foreign: _GATEWAY,
    errors.Unauthenticated: _GATEWAY,
    errors.PermissionDenied: _GATEWAY,
    errors.Aborted: _Row(502, "server_error", retry_after=1.0),
    errors.NotFound: _GATEWAY,
    errors.AlreadyExists: _GATEWAY,
    errors.FailedPrecondition: _GATEWAY,
    errors.OutOfRange: _GATEWAY,
    errors.DataLoss: _GATEWAY,
}
