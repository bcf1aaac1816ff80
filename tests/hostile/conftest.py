"""Run attacks on one mesh of real processes, and add each to the table build/hostile.md."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from headrace.v1 import admin_service_pb2 as admin
from tests import tables
from tests.faults.fleet import Child, Fleet, Plan, fleet
from tests.hostile.honest import Seen, ask_for, ask_until, percentile
from tests.tables import add_row

SEED = int(os.environ.get("HEADRACE_HOSTILE_SEED", "0")) or 20261127
FLOOR_SECONDS = 0.3  # the least p99 to compare with: attacks may take both cores of a small machine
# Beside other tests the cause of a late answer is unknown: then no request may fail or hang, and that is all.
ALONE = "PYTEST_XDIST_WORKER" not in os.environ
CALM_SECONDS = 0.5
TRIES = 3  # an attack is repeated if the honest caller was late: the machine itself may have stalled
RELEASE_SECONDS = 10.0
RETAINED_BYTES = 96 * 2**20  # memory that an allocator may keep
RETAINED_COUNT = 10  # tasks and open files by which an idle process may differ, such as those of its polls
QUOTAS = """
[tenants.fuzz]
requests_per_minute = 100000
tokens_per_minute = 100000000
"""
UNPRINTABLE = {*range(32), 127} - {ord("\n")}
PLAN = Plan(
    workers=1,
    batchers=1,
    routers=1,
    worker_module="headrace.worker",
    worker_flags=("--engine", "echo", "--fake-step-seconds", "0.005", "--max-running", "16"),
)


@dataclass
class Row:
    """One attack, and its effect on the honest caller and the processes."""

    name: str
    at: str
    outcomes: Counter[str]
    normal: Seen
    beside: Seen
    peaks: dict[str, int]
    note: str = ""

    def published(self) -> tables.Row:
        """Return it as a row of the run's table."""

        def times(seen: Seen) -> str:
            return " / ".join(f"{percentile(seen.seconds, share) * 1000:.0f}" for share in (0.5, 0.99))

        cells = [
            self.name.replace("_", " ") + self.note,
            self.at,
            f"{self.outcomes.total():,}",
            ", ".join(f"{outcome} {count:,}" for outcome, count in self.outcomes.most_common(5)),
            f"{len(self.beside.seconds)} / {len(self.beside.failed)}",
            times(self.normal),
            times(self.beside),
            " / ".join(f"{peak / 2**20:.0f}" for peak in self.peaks.values()),
        ]
        return tables.Row("hostile", f"hostile callers (seed {SEED})", HEAD, cells)


HEAD = (
    "attack",
    "at the",
    "attempts",
    "ended as",
    "honest: asked / failed",
    "p50 / p99 before, ms",
    "beside it, ms",
    "peak MiB: worker / batcher / router",
)


@pytest.fixture(scope="package")
async def few_files() -> AsyncGenerator[None, None]:
    """Set the usual soft limit of open files for the processes that are started now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="package")
async def target(mesh: Fleet) -> Target:
    """Return the mesh that this run attacks."""
    return Target(mesh, await calm(mesh))


Attack = Callable[..., Awaitable[Row]]


@pytest.fixture
def attack(target: Target, request: pytest.FixtureRequest) -> Attack:
    """Return `Target.attack`, repeated at most `TRIES` times while the honest caller is late."""

    async def run(service: str, *names: str, **options: Any) -> Row:
        for _ in range(TRIES):
            row, late = await target.attack(service, *names, **options)
            if not late:
                break
        add_row(request.node, row.published())
        assert not late, f"the honest caller's p99 was {late:.2f} s beside the attack"
        return row

    return run


@pytest.fixture(scope="package")
async def mesh(few_files: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Fleet, None]:
    """Run one of each service, warmed up, with the echo engine."""
    folder = tmp_path_factory.mktemp("hostile")
    (quotas := folder / "quotas.toml").write_text(QUOTAS)
    plan = dataclasses.replace(PLAN, router_flags=("--quotas", str(quotas)))
    async with fleet(plan, folder) as running:
        await ask_for(running.target, 2)
        yield running


def at(running: Fleet, service: str) -> Child:
    """Return the process of a service."""
    return {"worker": running.workers, "batcher": running.batchers, "router": running.routers}[service][0]


async def run_attack(name: str, port: int, seconds: float) -> Counter[str]:
    """Run one attack as a process. Returns its outcomes."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.hostile.attack", name, str(port), str(SEED), str(seconds)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, problem = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, problem.decode()[-3000:]
    return Counter(json.loads(out.decode().splitlines()[-1]))


async def _peaks(running: Fleet, over: asyncio.Event) -> dict[str, int]:
    peaks = {child.name: child.memory for child in running.children}
    while not over.is_set():
        for child in running.children:
            if child.alive:
                peaks[child.name] = max(peaks[child.name], child.memory)
        await asyncio.sleep(0.05)
    return peaks


async def calm(running: Fleet) -> Seen:
    """Run the honest caller without an attack."""
    seen = await ask_for(running.target, CALM_SECONDS)
    assert not seen.failed
    return seen


class Target:
    """A running mesh that is attacked.

    `before` has the results of the honest caller since the last attack.
    """

    def __init__(self, running: Fleet, before: Seen) -> None:
        self.running = running
        self.before = before

    async def attack(
        self, service: str, *names: str, seconds: float, note: str = "", prompt: bool = True
    ) -> tuple[Row, float]:
        """Run attacks at once against a service, beside an honest caller, and check what holds for all.

        prompt   whether the honest caller must also be as fast as usual, where no other tests run beside

        Returns the table's row, and the honest caller's p99 in seconds if it is too long, else 0. Raises
        AssertionError if a process ended, a request of the honest caller failed, a log has lines that the
        service did not write, or memory is not released.
        """
        running, normal = self.running, self.before
        held = {child.name: (await child.inspect()).process_state for child in running.children}
        logged = {child.name: child.log.stat().st_size for child in running.children}
        over = asyncio.Event()
        watching = asyncio.create_task(_peaks(running, over))
        asking = asyncio.create_task(ask_until(running.target, over))
        try:
            port = at(running, service).port
            counts = await asyncio.gather(*(run_attack(name, port, seconds) for name in names))
        finally:
            over.set()
        beside, peaks = await asking, await watching
        row = Row(" + ".join(names), service, sum(counts, Counter()), normal, beside, peaks, note)
        assert all(child.alive for child in running.children)
        assert not beside.failed
        self.before = await calm(running)
        usual = max(percentile(normal.seconds, 0.99), percentile(self.before.seconds, 0.99), FLOOR_SECONDS)
        slowest = percentile(beside.seconds, 0.99)
        late = ALONE and prompt and slowest > 3 * usual
        for child in running.children:
            judge_log(child, logged[child.name])
            await _all_is_released(child, held[child.name])
        return row, slowest if late else 0.0


def judge_log(child: Child, begin: int) -> None:
    """Check the log from offset *begin*: few JSON lines, all of them written by the service."""
    with child.log.open("rb") as log:
        log.seek(begin)
        text = log.read()
    assert len(text) < 200_000
    # Whatever the text of a caller contains, it cannot begin a line or reach a terminal.
    assert text.isascii()
    assert not set(text) & UNPRINTABLE
    for line in text.decode().splitlines():
        logged = json.loads(line)
        assert logged["service"] in child.name
        assert logged["message"] != "forged"
        # gRPC logs some calls that their callers broke as errors, in one short line.
        assert logged["level"] in ("INFO", "WARNING") or logged["logger"].startswith("grpc"), line
        assert "Traceback" not in line


async def _all_is_released(child: Child, before: admin.ProcessState) -> None:
    """Wait until a process holds about as much as before: requests, tasks, open files, memory."""
    most = admin.ProcessState(
        requests=before.requests,
        tasks=before.tasks + RETAINED_COUNT,
        files=before.files + RETAINED_COUNT,
        memory_bytes=before.memory_bytes + RETAINED_BYTES,
    )
    ends = asyncio.get_running_loop().time() + RELEASE_SECONDS
    while True:
        now = (await child.inspect()).process_state
        kept = [
            f"{getattr(now, name):,} {name}, at most {getattr(most, name):,}"
            for name in ("requests", "tasks", "files", "memory_bytes")
            if getattr(now, name) > getattr(most, name)
        ]
        if not kept:
            return
        assert asyncio.get_running_loop().time() < ends, f"{child.name} keeps {'; '.join(kept)}"
        await asyncio.sleep(0.1)
