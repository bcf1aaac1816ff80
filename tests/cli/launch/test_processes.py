"""Groups of child processes: deaths are reported, and they stop in order. The children are tiny scripts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from headrace.cli.launch.processes import (
    ChildDied,
    Process,
    crew,
    exit_description,
    log_folder,
    notices_of,
    readable,
    reason_of,
    stage_of,
    tail,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Prints when it is up. On SIGTERM it appends its name to the common file before it exits.
OBEDIENT = """
import signal, sys, time
def leave(*_):
    with open({record!r}, "a") as record:
        record.write({name!r} + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
while True:
    time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def child(tmp_path: Path) -> Callable[[str, str], Process]:
    def make(name: str, script: str) -> Process:
        return Process(
            name=name,
            command=[sys.executable, "-c", script],
            log=tmp_path / f"{name}.log",
            environment=dict(os.environ),
        )

    return make


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not condition():
            await asyncio.sleep(0.01)


def up(*processes: Process) -> bool:
    return all(process.log.exists() and "up" in process.log.read_text() for process in processes)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_stages_stop_in_reverse_order(child: Callable[[str, str], Process], tmp_path: Path) -> None:
    record = tmp_path / "record"
    names = ["worker", "batcher", "router"]
    stages = [[child(name, OBEDIENT.format(name=name, record=str(record)))] for name in names]

    async with crew(stages, grace=30) as running:
        await eventually(lambda: up(*(stage[0] for stage in stages)))
        pids = running.pids

    assert record.read_text().split() == ["router", "batcher", "worker"]
    assert not any(alive(pid) for pid in pids.values())


async def test_a_death_is_reported_with_exit_code_and_last_output(
    child: Callable[[str, str], Process],
) -> None:
    healthy = child("healthy", STUBBORN)
    doomed = child("doomed", "import sys; print('the last output'); sys.exit(3)")

    with pytest.raises(ChildDied, match="doomed ended with exit code 3") as death:
        async with crew([[healthy, doomed]], grace=0) as running:
            await running.watch()

    assert "the last output" in str(death.value)
    assert death.value.code == 3


async def test_a_child_that_does_not_stop_is_killed_and_named(child: Callable[[str, str], Process]) -> None:
    stubborn = child("stubborn", STUBBORN)
    said: list[str] = []

    async with crew([[stubborn]], grace=0.05, notify=said.append) as running:
        await eventually(lambda: up(stubborn))
        pid = running.pids["stubborn"]

    assert said == ["stubborn did not stop in time and was killed"]
    assert not alive(pid)


async def test_cancelling_the_stop_kills_immediately(child: Callable[[str, str], Process]) -> None:
    """A second Ctrl-C does not wait for the drain."""
    stubborn = child("stubborn", STUBBORN)
    began = asyncio.Event()

    async def hold() -> None:
        async with crew([[stubborn]], grace=3600):
            await eventually(lambda: up(stubborn))
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await began.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()

    async with asyncio.timeout(90):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_command_that_cannot_start_stops_the_others(
    child: Callable[[str, str], Process], tmp_path: Path
) -> None:
    first = child("first", STUBBORN)
    missing = Process(
        name="missing", command=[str(tmp_path / "nothing")], log=tmp_path / "missing.log", environment={}
    )

    with pytest.raises(FileNotFoundError):
        async with crew([[first], [missing]], grace=0):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread looks once a second")
def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """The parent starts a module through the launcher, prints its pid, and is killed."""
    (tmp_path / "sleeper.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    parent = textwrap.dedent(
        """
        import os, subprocess, sys, time
        child = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli.launch.child", str(os.getpid()), "sleeper"],
            stdout=subprocess.PIPE, start_new_session=True,
        )
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(600)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()

    asyncio.run(eventually(lambda: not alive(pid) or zombie(pid)))


def zombie(pid: int) -> bool:
    """Return whether a process has ended and has not been reaped."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_whose_parent_is_gone_ends_immediately() -> None:
    """The parent may end before the child can register for its death."""
    command = [sys.executable, "-m", "headrace.cli.launch.child", str(os.getpid() + 1), "this"]

    out = subprocess.run(command, capture_output=True, text=True, check=False)

    assert out.returncode == 1
    assert "has ended" in out.stderr


def test_a_missing_dependency_is_reported_with_the_install_command(tmp_path: Path) -> None:
    """`pip install 'headrace[cli]'` alone installs no worker; `headrace up` shows the child's message."""
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError('not here', name='pydantic')")

    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "headrace.cli.launch.child",
            str(os.getpid()),
            "headrace.worker",
            "--engine",
            "echo",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )

    assert out.returncode == 1
    assert out.stderr == "headrace.worker needs pydantic; install it by: pip install 'headrace[worker]'\n"


def test_exit_codes_in_words() -> None:
    assert exit_description(3) == "ended with exit code 3"
    assert exit_description(-signal.SIGKILL) == "was terminated by SIGKILL"


def test_log_lines_become_readable() -> None:
    line = json.dumps({"time": "t", "level": "ERROR", "logger": "x", "message": "no model", "path": "/m"})
    crash = json.dumps({"level": "ERROR", "message": "unexpected", "exc_info": "Traceback\n  boom"})

    assert readable(line) == "ERROR no model path=/m"
    assert readable(crash) == "ERROR unexpected\nTraceback\n  boom"
    for other in ("plain text", "[1]", "{}", "{broken"):
        assert readable(other) == other


def test_the_tail_of_a_log_is_short_and_of_a_missing_one_empty(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {n}" for n in range(10_000)))

    assert tail(log, 2) == ["line 9998", "line 9999"]
    assert tail(tmp_path / "nothing") == []


async def test_a_death_with_a_reason_is_reported_with_the_reason_alone(
    child: Callable[[str, str], Process],
) -> None:
    line = json.dumps({"level": "CRITICAL", "message": "/m/config.json is not JSON; correct it"})
    doomed = child("doomed", f"import sys; print('loading'); print({line!r}); sys.exit(1)")

    with pytest.raises(ChildDied) as death:
        async with crew([[doomed]], grace=0) as running:
            await running.watch()

    assert str(death.value) == (
        f"doomed ended with exit code 1: /m/config.json is not JSON; correct it (log: {doomed.log})"
    )


def test_the_reason_is_the_last_critical_line_unless_a_crash_came_after(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [json.dumps({"level": "CRITICAL", "message": which}) for which in ("first", "second")]

    log.write_text("\n".join(lines) + "\n")
    assert reason_of(log) == "second"
    log.write_text(lines[0] + "\nTraceback (most recent call last):\n  boom\n")
    assert reason_of(log) == ""
    assert reason_of(tmp_path / "nothing") == ""


def test_notices_are_the_lines_marked_as_such(tmp_path: Path) -> None:
    log = tmp_path / "log"
    records: list[object] = [
        {"level": "WARNING", "message": "3 weights are not used", "notice": True},
        {"level": "WARNING", "message": "worker is silent"},
        ["notice"],
    ]
    log.write_text("\n".join(map(json.dumps, records)) + "\nnotice\n")

    assert notices_of(log) == ["3 weights are not used"]
    assert notices_of(tmp_path / "nothing") == []


def test_the_stage_is_the_last_one_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [
        {"message": "loading", "stage": "files"},
        {"message": "loading", "stage": "weights"},
        {"message": "x"},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + "half a li")

    assert stage_of(log) == "weights"
    assert stage_of(tmp_path / "nothing") == ""


def test_log_folders_are_named_by_time(tmp_path: Path) -> None:
    assert log_folder(tmp_path, 0.0).parent == tmp_path / "logs"
    assert log_folder(tmp_path, 0.0) != log_folder(tmp_path, 1.0)
