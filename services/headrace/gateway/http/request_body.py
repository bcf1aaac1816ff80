"""Read the body of a request within limits of size, time and memory, and refuse what is not JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.types import Receive

from headrace.gateway.http.limits import HttpLimits
from headrace.gateway.problems import Problem
from headrace.quoting import quoted
from headrace.runtime.serving.inflight import INCOMPLETE_SHARE, Reservation

SKIPPED_BYTES, SKIP_SECONDS = 64 * 1024, 0.05
LINGER_SECONDS = 2.0
LINGER_BYTES = 16 * 1024 * 1024

_CHARSETS = ("utf-8", "utf8", "us-ascii")


class ClientLeft(Exception):
    """The client closed its connection before its request was answered."""


class RequestBody:
    """The body of one request.

    complete   whether all of it was received, or there is none
    """

    def __init__(self, headers: Mapping[str, str], receive: Receive, limits: HttpLimits, cycle: Any) -> None:
        self._headers, self._receive, self._limits, self._cycle = headers, receive, limits, cycle
        self.complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def read(self, reservation: Reservation) -> bytes:
        """Read the body and charge it to *reservation*. Raises Problem, Busy and ClientLeft."""
        if self.complete:
            return b""
        check_headers(self._headers, self._limits.max_body_bytes)
        if not self._cycle.more_body:  # it has arrived: most do with their headers, and need no timer
            return await self._read(reservation)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await self._read(reservation)
        except TimeoutError:
            raise Problem(
                408,
                f"the body did not arrive within {self._limits.body_seconds:g} s",
                type="timeout_error",
                code="body_timeout",
            ) from None

    async def _read(self, reservation: Reservation) -> bytes:
        parts, size = list[bytes](), 0
        while not self.complete:
            part = await self._next()
            size += len(part)
            if size > self._limits.max_body_bytes:
                raise _too_large(f"more than {self._limits.max_body_bytes}", self._limits.max_body_bytes)
            reservation.resize(size, share=1.0 if self.complete else INCOMPLETE_SHARE)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def skip(self) -> None:
        """Discard a short body that was sent already, so that the connection can be kept after a refusal."""
        length = self._headers.get("content-length", "")
        if length.isdecimal() and int(length) <= SKIPPED_BYTES and "expect" not in self._headers:
            with suppress(TimeoutError):
                async with asyncio.timeout(SKIP_SECONDS):
                    while not self.complete:
                        await self._next()

    async def discard(self) -> None:
        """Discard what the client still sends, for a while, after it was refused.

        If a connection is closed while input is unread, the client may lose the response.
        """
        size = 0
        with suppress(TimeoutError, ClientLeft):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.complete and size < LINGER_BYTES:
                    size += len(await self._next())

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        self.complete = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part


def check_headers(headers: Mapping[str, str], limit: int) -> None:
    """Check what the headers say of a body, before it is read. Raises Problem."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise _unsupported(
            f"content-encoding {quoted(encoding)} is not supported: send the body uncompressed"
        )
    kind, *parameters = headers.get("content-type", "").split(";")
    if kind.strip().lower() != "application/json":
        raise _unsupported(
            f"content-type {quoted(kind.strip())} is not supported: it must be application/json"
            if kind.strip()
            else "the request needs the header `content-type: application/json`"
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in _CHARSETS:
            raise _unsupported(f"charset {quoted(value.strip())} is not supported: JSON is UTF-8")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(length, limit)


def _unsupported(message: str) -> Problem:
    return Problem(415, message, code="unsupported_media_type")


def _too_large(size: str, limit: int) -> Problem:
    return Problem(413, f"the body has {size} bytes, the limit is {limit}", code="body_too_large")
