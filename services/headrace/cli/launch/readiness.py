"""Follow the start of processes until all are ready.

Health is polled over gRPC, by its health protocol, and over HTTP by GET /health.
"""

from __future__ import annotations

import asyncio
import http
import http.client
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.channel import open_channel
from headrace.cli.launch.processes import stage_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from headrace.cli.launch.processes import Process
    from headrace.tls.files import TlsReader

PHASES = ("starting", "loading", "ready")
_POLL_SECONDS = 0.1
_CHECK_SECONDS = 1.0  # for the answer to one check


@dataclass(frozen=True)
class StartState:
    """The state of a starting process."""

    process: Process
    phase: str  # one of PHASES; a process that is "starting" does not answer yet
    detail: str  # what it loads, if it has logged it
    seconds: float  # since the start of the mesh


async def until_ready(
    processes: Sequence[Process],
    on_states: Callable[[Sequence[StartState]], None],
    *,
    host: str,
    tls: TlsReader | None,
) -> None:
    """Poll the health of each process until all are ready, and report it to *on_states*.

    host   where the processes listen
    tls    for those that are called over gRPC; None without TLS
    """
    began = time.monotonic()
    states = {process.name: StartState(process, "starting", "", 0.0) for process in processes}

    async def follow(process: Process) -> None:
        async with _poll(process, host, tls) as poll:
            phase = "starting"
            while phase != "ready":
                # A busy process may answer too late; its phase does not go back.
                phase = max(phase, await poll(), key=PHASES.index)
                detail = stage_of(process.log) if phase != "ready" else ""
                states[process.name] = StartState(process, phase, detail, time.monotonic() - began)
                await asyncio.sleep(_POLL_SECONDS)

    async def report() -> None:
        while True:
            on_states(list(states.values()))
            await asyncio.sleep(_POLL_SECONDS)

    async with asyncio.TaskGroup() as outer:
        reporting = outer.create_task(report())
        async with asyncio.TaskGroup() as inner:
            for process in processes:
                inner.create_task(follow(process))
        reporting.cancel()
    on_states(list(states.values()))


@asynccontextmanager
async def _poll(
    process: Process, host: str, tls: TlsReader | None
) -> AsyncGenerator[Callable[[], Awaitable[str]], None]:
    """Yield the function that finds the phase of a process."""
    if process.protocol == "http":
        yield partial(asyncio.to_thread, _http_phase, host, process.port)
        return
    async with open_channel(f"{host}:{process.port}", tls=tls, direct=True) as channel:
        yield partial(_grpc_phase, channel)


def _http_phase(host: str, port: int) -> str:
    connection = http.client.HTTPConnection(host, port, timeout=_CHECK_SECONDS)
    try:
        connection.request("GET", "/health")
        return "ready" if connection.getresponse().status == http.HTTPStatus.OK else "loading"
    except (OSError, http.client.HTTPException):
        return "starting"
    finally:
        connection.close()


async def _grpc_phase(channel: grpc.aio.Channel) -> str:
    health: Any = health_pb2_grpc.HealthStub(channel)
    try:
        reply = await health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=_CHECK_SECONDS)
    except grpc.aio.AioRpcError:
        return "starting"
    return "ready" if reply.status == health_pb2.HealthCheckResponse.SERVING else "loading"
