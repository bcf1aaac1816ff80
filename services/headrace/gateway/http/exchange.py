"""Carry one HTTP request and its response.

`endpoint.Endpoint` makes an ASGI application of a handler, a coroutine function that takes an `Exchange`.
This module knows how a response is written, and nothing of what is in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from starlette.datastructures import Headers
from starlette.types import Scope, Send

from headrace.gateway.http.bodies import json_of
from headrace.gateway.problems import NO_PARAMS, Problem
from headrace.runtime.security.identity import ANONYMOUS, Identity

Handler: TypeAlias = Callable[["Exchange"], Awaitable[None]]

PING = b": ping\n\n"  # a comment of server-sent events, which clients ignore


class Exchange:
    """One HTTP request, and the way to answer it.

    headers      of the request
    path_params  of the route
    body         of the request, complete
    identity     who calls
    metadata     to send with calls of the mesh: the caller's authorization
    params       names in this request of fields of the contract, for errors of the mesh: see `problem_of`
    started      whether the response has begun
    streams      whether it is a stream of events
    ended        whether it is complete
    status       of the response; 0 before it has begun
    """

    def __init__(
        self,
        scope: Scope,
        send: Send,
        *,
        body: bytes = b"",
        identity: Identity = ANONYMOUS,
        extra: Mapping[str, str] = NO_PARAMS,
    ) -> None:
        """Create an exchange.

        extra   headers of every response
        """
        self.headers = Headers(raw=scope["headers"])
        self.path_params: Mapping[str, Any] = scope.get("path_params", NO_PARAMS)
        self.body = body
        self.identity = identity
        self.metadata: dict[str, str] = {}
        self.params = NO_PARAMS
        self.started = self.streams = self.ended = False
        self.status = 0
        self.first_token_at: float | None = None
        self.quiet = 0  # ticks of `pings` without an event
        self._extra = dict(extra)
        self._send = send

    async def json(self) -> dict[str, Any]:
        """Return the body, which must be a JSON object. Raises Problem (400).

        A large body is parsed on another thread.
        """
        return await json_of(self.body)

    def first_token(self) -> None:
        """Note that the first token is about to be sent, for the metrics. Further calls have no effect."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()

    async def reply(
        self, payload: object, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole response: bytes as they are, anything else as JSON."""
        data = payload if isinstance(payload, bytes) else encoded(payload)
        given = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        await self._start(status, given)
        await self._send({"type": "http.response.body", "body": data})
        self.ended = True

    async def refuse(self, problem: Problem) -> None:
        """Send a problem as the whole response."""
        await self.reply(problem.body(), status=problem.status, headers=problem.headers)

    async def start_events(self, headers: Mapping[str, str] | None = None) -> None:
        """Begin a stream of server-sent events."""
        given = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would gather events otherwise
        }
        self.streams = True
        await self._start(200, {**given, **(headers or {})})

    async def send_event(self, data: bytes) -> None:
        """Send one event; *data* contains no line breaks. Waits while the client does not read."""
        self.quiet = 0
        await self._send(
            {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
        )

    async def ping(self) -> None:
        """Send a comment in a stream of events, so that nothing between here and the client closes it."""
        await self._send({"type": "http.response.body", "body": PING, "more_body": True})

    async def end_events(self) -> None:
        """End the stream of events."""
        self.streams = False
        await self._send({"type": "http.response.body", "body": b""})
        self.ended = True

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        self.status = status
        pairs = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in {**self._extra, **headers}.items()
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


def encoded(payload: object) -> bytes:
    """Return *payload* as JSON."""
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
