"""Processes that receive `EndWithParent` end with the process that started them."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from contextlib import suppress
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
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    parent = await asyncio.create_subprocess_exec(sys.executable, script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    try:
        parent.send_signal(signal.SIGKILL)
        await parent.wait()

        await eventually(lambda: not _alive(child))
    finally:
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
