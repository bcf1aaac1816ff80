"""Carry one HTTP request and its response.

`endpoint.Endpoint` makes an ASGI application of a handler, a coroutine function that takes an `Exchange`.
This module knows how a response is written, and nothing of what is in it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from starlette.types import Scope, Send

from headrace.gateway.http.bodies import json_of
from headrace.gateway.http.request_body import ClientLeft
from headrace.gateway.problems import NO_PARAMS, Problem
from headrace.runtime.security.identity import ANONYMOUS, Identity

Handler: TypeAlias = Callable[["Exchange"], Awaitable[None]]

T = TypeVar("T")

LARGE_BODY = 256 * 1024  # bytes; what a smaller one contains is checked and copied within few ms
PING = b": ping\n\n"  # a comment of server-sent events, which clients ignore
_PING_CHUNK = b"%x\r\n%b\r\n" % (len(PING), PING)
# The key of uvicorn's request in the scope. Events are written by it: ASGI costs as much as the write itself.
CYCLE = "headrace.cycle"
BURST = 32  # events after which others get a turn, whatever the handler does


class Exchange:
    """One HTTP request, and the way to answer it.

    headers      of the request, by their names in lower case
    path_params  of the route
    body         of the request, complete
    identity     who calls
    metadata     to send with calls of the mesh: the caller's authorization
    params       names in this request of fields of the contract, for errors of the mesh: see `problem_of`
    started      whether the response has begun
    streams      whether it is a stream of events
    ended        whether it is complete
    status       of the response; 0 before it has begun
    extra        further headers of the response, whatever it is
    """

    def __init__(
        self,
        scope: Scope,
        send: Send,
        *,
        body: bytes = b"",
        identity: Identity = ANONYMOUS,
    ) -> None:
        # Of several headers with one name, the first one.
        self.headers: Mapping[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])
        }
        self.path_params: Mapping[str, Any] = scope.get("path_params", NO_PARAMS)
        self.body = body
        self.identity = identity
        self.metadata: dict[str, str] = {}
        self.params = NO_PARAMS
        self.started = self.streams = self.ended = False
        self.status = 0
        self.first_token_at: float | None = None
        self.quiet = 0  # ticks without an event
        self.extra: dict[str, str] = {}
        self._send = send
        self._events = 0
        self._cycle: Any = scope.get(CYCLE)
        self._chunked = scope["http_version"] != "1.0"  # else the end of the connection ends a stream

    async def json(self) -> dict[str, Any]:
        """Return the body, which must be a JSON object. Raises Problem (400).

        A large body is parsed on another thread.
        """
        return await json_of(self.body)

    async def read(self, translate: Callable[[dict[str, Any], bool], T]) -> T:
        """Return what *translate* makes of the body, which must be a JSON object. Raises Problem.

        It is called with the object, and with whether the body is large: then on another thread.
        """
        body = await self.json()
        if len(self.body) <= LARGE_BODY:
            return translate(body, False)
        return await asyncio.to_thread(translate, body, True)

    def when_left(self, call: Callable[[], None] | None) -> None:
        """Have *call* called once when the client leaves before the response is complete.

        None   stops that

        Raises ClientLeft if the client has left.
        """
        cycle = self._cycle
        if call is not None:
            if cycle.disconnected:
                raise ClientLeft
            cycle.flow.resume_reading()  # the end of a connection is noticed only while it is read
        cycle.left = call

    def first_token(self) -> None:
        """Note that the first token is about to be sent, for the metrics. Further calls have no effect."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()

    async def reply(
        self,
        payload: object,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        hold: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Send a whole response: bytes as they are, anything else as JSON.

        hold   awaited before the response ends, and the connection with it; None: the connection is kept
        """
        data = payload if isinstance(payload, bytes) else encoded(payload)
        given = dict(headers or {})
        if status != 204:
            given = {"content-type": "application/json", "content-length": str(len(data)), **given}
        if hold is not None:
            given["connection"] = "close"
        await self._start(status, given)
        if hold is not None:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            await hold()
            data = b""
        await self._send({"type": "http.response.body", "body": data})
        self.ended = True

    async def refuse(self, problem: Problem, *, hold: Callable[[], Awaitable[None]] | None = None) -> None:
        """Send a problem as the whole response. See `reply` for *hold*."""
        await self.reply(problem.body(), status=problem.status, headers=problem.headers, hold=hold)

    async def start_events(self, headers: Mapping[str, str] | None = None) -> None:
        """Begin a stream of server-sent events."""
        given = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would gather events otherwise
        }
        if not self._chunked:
            self._cycle.chunked_encoding = False  # uvicorn sends chunks to any client
        await self._start(200, {**given, **(headers or {})})
        self.streams = True

    async def send_event(self, data: bytes) -> None:
        """Send one event. Waits while the client does not read.

        data   without line breaks, except between several events: "\\n\\ndata: "
        """
        self.quiet = 0
        self._events += 1
        if not self._events % BURST:
            # In between, uvloop writes, and learns that the client does not read or left.
            await asyncio.sleep(0)
        cycle = self._cycle
        if cycle.flow.write_paused:
            await cycle.flow.drain()
        if self._chunked:
            # One chunk of HTTP: its size, the event, and the chunk's end.
            cycle.transport.write(b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data))
        else:
            cycle.transport.write(b"data: %b\n\n" % data)

    def tick(self, most: int) -> None:
        """Count a tick without an event; after *most*, send a comment, so that no proxy closes the stream."""
        self.quiet += 1
        if self.streams and self.quiet >= most and not self._cycle.flow.write_paused:
            self.quiet = 0
            self._cycle.transport.write(_PING_CHUNK if self._chunked else PING)

    async def end_events(self, *last: bytes) -> None:
        """End the stream after the *last* events. They are sent together: each write is a system call."""
        body = b""
        if self._chunked:
            body = b"".join([b"data: %b\n\n" % data for data in last])
        else:
            for data in last:
                await self.send_event(data)
        self.streams = False
        await self._send({"type": "http.response.body", "body": body})
        self.ended = True

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        pairs = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in {**self.extra, **headers}.items()
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})
        self.started = True
        self.status = status


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encoded(payload: object) -> bytes:
    """Return *payload* as JSON."""
    return _JSON.encode(payload).encode(errors="replace")
