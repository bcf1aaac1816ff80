"""Processes that receive `EndWithParent` end with the process that started them."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from headrace.worker.vllm.lifetime import EndWithParent
from tests.harness import eventually

_PARENT = """
import multiprocessing, os, time
from headrace.worker.vllm.lifetime import EndWithParent

def run(marker):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=run, args=(EndWithParent("w"),)).start()
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
async def test_a_started_process_is_killed_with_its_parent(tmp_path: Path) -> None:
    async with _family(tmp_path) as (parent, child):
        parent.send_signal(signal.SIGKILL)
        await parent.wait()

        await eventually(lambda: not _alive(child))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
async def test_a_signal_to_the_group_of_the_parent_does_not_reach_it(tmp_path: Path) -> None:
    """Ctrl-C in a terminal is such a signal; the worker drains then, and needs the process for it."""
    async with _family(tmp_path) as (parent, child):
        assert os.getpgid(parent.pid) == parent.pid
        assert os.getpgid(child) == child


@asynccontextmanager
async def _family(folder: Path) -> AsyncGenerator[tuple[Process, int], None]:
    """Run a parent in a group of its own; yields it, and the id of its child."""
    script = folder / "parent.py"
    script.write_text(_PARENT)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, script, stdout=asyncio.subprocess.PIPE, process_group=0
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    try:
        yield parent, child
    finally:
        with suppress(ProcessLookupError):
            parent.kill()
        await parent.wait()
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_elsewhere_it_is_a_string() -> None:
    received = pickle.loads(pickle.dumps(EndWithParent("worker")))

    assert (received, type(received)) == ("worker", EndWithParent)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
