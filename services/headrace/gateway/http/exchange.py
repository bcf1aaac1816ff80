"""Carry one HTTP request and its response.

`Endpoint` makes an ASGI application of a handler, a coroutine function that takes an `Exchange`: it reads the
body, finds the caller, runs the handler until it ends or the client has left, and reports its errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from headrace import errors
from headrace.gateway.problems import Problem, problem_of
from headrace.runtime.security.identity import ANONYMOUS, Identity

Handler: TypeAlias = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One HTTP request, and the way to answer it.

    headers      of the request
    body         of the request, complete
    identity     who calls
    metadata     to send with calls of the mesh: the caller's authorization
    path_params  of the route
    """

    def __init__(self, scope: Scope, send: Send, body: bytes, identity: Identity) -> None:
        self.headers = Headers(scope=scope)
        self.path_params: Mapping[str, Any] = scope.get("path_params", {})
        self.body = body
        self.identity = identity
        self.metadata: dict[str, str] = {}
        self._send = send
        self.started = False  # whether the response has begun
        self.streams = False  # whether it is a stream of events

    async def reply(
        self, payload: object, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole response: bytes as they are, anything else as JSON."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload, ensure_ascii=False).encode()
        given = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        await self._start(status, given)
        await self._send({"type": "http.response.body", "body": data})

    async def start_events(self, headers: Mapping[str, str] | None = None) -> None:
        """Begin a stream of server-sent events."""
        given = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        self.streams = True
        await self._start(200, {**given, **(headers or {})})

    async def send_event(self, data: bytes) -> None:
        """Send one event. Waits while the client does not read."""
        await self._send(
            {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
        )

    async def end_events(self) -> None:
        """End the stream of events."""
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


class Endpoint:
    """The ASGI application that answers with a handler. A class, because Starlette wraps functions."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        exchange = Exchange(scope, send, body, ANONYMOUS)
        handling = asyncio.ensure_future(_handled(self._handler, exchange))
        leaving = asyncio.ensure_future(receive())  # http.disconnect
        await asyncio.wait((handling, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in (handling, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _handled(handler: Handler, exchange: Exchange) -> None:
    try:
        await handler(exchange)
    except (Problem, errors.HeadraceError) as error:
        problem = error if isinstance(error, Problem) else problem_of(error)
        if not exchange.started:
            await exchange.reply(problem.body(), status=problem.status, headers=problem.headers)
        elif exchange.streams:
            await exchange.send_event(json.dumps(problem.body()).encode())
            await exchange.end_events()
