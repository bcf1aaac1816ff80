"""Serve gRPC: our services, and what operators expect beside them on every port.

That is grpc.health.v1 with `readiness` and `liveness`, reflection v1 and v1alpha, channelz, message
limits, keepalive rules, and a drain that loses no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz
from grpc_channelz.v1.channelz_pb2 import DESCRIPTOR as CHANNELZ
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from headrace import errors, propagation
from headrace.channel import MAX_MESSAGE_BYTES, join
from headrace.runtime import accepting
from headrace.runtime.budget import Budget
from headrace.runtime.interceptors import Activity, ServerInterceptor, TraceContext
from headrace.runtime.limits import Limits, raise_file_limit
from headrace.runtime.listening import explained, obstacle
from headrace.runtime.memory import give_back_large_blocks, keep_what_is_loaded

log = logging.getLogger(__name__)

READINESS = "readiness"
LIVENESS = "liveness"
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients that have nothing to say ping each 20 s. At the default of five minutes the fourth ping would
    # end the connection as "too_many_pings". The core's name has no "recv", unlike that of its constant.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_channelz", 1),
    # Two servers on one port would each get half of the calls and none would complain.
    ("grpc.so_reuseport", 0),
)
_LIMITS = Limits()
_FOLLOW_SECONDS = 0.1
_EVICT_SECONDS = 2.0  # for requests that outlast the drain to be answered, on a machine that is busy
_FORCE_SECONDS = 0.5  # for calls that are still open when the drain is over, to hear that it is


class StartFailed(Exception):
    """The process cannot start, for a reason that a person can mend; the message says which."""


class CannotListen(StartFailed):
    """The address that the server should listen on cannot be used."""


class PortInUse(CannotListen):
    """Something else listens on the port."""


class Health:
    """The server's health as grpc.health.v1 reports it.

    "", `readiness` and the full name of each of *services* are its readiness; `liveness` is that it runs.
    """

    def __init__(self, services: Iterable[str] = ()) -> None:
        self.servicer = HealthServicer()
        self.ready = False
        self._names = ("", READINESS, *services)

    async def set_ready(self, ready: bool) -> None:
        """Say whether the server takes work."""
        self.ready = ready
        status = (
            health_pb2.HealthCheckResponse.SERVING if ready else (health_pb2.HealthCheckResponse.NOT_SERVING)
        )
        for name in self._names:
            await self.servicer.set(name, status)

    async def follow(self, ready: Callable[[], bool]) -> None:
        """Keep readiness as *ready* says, until cancelled."""
        while True:
            if (now := ready()) != self.ready:
                await self.set_ready(now)
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def set_live(self) -> None:
        """Say that the process runs."""
        await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True)
class Serving:
    """A running server.

    port    where it listens
    budget  what it has in hand
    """

    port: int
    health: Health
    budget: Budget
    activity: Activity = field(default_factory=Activity)


@asynccontextmanager
async def serving(
    register: Callable[[grpc.aio.Server], None],
    services: Iterable[ServiceDescriptor],
    *,
    host: str,
    port: int,
    drain_seconds: float,
    limits: Limits = _LIMITS,
    aside: frozenset[str] = frozenset(),
    activity: Activity | None = None,
    trace_context: TraceContext = "trust",
    ready: Callable[[], bool],
    drain: Callable[[], Coroutine[object, object, None]] | None = None,
) -> AsyncGenerator[Serving, None]:
    """Serve until the block is left, then drain.

    register       adds the servicers
    services       descriptors of the services it adds, for reflection and health
    port           0 picks a free one
    drain_seconds  how long requests in flight may go on after the block was left; those that are
                   left then end as DRAINING, so that their callers carry on elsewhere
    limits         what it holds for its callers at most
    aside          full method names of calls that are no requests: streams that last as long as the
                   connection, and looks inside
    activity       knows the requests in flight; one of its own unless told
    trace_context  what becomes of the trace context of callers
    ready          whether the server takes work, asked ten times a second: the readiness that health tells
    drain          awaited after admission has stopped, at most *drain_seconds*, for what the
                   service itself has to hand back

    Raises PortInUse and CannotListen.
    """
    names = [service.full_name for service in services]
    health, activity = Health(names), activity or Activity()
    budget = Budget(limits)
    interceptor = ServerInterceptor(activity, budget, untraced=aside, callers=trace_context)
    server = accepting.server([interceptor], (*_OPTIONS, *limits.options()))
    register(server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    channelz.add_channelz_servicer(server)
    _add_reflection(
        server,
        [
            *names,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            CHANNELZ.services_by_name["Channelz"].full_name,
        ],
    )
    bound = await _listen(server, host, port)
    await health.set_ready(False)
    await health.set_live()
    await server.start()
    log.info("serving", extra={"host": host, "port": bound})
    telling = asyncio.create_task(health.follow(ready))
    try:
        yield Serving(bound, health, budget, activity)
    finally:
        began = time.monotonic()
        telling.cancel()
        activity.draining = True
        await health.set_ready(False)
        log.info("draining", extra={"in_flight": activity.in_flight, "seconds": drain_seconds})
        # Callers are told to go (GOAWAY) and the port is closed: their next request opens a connection to
        # somebody else instead of being refused here. Streams that are open go on.
        closing = asyncio.create_task(server.stop(drain_seconds + _EVICT_SECONDS + _FORCE_SECONDS))
        try:
            async with asyncio.timeout(drain_seconds):
                if drain is not None:
                    await drain()
                while activity.in_flight:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("drain timed out", extra={"in_flight": activity.in_flight})
            activity.evict()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVICT_SECONDS):
                    while activity.in_flight:
                        await asyncio.sleep(0.02)
        await server.stop(_FORCE_SECONDS)
        await closing
        log.info("stopped", extra={"drain_seconds": round(time.monotonic() - began, 3)})


async def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    problem: Exception | None = await asyncio.to_thread(obstacle, host, port)
    if problem is None:
        try:
            return server.add_insecure_port(join(host, port))
        except RuntimeError as error:  # taken since, or refused by gRPC for a reason of its own
            problem = await asyncio.to_thread(obstacle, host, port) or error
    taken = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
    raise (PortInUse if taken else CannotListen)(explained(problem, host, port)) from problem


def _add_reflection(server: grpc.aio.Server, services: list[str]) -> None:
    alpha = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
    _describe_reflection_v1()
    servicer = ReflectionServicer([*services, alpha, REFLECTION_V1])
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    # The messages of v1 are those of v1alpha under another package; only the method's path differs.
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(REFLECTION_V1, {"ServerReflectionInfo": handler})


def _describe_reflection_v1() -> None:
    """Make reflection v1 describable: its package ships v1alpha alone, which differs in name only."""
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    v1 = descriptor_pb2.FileDescriptorProto()
    text_format.Parse(text_format.MessageToString(alpha).replace("v1alpha", "v1"), v1)
    descriptor_pool.Default().AddSerializedFile(v1.SerializeToString())


async def until_signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await asked.wait()
    log.info("asked to stop")


def run(main: Coroutine[object, object, None], *, texts: bool = False) -> None:
    """Run a service's main, on uvloop where there is one; what stops it is one line, not a traceback.

    texts   it holds texts and computes little: memory is given back as soon as it can be

    Exits with status 1 on a failure that a person can mend, such as a port in use.
    """
    if failure := propagation.problem():
        main.close()
        log.critical(failure)
        raise SystemExit(1)
    raise_file_limit()
    if texts:
        give_back_large_blocks()
        keep_what_is_loaded()
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):  # there is none for Windows
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
