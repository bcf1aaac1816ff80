"""Speak HTTP/1.1 on one connection: uvicorn's protocol, with limits of size and time.

uvicorn limits neither headers nor the time that they take, nor the number of pipelined requests; it reports
the end of a connection only to the last of these, and writes the error of an invalid request into a response
that is under way. A client that closes its end of the connection has left: most clients that leave cannot be
told from those that only have nothing more to send.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from headrace.gateway.http.exchange import CYCLE, encoded
from headrace.gateway.http.limits import MAX_HEADERS, MAX_PIPELINED, HttpLimits
from headrace.gateway.problems import Problem, retry_headers

log = logging.getLogger(__name__)

LINGER_SECONDS = 2.0  # for which input is discarded after an error, so that the client can read it
_UPGRADE_HEADERS = (b"upgrade", b"http2-settings", b"connection")


class Connection(HttpToolsProtocol):
    """One connection of a client, and its requests, which are answered one after the other."""

    def __init__(
        self, config: Config, state: ServerState, limits: HttpLimits, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(config, state, {}, loop)
        self.timeout_keep_alive = limits.idle_seconds  # type: ignore[assignment] # for call_later
        self.draining = False
        self._limits = limits
        self._running: Any = None  # the request that is being answered, or was last
        self._head_due: float | None = None  # when the headers of the next request must be complete
        self._in_head = False  # whether headers have begun and are not complete
        self._head_bytes = 0  # of complete headers
        self._partial_bytes = 0  # that were received meanwhile, after those with which they began
        self._hosts = 0
        self._begun = False  # whether a request began in what is being parsed
        self._unread_due: float | None = None  # when the client must have read from a full buffer
        self._unsent = 0  # bytes in the buffer at the last check
        self._close_due: float | None = None  # when a connection that is being closed is aborted
        self._stopped = False  # reading: what the client sends from now on is discarded
        self._refusal: Problem | None = None

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        self._head_due = self.loop.time() + self._limits.header_seconds
        if len(self.connections) > self._limits.max_connections:
            self._finish(
                Problem(
                    503,
                    "too many open connections; retry after the delay",
                    type="overloaded_error",
                    code="server_busy",
                    headers=retry_headers(1.0),
                )
            )
            transport.close()  # at once: while it lingered, it would count

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request that is being answered; those that wait for it are never started."""
        if self._busy:
            self._leave()
        self.pipeline.clear()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Parse what was received. Requests start in `on_headers_complete`."""
        if self._stopped:
            return
        self._unset_keepalive_if_required()
        self._begun = False
        try:
            self.parser.feed_data(data)
            if self._in_head and not self._begun:
                # Headers that are not complete are not reported, and may be long.
                self._partial_bytes += len(data)
                self._count(0)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except (httptools.HttpParserError, Problem) as error:
            problem = self._refusal or (error if isinstance(error, Problem) else None)
            self._fail(problem or Problem(400, "the request is not valid HTTP/1.1", code="invalid_http"))
        if self._head_due is None and not self._busy:
            self._head_due = self.loop.time() + self._limits.header_seconds

    def pause_writing(self) -> None:
        """Note that the client does not read; what writes waits."""
        self._unread_due = self.loop.time() + self._limits.unread_seconds
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        self._unread_due = None
        super().resume_writing()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._in_head = self._begun = True
        self._head_bytes = self._partial_bytes = self._hosts = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Add to the target of the request."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header of the request, or of the trailer of its body, which is ignored."""
        if not self._in_head:
            return
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(
                Problem(431, f"the request has more than {MAX_HEADERS} headers", code="too_many_headers")
            )
        super().on_header(name, value)
        if self.headers[-1][0] == b"host":
            self._hosts += 1

    def on_headers_complete(self) -> None:
        """Start the request, or queue it behind the one before."""
        self._in_head, self._head_due = False, None
        if self.parser.should_upgrade():
            return  # see `_ignore_upgrade`
        if self._hosts > 1 or (not self._hosts and self.parser.get_http_version() == "1.1"):
            self._refuse(Problem(400, "the request must have one header `host`", code="invalid_http"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(
                Problem(
                    429, f"more than {MAX_PIPELINED} requests wait on this connection", code="server_busy"
                )
            )
        super().on_headers_complete()
        if self.pipeline:
            # uvicorn has paused reading, and the end of the connection would not be noticed.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Add to the body of the request."""
        if not self.parser.should_upgrade():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request's body."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    # What requests call.

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        cycle.scope[CYCLE] = cycle
        cycle.left = None  # see `Exchange.when_left`
        if self.draining:
            cycle.keep_alive = False
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Start the next request, or wait for it."""
        super().on_response_complete()
        if self._in_head and not self._busy:
            self._head_due = self.loop.time() + self._limits.header_seconds

    # What the server calls.

    def drain(self) -> None:
        """Close the connection after the response that is under way, or after the next one."""
        self.draining = True
        if self._running is not None:
            self._running.keep_alive = False

    def check(self, now: float) -> None:
        """End the connection if the client takes too long. Called now and then."""
        unsent = self.transport.get_write_buffer_size()
        reads, self._unsent = 0 < unsent < self._unsent, unsent
        if self.transport.is_closing() or self._close_due is not None:
            if self._close_due is None or reads:
                self._close_due = now + self._limits.unread_seconds
            elif now >= self._close_due:
                self.transport.abort()
        elif self._unread_due is not None and reads:
            self._unread_due = now + self._limits.unread_seconds
        elif self._unread_due is not None and now >= self._unread_due:
            log.warning("connection closed: the client does not read")
            self.transport.abort()
        elif self._head_due is not None and now >= self._head_due:
            if self._in_head:
                self._finish(
                    Problem(
                        408,
                        f"the headers did not arrive within {self._limits.header_seconds:g} s",
                        type="timeout_error",
                        code="header_timeout",
                    )
                )
            else:
                self.transport.close()

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return self._running is not None and not self._running.response_complete

    def _leave(self) -> None:
        """End the request that is being answered, because nobody receives the answer."""
        running = self._running
        running.disconnected = True
        running.message_event.set()
        if running.left is not None:
            running.left()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if max(self._head_bytes, self._partial_bytes) > self._limits.max_header_bytes:
            self._refuse(
                Problem(
                    431,
                    f"the headers have more than {self._limits.max_header_bytes} bytes",
                    code="headers_too_large",
                )
            )

    def _refuse(self, problem: Problem) -> None:
        # The parser replaces what its callbacks raise by an error of its own.
        self._refusal = problem
        raise problem

    def _fail(self, problem: Problem) -> None:
        """End the connection because of input that is no valid request."""
        running = self._running
        if not self._busy or (not running.response_started and running.more_body and not self.pipeline):
            if self._busy:
                self._leave()
            self._finish(problem)
            return
        # A response is under way, and nothing can be written beside it. Earlier requests are answered.
        self._stopped = True
        (self.pipeline[0][0] if self.pipeline else running).keep_alive = False

    def _finish(self, problem: Problem) -> None:
        """Send a problem, outside of any request, and close the connection."""
        self._stopped, self._head_due = True, None
        body = encoded(problem.body())
        headers = [
            *self.server_state.default_headers,
            *((name.encode(), value.encode()) for name, value in problem.headers.items()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%s: %s\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[problem.status] + head + b"\r\n" + body)
        if self.transport.can_write_eof():
            # If input is unread when a connection is closed, the system discards the output too.
            self.transport.write_eof()
            self._close_due = self.loop.time() + LINGER_SECONDS
        else:  # TLS
            self.transport.close()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse a request again without its request for another protocol, as HTTP allows.

        Java's client asks for HTTP/2 in each first request; httptools does not read the body of such a one.
        """
        method, target, version = self.parser.get_method(), self.url, self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._fail(Problem(405, "CONNECT is not supported", code="method_not_allowed"))
            return
        kept = [pair for pair in self.headers if pair[0] not in _UPGRADE_HEADERS]
        head = b"".join(b"%s: %s\r\n" % pair for pair in kept)
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"%s %s HTTP/%s\r\n%s\r\n%s" % (method, target, version, head, rest))
