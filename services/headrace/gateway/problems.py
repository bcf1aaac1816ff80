"""Describe what a caller did wrong, or what the mesh could not do, as an HTTP status and an OpenAI error."""

from __future__ import annotations

from collections.abc import Mapping

from headrace import errors


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


def problem_of(error: errors.HeadraceError) -> Problem:
    """Return the problem that reports an error of the mesh."""
    return Problem(500, error.message, type="server_error", code=error.reason)
