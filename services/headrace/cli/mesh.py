"""Bring up a whole mesh on this machine: worker and batcher per tier, and the router.

`plan` decides on commands and ports; `mesh` runs them as a crew and yields when all are ready to serve.
The demo, `headrace up` and tests that want real processes share it.
"""

from __future__ import annotations

import asyncio
import errno
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
from headrace.cli.processes import ChildDied, Crew, Process, crew, notices_of, stage_of
from headrace.runtime.serving.bind_check import bind_error, explain

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
    from pathlib import Path

HOST = "127.0.0.1"
_POLL_SECONDS = 0.1
_PHASES = ("starting", "loading", "ready")
_STOP_SECONDS = 12.0  # beyond the drain, to hand back what is unfinished, flush telemetry and end
# What `plan` decides; inherited values would reach processes that they were not meant for.
_OURS = {
    f"HEADRACE_{name}" for name in ("HOST", "PORT", "TIER", "TIERS", "WORKERS", "MODEL", "FAKE", "THREADS")
}


class BadSpec(Exception):
    """The mesh that was asked for cannot be: the message says why."""


@dataclass(frozen=True)
class TierSpec:
    """A tier: its name and the model it serves, as the user wrote it."""

    name: str
    model: str = ""


DEFAULT_TIERS = (TierSpec("small", models.SMALL), TierSpec("large", models.LARGE))


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """What to bring up."""

    cache: Path
    log_dir: Path
    tiers: Sequence[TierSpec] = DEFAULT_TIERS  # smallest first
    fake: bool = False  # echo engines instead of models
    fake_step_seconds: float = 0.02  # what a step of an echo engine takes; 0 is as fast as it can
    port: int = 0  # of the router; 0 picks a free one
    device: str = ""  # empty: the worker's default
    dtype: str = ""  # empty: the worker's default
    threads: int = 0  # per worker; 0 shares the cores out
    drain_seconds: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)  # for every process
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)  # more, by "worker", "batcher", "router"


@dataclass(frozen=True)
class State:
    """Where a starting process stands."""

    process: Process
    phase: str  # one of _PHASES; "starting" does not answer yet
    detail: str  # what it loads, if it says so
    seconds: float  # since the start of the mesh


@dataclass(frozen=True)
class Running:
    """A mesh that serves."""

    address: str  # of the router
    processes: Sequence[Process]
    pids: Mapping[str, int]


def parse_tier(text: str, *, fake: bool = False) -> TierSpec:
    """Read NAME=MODEL, or with *fake* NAME alone. Raises BadSpec."""
    name, _, model = (piece.strip() for piece in text.partition("="))
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name):
        raise BadSpec(f"--tier {text!r}: {name!r} is no name for a tier; use a-z, 0-9, '.', '_' and '-'")
    if not model and not fake:
        raise BadSpec(
            f"--tier {text!r} has no model; write NAME=MODEL, such as small={models.SMALL} or "
            "small=/path/to/model.gguf"
        )
    return TierSpec(name, model)


def parse_tiers(texts: Sequence[str], *, fake: bool = False) -> Sequence[TierSpec]:
    """Read all --tier flags, smallest first; none means the two defaults. Raises BadSpec."""
    tiers = [parse_tier(text, fake=fake) for text in texts]
    names = [tier.name for tier in tiers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadSpec(f"--tier names {', '.join(twice)} more than once")
    return tiers or DEFAULT_TIERS


def cores() -> int:
    """Count the cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_free(port: int) -> None:
    """Raise BadSpec if *port* is taken or not ours to take. 0, which stands for any free one, never is."""
    problem = bind_error(HOST, port)
    if problem is None:
        return
    taken = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
    hint = ". Is a mesh running already?" if taken else ""
    raise BadSpec(explain(problem, HOST, port) + hint) from problem


def free_ports(count: int) -> list[int]:
    """Find *count* ports that nobody listens on, nor is about to: see `reserved_ports`."""
    with reserved_ports(count) as ports:
        return ports


@contextmanager
def reserved_ports(count: int) -> Generator[list[int], None, None]:
    """Find *count* ports that nobody listens on; while the block lasts no other caller finds the same.

    Two meshes that start at once would otherwise now and then choose one port both, seconds before either
    listens there. What holds a port is a UDP socket: it is in the way of nobody who listens for TCP.

    Not the ports that the system hands out by itself: those may become some connection's own before the
    child listens, and a connection to such a port, while nobody listens, may even connect to itself.
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
    """Return the environment of the children: *inherited*, less what we decide, and what *spec* adds."""
    kept = {name: value for name, value in inherited.items() if name not in _OURS}
    # A worker's threads wait for each other some hundred times a step. Asleep they are slow to wake: a step
    # of SmolLM2 on two cores takes 49 ms, where spinning as long as GNU OpenMP does by itself takes 27.
    # Spinning, they take the cores from others: 813 ms beside a second such worker. A short spin, some 10 us,
    # takes 30 alone; and where workers share the cores, one thread each is best.
    return {"GOMP_SPINCOUNT": "10000", **kept, **spec.environment}


def plan(spec: MeshSpec, ports: Sequence[int], *, cores: int) -> list[list[Process]]:
    """Decide on the processes: workers, then batchers, then the router, each stage a list.

    *ports* are free, two for each tier and one more, for a router whose port is not given.
    """
    surroundings = environment(spec, os.environ)
    workers, batchers = ports[: len(spec.tiers)], ports[len(spec.tiers) : 2 * len(spec.tiers)]
    threads = spec.threads or max(1, cores // len(spec.tiers))

    def process(kind: str, name: str, port: int, *flags: str) -> Process:
        common = ["--host", HOST, "--port", str(port), "--drain-seconds", str(spec.drain_seconds)]
        # HEADRACE_TRACE_CONTEXT is meant for callers, and theirs is the router. Not by flag, which older
        # services that are measured beside these do not know.
        own = {} if kind == "router" else {"HEADRACE_TRACE_CONTEXT": "trust"}
        return Process(
            name=name,
            command=[
                sys.executable,
                *("-m", "headrace.cli.child", str(os.getpid()), f"headrace.{kind}"),
                *common,
                *flags,
                *spec.flags.get(kind, ()),
            ],
            log=spec.log_dir / f"{name}.log",
            environment={**surroundings, **own},
            port=port,
        )

    def engine(tier: TierSpec) -> list[str]:
        return ["--fake"] if spec.fake else ["--model", tier.model, "--cache", str(spec.cache)]

    pace = ["--fake-step-seconds", str(spec.fake_step_seconds)]
    compute = pace if spec.fake else ["--threads", str(threads)]
    compute += [f"--device={spec.device}"] if spec.device else []
    compute += [f"--dtype={spec.dtype}"] if spec.dtype else []
    routes = ",".join(f"{tier.name}={HOST}:{port}" for tier, port in zip(spec.tiers, batchers, strict=True))
    return [
        [
            process("worker", f"worker-{tier.name}", port, *engine(tier), *compute)
            for tier, port in zip(spec.tiers, workers, strict=True)
        ],
        [
            process(
                *("batcher", f"batcher-{tier.name}", port),
                *("--tier", tier.name, "--workers", f"{HOST}:{worker}", *engine(tier)),
            )
            for tier, port, worker in zip(spec.tiers, batchers, workers, strict=True)
        ],
        [process("router", "router", spec.port or ports[-1], "--tiers", routes)],
    ]


@asynccontextmanager
async def mesh(
    spec: MeshSpec,
    *,
    on_states: Callable[[Sequence[State]], None] = lambda states: None,
    say: Callable[[str], None] = lambda line: None,
) -> AsyncGenerator[Running, None]:
    """Run the mesh of *spec* while the block lasts; it is entered when every process is ready.

    *on_states* hears a few times a second how the start goes. *say* gets what a process wants known once all
    are ready, such as weights that are not used, and what goes wrong at the end. Raises
    BadSpec before anything is started, and ChildDied, cancelling the block, as soon as a process ends.
    """
    require_free(spec.port)
    try:
        spec.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSpec(f"cannot keep logs in {spec.log_dir}: {error.strerror}; see --log-dir") from error
    with reserved_ports(2 * len(spec.tiers) + 1) as ports:
        stages = plan(spec, ports, cores=cores())
        async with crew(stages, grace=spec.drain_seconds + _STOP_SECONDS, say=say) as running:
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(running.watch())
                    processes = [process for stage in stages for process in stage]
                    await _until_ready(processes, on_states)
                    for process in processes:
                        for notice in notices_of(process.log):
                            say(f"{process.name}: {notice}")
                    router = processes[-1]
                    yield Running(f"{HOST}:{router.port}", processes, running.pids)
                    watch.cancel()
            except Exception as error:
                raise _decisive(error, running) from error


def _decisive(error: Exception, running: Crew) -> Exception:
    """Name the death of a child before what the death did to others, and unwrap groups of one."""
    leaf: Exception = error
    while isinstance(leaf, ExceptionGroup):
        deaths, _ = leaf.split(ChildDied)
        if deaths is None and len(leaf.exceptions) > 1:
            break
        leaf = (deaths or leaf).exceptions[0]
    return leaf if isinstance(leaf, ChildDied) else running.dead() or leaf


async def _until_ready(processes: Sequence[Process], on_states: Callable[[Sequence[State]], None]) -> None:
    """Ask each process for its health until all are ready, and tell about it."""
    began = time.monotonic()
    states = {process.name: State(process, "starting", "", 0.0) for process in processes}

    async def follow(process: Process) -> None:
        async with open_channel(f"{HOST}:{process.port}", direct=True) as channel:
            phase = "starting"
            while phase != "ready":
                # A process that computes hard may be slow to answer; it has not gone back to the start.
                phase = max(phase, await _phase(channel), key=_PHASES.index)
                detail = stage_of(process.log) if phase != "ready" else ""
                states[process.name] = State(process, phase, detail, time.monotonic() - began)
                await asyncio.sleep(_POLL_SECONDS)

    async def tell() -> None:
        while True:
            on_states(list(states.values()))
            await asyncio.sleep(_POLL_SECONDS)

    async with asyncio.TaskGroup() as outer:
        telling = outer.create_task(tell())
        async with asyncio.TaskGroup() as inner:
            for process in processes:
                inner.create_task(follow(process))
        telling.cancel()
    on_states(list(states.values()))


async def _phase(channel: grpc.aio.Channel) -> str:
    health: Any = health_pb2_grpc.HealthStub(channel)
    try:
        reply = await health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=1.0)
    except grpc.aio.AioRpcError:
        return "starting"
    return "ready" if reply.status == health_pb2.HealthCheckResponse.SERVING else "loading"
