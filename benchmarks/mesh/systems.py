"""Start the services that are measured: those of this checkout, and those of another one beside them.

The client is always this checkout's. Limits of the servers are raised by variables, which older services
ignore if they do not know them, so that all streams of a run are admitted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

from benchmarks.machine import QUIET, Window, until_quiet
from benchmarks.mesh.answers import ask, at_once
from headrace.cli.calls.connection import Connection
from headrace.cli.launch.mesh import HOST, MeshSpec, TierSpec, mesh
from headrace.client import Client
from headrace.runtime.security.callers_file import entry_for, new_token

T = TypeVar("T")

TIER = "only"
# Of each server. One connection may hold half of the calls, and a quarter of the bytes while messages are not
# complete: on a busy machine that is 2 MiB for each call that has just begun.
LIMITS = {
    "HEADRACE_MAX_CALLS": "8192",
    "HEADRACE_MAX_CONCURRENT_STREAMS": "4096",
    "HEADRACE_MAX_INFLIGHT_MEGABYTES": "16384",
}


@dataclass(frozen=True)
class EngineSpec:
    """An echo engine.

    step_seconds   the time of a step; the engine's own code comes on top of it
    max_running    most sequences that run at a time
    step_tokens    most tokens of a step, but at least max_running
    """

    step_seconds: float
    max_running: int = 256
    step_tokens: int = 128


@dataclass(frozen=True)
class System:
    """Services that are measured, by this name.

    checkout      the checkout that contains them; None for this one
    environment   more variables for each process
    multiplex     whether the client uses a shared stream, as `connect` takes it; older services have none
    tls           whether all connections use TLS, with client certificates
    tokens        whether the router asks callers for bearer tokens
    gateway       whether there is a gateway in front of the router
    """

    name: str
    checkout: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    multiplex: bool | None = None
    tls: bool = False
    tokens: bool = False
    gateway: bool = False


@dataclass(frozen=True)
class Served:
    """Running services: a client of the router, one of the batcher, and the processes by kind.

    connection   how a command connects to the router
    url          of the gateway; empty without one
    """

    name: str
    connection: Connection
    client: Client
    batcher: Client
    processes: Mapping[str, psutil.Process]
    url: str = ""

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time of each process until now, and of this process as `client`."""
        used = {}
        for kind, process in self.processes.items():
            times = process.cpu_times()
            used[kind] = times.user + times.system
        return {**used, "client": time.process_time()}

    def resident_bytes(self) -> dict[str, int]:
        """Return the resident memory of each process."""
        return {kind: process.memory_info().rss for kind, process in self.processes.items()}


def systems(before: Path | None) -> list[System]:
    """Return the systems to measure: this checkout's services, and those of *before*."""
    return [System("mesh"), *([System("before", before, multiplex=False)] if before else [])]


def in_turn(systems: Sequence[T], repetition: int) -> list[T]:
    """Return the systems in the order of one repetition: reversed in each second one.

    What is measured second finds warm caches and a warm client, so each system is second equally often.
    """
    return list(systems if repetition % 2 == 0 else reversed(systems))


@asynccontextmanager
async def window(served: Mapping[str, Served], patience: float) -> AsyncGenerator[Window, None]:
    """Wait until other processes are quiet, at most *patience* seconds, and measure them during the block."""
    pids = [process.pid for one in served.values() for process in one.processes.values()]
    await until_quiet(patience, pids)
    measured = Window(pids)
    measured.open()
    yield measured
    measured.close()


class Run(Protocol):
    """The figures of one run; *others* is the number of cores that other processes used."""

    @property
    def others(self) -> float: ...


R = TypeVar("R", bound=Run)


def median_run(runs: Sequence[R], key: Callable[[R], float]) -> R:
    """Return the run with the median of *key*, among those that others did not disturb if there are any."""
    quiet = [run for run in runs if run.others <= QUIET] or runs
    return sorted(quiet, key=key)[len(quiet) // 2]


def progress(line: str) -> None:
    """Print what is being measured."""
    print(line, file=sys.stderr, flush=True)


@asynccontextmanager
async def serving(systems: Sequence[System], engine: EngineSpec) -> AsyncGenerator[dict[str, Served], None]:
    """Run all systems while the block runs. Each has answered a few requests when the block starts."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served: dict[str, Served] = {}
        for system in systems:
            callers = _callers(folder / f"{system.name} callers") if system.tokens else None
            running = await stack.enter_async_context(mesh(_spec(system, engine, folder, callers)))
            ports = {_kind(process.name): process.port for process in running.processes}
            connections = {
                kind: Connection(
                    target=f"{HOST}:{ports[kind]}",
                    token_file=callers.token if callers is not None and kind == "router" else None,
                ).secured(running.certificates)
                for kind in ("router", "batcher")
            }
            clients = {
                kind: await stack.enter_async_context(connection.open(multiplex=system.multiplex))
                for kind, connection in connections.items()
            }
            for client in clients.values():
                await at_once(partial(ask, client, tokens=32), 4)
            processes = {_kind(name): psutil.Process(pid) for name, pid in running.pids.items()}
            served[system.name] = Served(
                system.name,
                connections["router"],
                clients["router"],
                clients["batcher"],
                processes,
                running.gateway,
            )
        yield served


@dataclass(frozen=True)
class _Callers:
    """A file of callers for a router, and a file with the token of one of them."""

    file: Path
    token: Path


def _callers(folder: Path) -> _Callers:
    """List as many callers as a company may have."""
    folder.mkdir()
    made = _Callers(folder / "callers.toml", folder / "token")
    tokens = [new_token() for _ in range(1000)]
    names = [f"caller {number}" for number in range(len(tokens))]
    made.file.write_text(
        "\n".join(entry_for(token, name=name, tenant=name) for token, name in zip(tokens, names, strict=True))
    )
    made.token.write_text(tokens[0])
    return made


def _spec(system: System, engine: EngineSpec, folder: Path, callers: _Callers | None) -> MeshSpec:
    environment = {**LIMITS, **system.environment}
    # The first folder that contains a module provides it.
    services = str(system.checkout / "services") if system.checkout else os.environ.get("PYTHONPATH", "")
    folders = (environment.get("PYTHONPATH", ""), services)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    return MeshSpec(
        cache=folder,
        log_dir=folder / system.name,
        tiers=[TierSpec(TIER)],
        fake=True,
        echo_flags=_echo_flags(system),
        processes=1,
        tls=system.tls,
        gateway_port=0 if system.gateway else None,
        fake_step_seconds=engine.step_seconds,
        environment=environment,
        flags={
            "worker": [
                *("--max-running", str(engine.max_running)),
                *("--step-tokens", str(engine.step_tokens)),
            ],
            "batcher": ["--queue-limit", str(2 * engine.max_running)],
            "router": ["--auth-tokens", str(callers.file)] if callers is not None else [],
        },
    )


def _echo_flags(system: System) -> Sequence[str]:
    """Return the flags of a worker with an echo engine: older versions have another one."""
    settings = system.checkout and system.checkout / "services" / "headrace" / "worker" / "settings.py"
    older = settings is not None and "engine: Literal" not in settings.read_text()
    return ("--fake",) if older else ("--engine", "echo")


def _kind(name: str) -> str:
    """Return router, batcher or worker for the name of a process."""
    return name.partition("-")[0]
