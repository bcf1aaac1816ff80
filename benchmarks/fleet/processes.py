"""Start workers, batchers and routers as processes on this machine, any number of each, with any interpreter.

`headrace.cli.launch` decides how a user's mesh looks; here the caller decides. Batchers know all workers, and
each router knows all batchers.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headrace.cli.launch import child
from headrace.cli.launch.mesh import HOST, reserved_ports
from headrace.cli.launch.processes import Process, crew
from headrace.cli.launch.readiness import until_ready

_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What to start.

    flags          of each kind of service, without ports and addresses
    environment    more variables for every process
    own            more variables for one kind of service
    python         the interpreter of the workers
    """

    logs: Path
    workers: int = 1
    batchers: int = 1
    routers: int = 1
    tier: str = "only"
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    python: Path = Path(sys.executable)


@dataclass(frozen=True)
class RunningFleet:
    """A fleet that is ready: the addresses of its routers and batchers, and process ids by kind."""

    routers: Sequence[str]
    batchers: Sequence[str]
    pids: Mapping[str, Sequence[int]]


def plan(fleet: Fleet, ports: Sequence[int], inherited: Mapping[str, str]) -> list[list[Process]]:
    """Return the processes as stages: workers, batchers, routers.

    ports       one for each process, in this order
    inherited   variables of this process; those named HEADRACE_* are not passed on
    """
    kept = {name: value for name, value in inherited.items() if not name.startswith("HEADRACE_")}
    counts = {"worker": fleet.workers, "batcher": fleet.batchers, "router": fleet.routers}
    left = iter(ports)
    at = {kind: [next(left) for _ in range(count)] for kind, count in counts.items()}
    addresses = {kind: [f"{HOST}:{port}" for port in own] for kind, own in at.items()}
    flags = {
        "worker": ["--tier", fleet.tier],
        "batcher": ["--tier", fleet.tier, "--workers", ",".join(addresses["worker"])],
        "router": ["--tiers", f"{fleet.tier}={'+'.join(addresses['batcher'])}"],
    }
    return [
        [
            Process(
                name=f"{kind}-{number}",
                command=[
                    str(fleet.python if kind == "worker" else sys.executable),
                    *("-P", child.__file__, str(os.getpid()), f"headrace.{kind}"),
                    *("--host", HOST, "--port", str(port), "--drain-seconds", "1"),
                    *flags[kind],
                    *fleet.flags.get(kind, ()),
                ],
                log=fleet.logs / f"{kind}-{number}.log",
                environment={**kept, **fleet.environment, **fleet.own.get(kind, {})},
                port=port,
            )
            for number, port in enumerate(ports_of_kind)
        ]
        for kind, ports_of_kind in at.items()
    ]


@asynccontextmanager
async def running(fleet: Fleet) -> AsyncGenerator[RunningFleet, None]:
    """Run a fleet while the block runs; the block starts when every process is ready.

    Raises ChildDied, in a group, when a process ends.
    """
    fleet.logs.mkdir(parents=True, exist_ok=True)
    with reserved_ports(fleet.workers + fleet.batchers + fleet.routers) as ports:
        stages = plan(fleet, ports, os.environ)
        processes = [process for stage in stages for process in stage]
        async with crew(stages, grace=_GRACE_SECONDS) as started, asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(started.watch())
            await until_ready(processes, lambda states: None, host=HOST, tls=None)
            workers, batchers, routers = stages
            yield RunningFleet(
                routers=[f"{HOST}:{process.port}" for process in routers],
                batchers=[f"{HOST}:{process.port}" for process in batchers],
                pids={
                    kind: [started.pids[process.name] for process in stage]
                    for kind, stage in (("worker", workers), ("batcher", batchers), ("router", routers))
                },
            )
            watch.cancel()
