"""Run a whole mesh on this machine: per tier a worker and one or more batchers, and the router.

`plan_processes` decides on commands and ports; `mesh` runs the processes and yields when all are ready.
`headrace up`, the demo and tests with real processes use it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import re
import socket
import sys
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import models
from headrace.channel import open_channel
from headrace.cli.launch import child
from headrace.cli.launch.cores import cores, parallel_processes, worker_threads
from headrace.cli.launch.processes import ChildDied, Crew, Process, crew, notices_of, stage_of
from headrace.runtime.serving.bind_check import bind_error, explain

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
    from pathlib import Path

HOST = "127.0.0.1"
_POLL_SECONDS = 0.1
_PHASES = ("starting", "loading", "ready")
_STOP_SECONDS = 12.0  # after the drain, to return unfinished work, flush telemetry and exit
# `plan_processes` sets these for each process; inherited values would reach the wrong ones.
_PLANNED = {
    f"HEADRACE_{name}"
    for name in (
        *("HOST", "PORT", "METRICS_PORT", "PROCESSES"),
        *("TIER", "TIERS", "WORKERS", "MODEL", "FAKE", "THREADS"),
    )
}


class BadSpec(Exception):
    """The requested mesh is not possible. The message states why."""


@dataclass(frozen=True)
class TierSpec:
    """A tier: its name and the model it serves, as the user wrote it."""

    name: str
    model: str = ""


DEFAULT_TIERS = (TierSpec("small", models.SMALL), TierSpec("large", models.LARGE))


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """The mesh to run."""

    cache: Path
    log_dir: Path
    tiers: Sequence[TierSpec] = DEFAULT_TIERS  # smallest first
    fake: bool = False  # echo engines instead of models
    fake_step_seconds: float = 0.02  # of a step of an echo engine; 0 for no delay
    port: int = 0  # of the router; 0 for a free one
    metrics_port: int = 0  # of the first endpoint for Prometheus; the next ports are the others'. 0 for none
    device: str = ""  # empty: the worker's default
    dtype: str = ""  # empty: the worker's default
    threads: int = 0  # per worker; 0 divides the cores between the workers
    processes: int = 0  # of the router, and batchers per tier; 0 for as many as the cores allow
    drain_seconds: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)  # for every process
    # Additional flags, by "worker", "batcher" and "router".
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class StartState:
    """The state of a starting process."""

    process: Process
    phase: str  # one of _PHASES; a process that is "starting" does not answer yet
    detail: str  # what it loads, if it has logged it
    seconds: float  # since the start of the mesh


@dataclass(frozen=True)
class Running:
    """A mesh that is ready."""

    address: str  # of the router
    processes: Sequence[Process]
    pids: Mapping[str, int]


def parse_tier(text: str, *, fake: bool = False) -> TierSpec:
    """Read NAME=MODEL, or with *fake* NAME alone. Raises BadSpec."""
    name, _, model = (piece.strip() for piece in text.partition("="))
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name):
        raise BadSpec(
            f"--tier {text!r}: {name!r} is not a valid name of a tier; use a-z, 0-9, '.', '_' and '-'"
        )
    if not model and not fake:
        raise BadSpec(
            f"--tier {text!r} has no model; write NAME=MODEL, for example "
            f"small={models.SMALL} or small=/path/to/model.gguf"
        )
    return TierSpec(name, model)


def parse_tiers(texts: Sequence[str], *, fake: bool = False) -> Sequence[TierSpec]:
    """Read all --tier flags, smallest tier first; without any, the two default tiers. Raises BadSpec."""
    tiers = [parse_tier(text, fake=fake) for text in texts]
    names = [tier.name for tier in tiers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadSpec(f"--tier has {', '.join(twice)} more than once")
    return tiers or DEFAULT_TIERS


def require_free(port: int) -> None:
    """Raise BadSpec if this process cannot listen on *port*. Port 0, for any free one, is always possible."""
    problem = bind_error(HOST, port)
    if problem is None:
        return
    taken = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
    hint = ". Is a mesh running already?" if taken else ""
    raise BadSpec(explain(problem, HOST, port) + hint) from problem


def free_ports(count: int) -> list[int]:
    """Return *count* free ports; see `reserved_ports`."""
    with reserved_ports(count) as ports:
        return ports


@contextmanager
def reserved_ports(count: int) -> Generator[list[int], None, None]:
    """Find *count* free ports; no other caller finds the same ones while the block runs.

    Without the reservation, two meshes that start at the same time can choose the same port, seconds before
    either listens on it. A UDP socket reserves a port: it does not prevent listening for TCP.

    Ephemeral ports are not used: a connection may take one before the child listens, and a connection to an
    ephemeral port without a listener can even connect to itself.
    """
    candidates = iter(random.sample(range(20_000, 32_000), k=1_000))
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = next(candidates)
            with suppress(BadSpec, OSError):
                held.enter_context(socket.socket(type=socket.SOCK_DGRAM)).bind((HOST, port))
                require_free(port)
                found.append(port)
        yield found


def environment(spec: MeshSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the children: *inherited* without planned settings, and that of *spec*."""
    kept = {name: value for name, value in inherited.items() if name not in _PLANNED}
    # The threads of a worker synchronise some hundred times per step. Without spinning they resume slowly:
    # a step of SmolLM2 on two cores takes 49 ms, with the default spinning of GNU OpenMP 27 ms. But spinning
    # threads occupy the cores: beside a second such worker, a step takes 813 ms. With a short spin of about
    # 10 us it takes 30 ms alone; where workers share the cores, one thread each is best.
    return {"GOMP_SPINCOUNT": "10000", **kept, **spec.environment}


def processes_of(spec: MeshSpec, cores: int) -> int:
    """Decide how many processes the router has, and how many batchers each tier has."""
    if spec.processes or sys.platform != "linux":  # elsewhere, processes cannot share the router's port
        return spec.processes or 1
    on_cpu = not spec.fake and spec.device in ("", "cpu")
    return parallel_processes(cores, len(spec.tiers), threads=_threads(spec, cores) if on_cpu else 1)


def ports_needed(spec: MeshSpec, cores: int) -> int:
    """Return how many ports `plan_processes` needs: one per worker and batcher, and one for the router."""
    return len(spec.tiers) * (1 + processes_of(spec, cores)) + 1


def plan_processes(spec: MeshSpec, ports: Sequence[int], *, cores: int) -> list[list[Process]]:
    """Decide on the processes, as stages: the workers, the batchers, and the router.

    The router is one process here, which starts the others itself and listens with them on one port. Batchers
    have a port each, because the router chooses between them by their load.

    ports   `ports_needed` free ports; the last one is the router's if spec.port is 0
    """
    inherited = environment(spec, os.environ)
    parallel = processes_of(spec, cores)
    metrics_ports = itertools.count(spec.metrics_port + parallel)  # after those of the router's processes
    workers, rest = ports[: len(spec.tiers)], ports[len(spec.tiers) :]
    batchers = [rest[place * parallel :][:parallel] for place in range(len(spec.tiers))]

    def process(kind: str, name: str, port: int, *flags: str, tier: str = "") -> Process:
        common = ["--host", HOST, "--port", str(port), "--drain-seconds", str(spec.drain_seconds)]
        # HEADRACE_TRACE_CONTEXT is for external callers, which call the router. Variables rather than flags,
        # because benchmarks also start older versions, which do not have the flags.
        own = {} if kind == "router" else {"HEADRACE_TRACE_CONTEXT": "trust", "HEADRACE_TIER": tier}
        if spec.metrics_port:
            own["HEADRACE_METRICS_PORT"] = str(spec.metrics_port if kind == "router" else next(metrics_ports))
        return Process(
            name=name,
            command=[
                sys.executable,
                # By path: PYTHONPATH may name the services of another version, which has no such module.
                *("-P", child.__file__, str(os.getpid()), f"headrace.{kind}"),
                *common,
                *flags,
                *spec.flags.get(kind, ()),
            ],
            log=spec.log_dir / f"{name}.log",
            environment={**inherited, **own},
            port=port,
        )

    def engine(tier: TierSpec) -> list[str]:
        return ["--fake"] if spec.fake else ["--model", tier.model, "--cache", str(spec.cache)]

    step = ["--fake-step-seconds", str(spec.fake_step_seconds)]
    compute = step if spec.fake else ["--threads", str(_threads(spec, cores))]
    compute += [f"--device={spec.device}"] if spec.device else []
    compute += [f"--dtype={spec.dtype}"] if spec.dtype else []
    routes = ",".join(
        f"{tier.name}={'+'.join(f'{HOST}:{port}' for port in own)}"
        for tier, own in zip(spec.tiers, batchers, strict=True)
    )
    return [
        [
            process("worker", f"worker-{tier.name}", port, *engine(tier), *compute, tier=tier.name)
            for tier, port in zip(spec.tiers, workers, strict=True)
        ],
        [
            process(
                *("batcher", f"batcher{number if number > 1 else ''}-{tier.name}", port),
                *("--tier", tier.name, "--workers", f"{HOST}:{worker}", *engine(tier)),
                tier=tier.name,
            )
            for tier, own, worker in zip(spec.tiers, batchers, workers, strict=True)
            for number, port in enumerate(own, start=1)
        ],
        [
            process(
                *("router", "router", spec.port or ports[-1], "--tiers", routes),
                # Benchmarks also start older versions, which do not have the flag.
                *(("--processes", str(parallel)) if parallel > 1 else ()),
            )
        ],
    ]


def _threads(spec: MeshSpec, cores: int) -> int:
    return spec.threads or worker_threads(cores, len(spec.tiers))


@asynccontextmanager
async def mesh(
    spec: MeshSpec,
    *,
    on_states: Callable[[Sequence[StartState]], None] = lambda states: None,
    notify: Callable[[str], None] = lambda line: None,
) -> AsyncGenerator[Running, None]:
    """Run the mesh of *spec* while the block runs. The block starts when every process is ready.

    on_states   called several times a second during the start
    notify      receives the notices of processes when all are ready, such as weights that are not used, and
                problems while they stop

    Raises BadSpec before a process is started, and ChildDied, which cancels the block, when a process ends.
    """
    require_free(spec.port)
    try:
        spec.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSpec(f"cannot write logs to {spec.log_dir}: {error.strerror}; see --log-dir") from error
    available = cores()
    with reserved_ports(ports_needed(spec, available)) as ports:
        stages = plan_processes(spec, ports, cores=available)
        async with crew(stages, grace=spec.drain_seconds + _STOP_SECONDS, notify=notify) as running:
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(running.watch())
                    processes = [process for stage in stages for process in stage]
                    await _until_ready(processes, on_states)
                    for process in processes:
                        for notice in notices_of(process.log):
                            notify(f"{process.name}: {notice}")
                    router = processes[-1]
                    yield Running(f"{HOST}:{router.port}", processes, running.pids)
                    watch.cancel()
            except Exception as error:
                raise _root_cause(error, running) from error


def _root_cause(error: Exception, running: Crew) -> Exception:
    """Return the end of a child rather than the errors it caused, and unwrap groups of one exception."""
    leaf: Exception = error
    while isinstance(leaf, ExceptionGroup):
        deaths, _ = leaf.split(ChildDied)
        if deaths is None and len(leaf.exceptions) > 1:
            break
        leaf = (deaths or leaf).exceptions[0]
    return leaf if isinstance(leaf, ChildDied) else running.ended() or leaf


async def _until_ready(
    processes: Sequence[Process], on_states: Callable[[Sequence[StartState]], None]
) -> None:
    """Poll the health of each process until all are ready, and report it to *on_states*."""
    began = time.monotonic()
    states = {process.name: StartState(process, "starting", "", 0.0) for process in processes}

    async def follow(process: Process) -> None:
        async with open_channel(f"{HOST}:{process.port}", direct=True) as channel:
            phase = "starting"
            while phase != "ready":
                # A busy process may answer too late; its phase does not go back.
                phase = max(phase, await _phase(channel), key=_PHASES.index)
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


async def _phase(channel: grpc.aio.Channel) -> str:
    health: Any = health_pb2_grpc.HealthStub(channel)
    try:
        reply = await health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=1.0)
    except grpc.aio.AioRpcError:
        return "starting"
    return "ready" if reply.status == health_pb2.HealthCheckResponse.SERVING else "loading"
