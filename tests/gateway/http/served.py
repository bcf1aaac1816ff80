"""An HTTP server on uvloop, in a thread of its own, with a handler of the test; and a client of bytes."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvloop
from starlette.routing import Route, Router

from headrace.gateway.http.endpoint import HttpService
from headrace.gateway.http.exchange import Exchange, Handler
from headrace.gateway.http.https import Https
from headrace.gateway.http.limits import HttpLimits
from headrace.gateway.http.server import Listening, listening
from headrace.runtime.security.guard import Guard, OpenGuard
from headrace.runtime.serving.calls import TraceContext
from tests.harness import PATIENCE

PATH = "/v1/echo"
JSON = "content-type: application/json"


async def echo(exchange: Exchange) -> None:
    """Answer with the body's object."""
    await exchange.reply(await exchange.json())


@dataclass
class Response:
    """What a client received."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[str]:
        """The data of the events of a stream."""
        lines = self.body.decode().split("\n\n")
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


class Wire:
    """A connection that sends bytes and reads responses."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        self._read = b""

    def send(self, *lines: str, body: bytes = b"", length: bool = True) -> None:
        """Send a request: its lines, and its body with its length."""
        given = [*lines, "host: test", *([f"content-length: {len(body)}"] if body and length else [])]
        self.socket.sendall("\r\n".join((*given, "", "")).encode() + body)

    def post(self, body: bytes, *headers: str, path: str = PATH) -> Response:
        """Send a body as JSON, and return the response."""
        self.send(f"POST {path} HTTP/1.1", JSON, *headers, body=body)
        return self.response()

    def response(self, method: str = "POST") -> Response:
        """Read one response, which has a length or is chunked."""
        head = self.until(b"\r\n\r\n").decode()
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(self.until(b"\r\n"), 16):
                body += self.take(size)
                assert self.take(2) == b"\r\n"
            assert self.take(2) == b"\r\n"
        elif method != "HEAD":
            body = self.take(int(headers.get("content-length", 0)))
        return Response(int(first.split()[1]), headers, body)

    def until(self, end: bytes) -> bytes:
        """Read until *end*."""
        while end not in self._read:
            self._more()
        found, _, self._read = self._read.partition(end)
        return found + end

    def take(self, size: int) -> bytes:
        """Read *size* bytes."""
        while len(self._read) < size:
            self._more()
        taken, self._read = self._read[:size], self._read[size:]
        return taken

    def ended(self) -> bool:
        """Wait until the server closes the connection; return whether it sent nothing more."""
        try:
            return not self._read and not self.socket.recv(1)
        except ConnectionResetError:
            return not self._read

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"the connection ended after {self._read!r}"
        self._read += data


@dataclass
class Served:
    """A running server."""

    port: int
    http: HttpService
    listening: Listening
    stop: Callable[[], None]
    wires: list[Wire] = field(default_factory=list)

    def wire(self, context: ssl.SSLContext | None = None) -> Wire:
        """Open a connection."""
        wire = Wire(self.port, context)
        self.wires.append(wire)
        return wire

    @property
    def url(self) -> str:
        """Of the handler."""
        return f"http://127.0.0.1:{self.port}{PATH}"


def eventually(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def served(
    handler: Handler = echo,
    *,
    guard: Guard | None = None,
    trace_context: TraceContext = "trust",
    drain_seconds: float = 0.0,
    https: Https | None = None,
    forward: bool = False,
    **limits: Any,
) -> Iterator[Served]:
    """Serve POST and GET of PATH with *handler*, within *limits*."""
    started: list[Served] = []
    ready = threading.Event()

    def stopped_by(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> Callable[[], None]:
        def stop() -> None:
            loop.call_soon_threadsafe(stopping.set)

        return stop

    async def main() -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        http = HttpService(
            HttpLimits(**limits),
            guard or OpenGuard(),
            trace_context=trace_context,
            forward_authorization=forward,
        )
        app = Router([Route(PATH, http.endpoint(handler, PATH, "POST", "GET"))])
        async with listening(
            app,
            host="127.0.0.1",
            port=0,
            limits=http.limits,
            requests=http.requests,
            drain_seconds=drain_seconds,
            https=https,
        ) as running:
            pinging = asyncio.create_task(http.ping())
            started.append(Served(running.port, http, running, stopped_by(loop, stopping)))
            ready.set()
            await stopping.wait()
            pinging.cancel()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield started[0]
    finally:
        for wire in started[0].wires:
            wire.close()
        if thread.is_alive():
            started[0].stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
