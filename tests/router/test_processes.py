"""A router of several processes: one port, one service, and no answer lost with a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.channel import CHANNEL_OPTIONS, open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client
from headrace.runtime.serving.bind_check import bind_error
from headrace.runtime.serving.processes import RESTART_SECONDS, Roster, shared_port
from headrace.runtime.serving.server import PortInUse, serving
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux only")


@given(
    count=st.integers(1, 5),
    ends=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, -9, -15, 1, 2]), st.floats(0, 3))),
)
def test_each_process_is_running_or_due_until_one_fails(
    count: int, ends: Sequence[tuple[int, int, float]]
) -> None:
    roster, now, pids = Roster(count), 0.0, iter(range(100, 10_000))
    for place, status, later in ends:
        for number in roster.due(now):
            roster.start(number, next(pids), now)
        if roster.running:
            pid = sorted(roster.running)[place % len(roster.running)]
            roster.end(pid, status)
        if status > 0 and roster.stopping:
            assert roster.status in (1, 2)
            assert roster.due(now + 10) == []
            break
        now += later
        waiting = set(roster.due(now + RESTART_SECONDS))
        assert waiting | set(roster.running.values()) == set(range(count))
        assert not waiting & set(roster.running.values())


def test_a_process_that_ends_immediately_is_not_started_more_than_once_per_second() -> None:
    roster = Roster(1)
    roster.start(0, 100, 5.0)
    roster.end(100, -11)

    assert roster.due(5.5) == []
    assert roster.pause(5.5) == pytest.approx(RESTART_SECONDS - 0.5)
    assert roster.due(5.0 + RESTART_SECONDS) == [0]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
async def test_the_processes_share_their_port_and_no_other_server_can_use_it(host: str) -> None:
    def server(port: int, share: bool) -> object:
        return serving(
            lambda server: None,
            (),
            host=host,
            port=port,
            share_port=share,
            drain_seconds=0,
            ready=lambda: True,
        )

    with shared_port(host, 0) as port:
        with pytest.raises(OSError, match="in use"), shared_port(host, port):
            pass  # before the first of them listens
        async with server(port, True), server(port, True):  # type: ignore[attr-defined]
            assert bind_error(host, port) is not None
            with pytest.raises(PortInUse):
                async with server(port, False):  # type: ignore[attr-defined]
                    pass
    assert bind_error(host, port) is None


def test_a_shared_port_needs_one_that_is_free() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(OSError, match="in use"),
        shared_port("127.0.0.1", other.getsockname()[1]),
    ):
        pass


@dataclass
class Routers:
    """A router of several processes: its supervisor and its log."""

    supervisor: asyncio.subprocess.Process
    port: int
    log: Path

    @property
    def processes(self) -> list[int]:
        """The ids of the processes that serve."""
        path = Path(f"/proc/{self.supervisor.pid}/task/{self.supervisor.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def serving(self) -> int:
        """Return how many processes have opened the port since the start."""
        return self.log.read_text().count('"message": "serving"')


@asynccontextmanager
async def routers(mesh: Mesh, folder: Path, *flags: str, count: int = 2) -> AsyncGenerator[Routers, None]:
    """Start a router of *count* processes in front of the mesh's batchers."""
    tiers = ",".join(f"{name}=127.0.0.1:{part.batcher.server.port}" for name, part in mesh.tiers.items())
    log = folder / "router.log"
    with reserved_ports(1) as (port,), log.open("ab") as output:
        supervisor = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "headrace.router", "--port", str(port), "--tiers", tiers),
            *("--processes", str(count), "--drain-seconds", "30", *flags),
            stdout=output,
            stderr=output,
        )
        running = Routers(supervisor, port, log)
        try:
            await eventually(lambda: running.serving() == count or supervisor.returncode is not None)
            yield running
        finally:
            if supervisor.returncode is None:
                supervisor.terminate()
            await asyncio.wait_for(supervisor.wait(), PATIENCE)


@asynccontextmanager
async def clients(port: int, count: int) -> AsyncGenerator[list[Client], None]:
    """Open clients with a connection each; by default clients of one target share one."""
    options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                Client(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options))
            )
            for _ in range(count)
        ]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
async def mesh() -> AsyncGenerator[Mesh, None]:
    async with running_mesh("only", engine=lambda: EchoEngine(step_seconds=0.02)) as running:
        yield running


async def test_answers_survive_a_process_that_is_killed_and_it_is_replaced(
    mesh: Mesh, tmp_path: Path
) -> None:
    text = "the answer of an echo engine, one byte per token " * 4
    async with routers(mesh, tmp_path) as running, clients(running.port, 12) as callers:
        before = running.processes
        answers = [asyncio.create_task(collect(client, prompt(text))) for client in callers]
        await eventually(lambda: mesh.tiers["only"].worker.streams.in_flight == len(callers))
        os.kill(before[0], signal.SIGKILL)
        texts = {(await answer).text for answer in answers}
        await eventually(lambda: running.serving() == 3)
        after = running.processes

    assert texts == {text}
    assert len(after) == 2
    assert before[1] in after
    assert before[0] not in after
    assert running.supervisor.returncode == 0


async def test_both_processes_serve(mesh: Mesh, tmp_path: Path) -> None:
    """Twenty connections that all reach one of two processes would happen once in half a million runs."""
    async with routers(mesh, tmp_path) as running, clients(running.port, 20) as callers:
        await asyncio.gather(*(collect(client, prompt("hello")) for client in callers))
        held = [len(os.listdir(f"/proc/{pid}/fd")) for pid in running.processes]
        bill = (await callers[0].list_tiers()).bill

    assert len(held) == 2
    assert max(held) - min(held) < 20, "each has connections"
    assert bill.charges[0].answers == 20


async def test_a_stop_signal_drains_all_processes_and_frees_the_port(mesh: Mesh, tmp_path: Path) -> None:
    text = "an answer that takes two seconds " * 6
    async with routers(mesh, tmp_path) as running, clients(running.port, 6) as callers:
        pids = running.processes
        answers = [asyncio.create_task(collect(client, prompt(text))) for client in callers]
        await eventually(lambda: mesh.tiers["only"].worker.streams.in_flight == len(callers))
        running.supervisor.terminate()
        await eventually(lambda: bind_error("127.0.0.1", running.port) is None)
        drained = [(await answer).text for answer in answers]
        status = await asyncio.wait_for(running.supervisor.wait(), PATIENCE)

    assert drained == [text] * 6
    assert status == 0
    assert all(gone(pid) for pid in pids)


async def test_processes_end_with_their_supervisor(mesh: Mesh, tmp_path: Path) -> None:
    async with routers(mesh, tmp_path) as running:
        pids = running.processes
        running.supervisor.kill()
        await running.supervisor.wait()
        await eventually(lambda: all(gone(pid) for pid in pids))

    assert "draining" in running.log.read_text()


async def test_a_start_that_fails_ends_the_service_with_its_reason(mesh: Mesh, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "feedback.jsonl"
    async with routers(mesh, tmp_path, "--feedback", str(missing)) as running:
        status = await asyncio.wait_for(running.supervisor.wait(), PATIENCE)

    assert status == 1
    assert f"--feedback {missing} cannot be written" in running.log.read_text()


async def test_two_routers_on_one_port_are_refused(mesh: Mesh, tmp_path: Path) -> None:
    async with routers(mesh, tmp_path) as running:
        for flags in (["--processes", "2"], []):
            second = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "headrace.router", "--port", str(running.port)),
                *("--tiers", "only=127.0.0.1:1", *flags),
                stderr=asyncio.subprocess.PIPE,
            )
            _, printed = await asyncio.wait_for(second.communicate(), PATIENCE)
            assert second.returncode == 1
            assert b"the port is in use by another process" in printed


async def test_port_0_is_one_port_for_all_processes(mesh: Mesh, tmp_path: Path) -> None:
    async with routers(mesh, tmp_path, "--port", "0") as running:
        lines = [line for line in running.log.read_text().splitlines() if '"serving"' in line]
        ports = [json.loads(line)["port"] for line in lines]
        async with open_channel(f"127.0.0.1:{ports[0]}") as channel, asyncio.timeout(PATIENCE):
            await channel.channel_ready()

    assert ports == [ports[0]] * 2
