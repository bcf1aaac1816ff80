"""Run an HTTP server in our event loop: its sockets, connections and drain.

uvicorn provides the protocol. Its own server handles signals, ends the process when it cannot listen, and
waits for the connections of clients that are idle, so it is not used.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from headrace.gateway.http.connection import Connection
from headrace.gateway.http.https import Https
from headrace.gateway.http.limits import TLS_HANDSHAKE_SECONDS, HttpLimits
from headrace.metrics import catalogue
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.bind_check import bind_error, explain
from headrace.runtime.serving.server import CannotListen, PortInUse

log = logging.getLogger(__name__)

BACKLOG = 2048
CHECK_SECONDS = 1.0  # between two looks at the deadlines of connections, at most
_EVICT_SECONDS = 2.0  # after the drain, until the remaining responses have ended
_FLUSH_SECONDS = 0.5  # after that, until what was written is sent
_ALL_ADDRESSES = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Listening:
    """A running HTTP server.

    port    where it listens
    state   its connections
    """

    port: int
    state: ServerState


@asynccontextmanager
async def listening(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    limits: HttpLimits,
    requests: ActiveRequests,
    drain_seconds: float,
    share_port: bool = False,
    https: Https | None = None,
) -> AsyncGenerator[Listening, None]:
    """Serve *app* until the block exits, then drain.

    port            0 picks a free one
    share_port      whether other processes may listen on it too
    requests        those in flight, which *app* counts
    drain_seconds   how long they may continue after the block exits; the rest is evicted

    Raises PortInUse and CannotListen.
    """
    config = Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    config.load()
    loop, state = asyncio.get_running_loop(), ServerState()
    _set_date(state)

    def connection() -> Connection:
        return Connection(config, state, limits, loop)

    sockets = await _bound(host, port, share_port)
    servers = [
        await loop.create_server(
            connection,
            sock=one,
            backlog=BACKLOG,
            ssl=https.context if https else None,
            ssl_handshake_timeout=TLS_HANDSHAKE_SECONDS if https else None,
        )
        for one in sockets
    ]
    number = sockets[0].getsockname()[1]
    log.info("serving", extra={"host": host, "port": number, "tls": https is not None})
    connections = catalogue.HTTP_CONNECTIONS.of()
    async with asyncio.TaskGroup() as tasks:
        # The deadlines of connections apply during the drain as well.
        working = [tasks.create_task(_check(state, limits))]
        if https is not None:
            working.append(tasks.create_task(https.follow()))
        with connections.reading(lambda: len(state.connections)):
            try:
                yield Listening(number, state)
            finally:
                for server in servers:
                    server.close()
                await _drain(state, requests, drain_seconds)
                for task in working:
                    task.cancel()


async def _drain(state: ServerState, requests: ActiveRequests, seconds: float) -> None:
    """Let requests in flight end within *seconds*, evict the rest, and close all connections.

    Idle connections stay open meanwhile: a request that a client is sending on one is answered, with 503.
    """
    began = time.monotonic()
    log.info("draining", extra={"in_flight": requests.in_flight, "seconds": seconds})
    requests.drain()
    for connection in _connections(state):
        connection.drain()
    try:
        async with asyncio.timeout(seconds):
            while requests.in_flight:
                await asyncio.sleep(0.02)
    except TimeoutError:
        log.warning("drain timed out", extra={"in_flight": requests.in_flight})
        requests.evict()
        with suppress(TimeoutError):
            async with asyncio.timeout(_EVICT_SECONDS):
                while requests.in_flight:
                    await asyncio.sleep(0.02)
    for connection in _connections(state):
        connection.transport.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(_FLUSH_SECONDS):
            while state.connections:
                await asyncio.sleep(0.01)
    for connection in _connections(state):
        connection.transport.abort()
    if state.tasks:  # they end with their connections
        _, left = await asyncio.wait(list(state.tasks), timeout=_EVICT_SECONDS)
        for task in left:
            task.cancel()
    log.info("stopped", extra={"drain_seconds": round(time.monotonic() - began, 3)})


async def _check(state: ServerState, limits: HttpLimits) -> None:
    """Enforce the deadlines of connections until cancelled, and keep the header `date` current."""
    loop = asyncio.get_running_loop()
    shortest = min(limits.header_seconds, limits.unread_seconds, limits.idle_seconds)
    while True:
        await asyncio.sleep(min(CHECK_SECONDS, shortest / 4))
        _set_date(state)
        now = loop.time()
        for connection in _connections(state):
            connection.check(now)


def _connections(state: ServerState) -> list[Connection]:
    return [one for one in state.connections if isinstance(one, Connection)]


def _set_date(state: ServerState) -> None:
    state.default_headers = [(b"date", formatdate(usegmt=True).encode())]


async def _bound(host: str, port: int, shared: bool) -> list[socket.socket]:
    """Return sockets that are bound to all addresses of *host*, an address or a name, on one port."""
    problem: Exception | None = await asyncio.to_thread(lambda: bind_error(host, port, shared=shared))
    if problem is None:
        try:
            return await asyncio.to_thread(_bind, host, port, shared)
        except (OSError, UnicodeError) as error:  # in use since the check
            problem = error
    in_use = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
    raise (PortInUse if in_use else CannotListen)(explain(problem, host, port)) from problem


def _bind(host: str, port: int, shared: bool) -> list[socket.socket]:
    """Bind the sockets. Raises OSError and UnicodeError."""
    both = host in _ALL_ADDRESSES and socket.has_dualstack_ipv6()
    found = socket.getaddrinfo("::" if both else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, address in found:
        # A second address of a name has the port that was picked for the first one.
        number = bound[0].getsockname()[1] if bound else port
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:  # this machine has no IPv6
            problem = error
            continue
        bound.append(one)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not both))
            one.bind((address[0], number, *address[2:]))
            one.setblocking(False)
        except OSError as error:
            bound.pop().close()
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    if problem is not None and (not bound or problem.errno == errno.EADDRINUSE):
        for one in bound:
            one.close()
        raise problem
    return bound
