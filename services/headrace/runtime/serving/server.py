"""Run a gRPC server with what operators expect on every port.

That is grpc.health.v1 with `readiness` and `liveness`, reflection, channelz, limits, keepalive rules, and a
drain that loses no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz
from grpc_channelz.v1.channelz_pb2 import DESCRIPTOR as CHANNELZ
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from headrace import errors, propagation
from headrace.channel import KEEPALIVE_OPTIONS, MAX_MESSAGE_BYTES, join
from headrace.runtime.security.guard import Guard
from headrace.runtime.serving import accept_loop
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.bind_check import bind_error, explain
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.inflight import InflightBudget
from headrace.runtime.serving.interceptor import ServerInterceptor
from headrace.runtime.serving.limits import raise_file_limit
from headrace.runtime.serving.memory_reclaim import (
    collect_less_often,
    freeze_loaded_objects,
    return_large_blocks,
)
from headrace.runtime.serving.reflection import add_reflection

log = logging.getLogger(__name__)

READINESS = "readiness"
LIVENESS = "liveness"

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    *KEEPALIVE_OPTIONS,
    # Idle clients ping every 20 s. With the default of five minutes the fourth ping would close the
    # connection as "too_many_pings". The option's name has no "recv", unlike that of its constant in core.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.enable_channelz", 1),
)
_FOLLOW_SECONDS = 0.1
_EVICT_SECONDS = 2.0  # after the drain, until the remaining requests have ended, on a busy machine
_FORCE_SECONDS = 0.5  # after that, until the status of calls that are still open was sent


class StartFailed(Exception):
    """The process cannot start; the message names the cause, which the operator can correct."""


class CannotListen(StartFailed):
    """The server cannot listen on its address."""


class PortInUse(CannotListen):
    """Another process listens on the port."""


class Health:
    """The server's health as reported by grpc.health.v1.

    "", `readiness` and the full names of *services* report readiness; `liveness` reports that the process
    runs.
    """

    def __init__(self, services: Iterable[str] = ()) -> None:
        self.servicer = HealthServicer()
        self.ready = False
        self._names = ("", READINESS, *services)

    async def set_ready(self, ready: bool) -> None:
        """Report whether the server accepts requests."""
        self.ready = ready
        status = (
            health_pb2.HealthCheckResponse.SERVING if ready else (health_pb2.HealthCheckResponse.NOT_SERVING)
        )
        for name in self._names:
            await self.servicer.set(name, status)

    async def follow(self, ready: Callable[[], bool]) -> None:
        """Set readiness from *ready*, polled until cancelled."""
        while True:
            if (now := ready()) != self.ready:
                await self.set_ready(now)
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def set_live(self) -> None:
        """Report that the process runs."""
        await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True)
class Serving:
    """A running server.

    port       where it listens
    budget     calls and bytes in flight
    requests   requests in flight
    """

    port: int
    health: Health
    budget: InflightBudget
    requests: ActiveRequests


@asynccontextmanager
async def serving(
    register: Callable[[grpc.aio.Server], None],
    services: Iterable[ServiceDescriptor],
    *,
    host: str,
    port: int,
    share_port: bool = False,
    drain_seconds: float,
    calls: Calls | None = None,
    untracked: frozenset[str] = frozenset(),
    guard: Guard | None = None,
    ready: Callable[[], bool],
    drain: Callable[[], Coroutine[object, object, None]] | None = None,
) -> AsyncGenerator[Serving, None]:
    """Serve until the block exits, then drain.

    register       adds the servicers
    services       descriptors of the services that it adds, for reflection and health
    port           0 picks a free one
    share_port     whether other servers may listen on it too; each connection then reaches one of them. By
                   default, another server on the port is an error
    drain_seconds  how long requests in flight may continue after the block exits; the rest then end with
                   DRAINING, so that their callers resume them on another server
    calls          runs the calls, within limits; by default one with default limits
    untracked      full names of methods that are not requests: streams that last as long as the connection,
                   and debug endpoints
    guard          decides which calls are accepted; by default all are
    ready          whether the server accepts requests; polled ten times per second for health's readiness
    drain          awaited, for at most *drain_seconds*, once new requests are rejected: returns the service's
                   unfinished work

    Raises PortInUse and CannotListen.
    """
    names = [service.full_name for service in services]
    health, calls = Health(names), calls or Calls()
    interceptor = ServerInterceptor(calls, untracked=untracked, guard=guard)
    server = accept_loop.server(
        [interceptor], (*_OPTIONS, *calls.budget.limits.options(), ("grpc.so_reuseport", int(share_port)))
    )
    register(server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    channelz.add_channelz_servicer(server)
    add_reflection(
        server,
        [
            *names,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            CHANNELZ.services_by_name["Channelz"].full_name,
        ],
    )
    bound = await _listen(server, host, port, share_port)
    # Spans name the pod rather than "0.0.0.0".
    calls.address = (socket.gethostname() if host in ("", "0.0.0.0", "::") else host, bound)
    await health.set_ready(False)
    await health.set_live()
    await server.start()
    log.info("serving", extra={"host": host, "port": bound})
    following = asyncio.create_task(health.follow(ready))
    try:
        yield Serving(bound, health, calls.budget, calls.requests)
    finally:
        following.cancel()
        calls.requests.drain()
        await health.set_ready(False)
        await _drain(server, calls.requests, drain_seconds, drain)


async def _drain(
    server: grpc.aio.Server,
    requests: ActiveRequests,
    seconds: float,
    drain: Callable[[], Coroutine[object, object, None]] | None,
) -> None:
    """Let requests in flight end within *seconds*, evict the rest, and stop the server."""
    began = time.monotonic()
    log.info("draining", extra={"in_flight": requests.in_flight, "seconds": seconds})
    # This sends GOAWAY to the callers and closes the port: their next request connects to another server
    # instead of being rejected here. Open streams continue.
    closing = asyncio.create_task(server.stop(seconds + _EVICT_SECONDS + _FORCE_SECONDS))
    try:
        async with asyncio.timeout(seconds):
            if drain is not None:
                await drain()
            while requests.in_flight:
                await asyncio.sleep(0.02)
    except TimeoutError:
        log.warning("drain timed out", extra={"in_flight": requests.in_flight})
        requests.evict()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EVICT_SECONDS):
                while requests.in_flight:
                    await asyncio.sleep(0.02)
    await server.stop(_FORCE_SECONDS)
    await closing
    log.info("stopped", extra={"drain_seconds": round(time.monotonic() - began, 3)})


async def _listen(server: grpc.aio.Server, host: str, port: int, shared: bool) -> int:
    find = functools.partial(bind_error, host, port, shared=shared)
    problem: Exception | None = await asyncio.to_thread(find)
    if problem is None:
        try:
            return server.add_insecure_port(join(host, port))
        except RuntimeError as error:  # in use since the check, or gRPC has another reason
            problem = await asyncio.to_thread(find) or error
    in_use = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
    raise (PortInUse if in_use else CannotListen)(explain(problem, host, port)) from problem


async def until_signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    received = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received.set)
    await received.wait()
    log.info("stop signal received")


def run(main: Coroutine[object, object, None], *, texts: bool = False) -> None:
    """Run a service's *main*, on uvloop where available.

    texts   whether the process holds text and computes little: it then returns memory as soon as possible

    Prints StartFailed as one line, without a traceback, and exits with status 1.
    """
    if failure := propagation.problem():
        main.close()
        log.critical(failure)
        raise SystemExit(1)
    raise_file_limit()
    collect_less_often()
    if texts:
        return_large_blocks()
        freeze_loaded_objects()
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):  # not available on Windows
        import uvloop

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)
    except* StartFailed as group:
        failure = str(errors.unwrap(group))
    if failure:
        log.critical(failure)
        raise SystemExit(1)
