"""Translate errors that an upstream reports to errors of the mesh.

The convention for retries is that of `errors.HeadraceError.retry_after`: None if the same request to the same
upstream would fail again. Otherwise the seconds to wait first; 0.0 if the upstream names no time, so that the
caller of this module chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace import errors

# Keys in `fields` of the errors here: the upstream's HTTP status, and its own code for the error.
UPSTREAM_STATUS = "upstream_status"
UPSTREAM_CODE = "upstream_code"


def problem_of(
    status: int, headers: Mapping[str, str], body: bytes, *, key: str, now: float
) -> errors.HeadraceError:
    """Return the error for a response that is not a success.

    status    of HTTP, not 2xx
    headers   with names in lower case, or a mapping that ignores the case
    body      the first bytes of the body, at least 64 KiB of it if it is that long
    key       the API key, which is removed from the message; empty: none
    now       the time in seconds since 1970, to compare dates in Retry-After with

    408, 409, 425, 429, 5xx are temporary: Overloaded for 429 and 503 with an overload, otherwise NoWorkers,
    with `retry_after`. An exhausted quota, and 401, 403 and 404, are NoWorkers without it: the operator has to
    act. 400, 413 and 422 are the request's: ContextTooLong, InvalidSampling or InvalidRequest with the field.
    """
    raise NotImplementedError


def problem_of_event(error: object, *, key: str) -> errors.HeadraceError:
    """Return the error for the `error` of an event in a stream that has not begun."""
    raise NotImplementedError


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds after which the upstream asks for a retry; None if it does not.

    Reads retry-after-ms, and Retry-After in seconds or as a date. Values are 0 to an hour.
    """
    raise NotImplementedError
