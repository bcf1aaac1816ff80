"""A process reports the resources that it uses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.runtime.process_info import process_state
from headrace.runtime.serving.active_requests import ActiveRequests


def test_tasks_and_requests_are_counted() -> None:
    requests = ActiveRequests()

    async def counted() -> None:
        before = process_state(requests)
        ends = asyncio.Event()

        async def request() -> None:
            with requests.track():
                await ends.wait()

        tasks = [asyncio.create_task(request()) for _ in range(5)]
        await asyncio.sleep(0)
        during = process_state(requests)
        ends.set()
        await asyncio.gather(*tasks)
        after = process_state(requests)

        assert (during.tasks - before.tasks, during.requests) == (5, 5)
        assert (after.tasks, after.requests) == (before.tasks, 0)

    asyncio.run(counted())  # a separate loop: other tests add and remove tasks on the shared one


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")
def test_files_and_memory_are_counted(tmp_path: Path) -> None:
    """In a separate process: other tests open and close files in this one."""
    script = """
import asyncio, sys
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.process_info import process_state

async def main():
    before = process_state(ActiveRequests())
    handles = [open(f"{sys.argv[1]}/{number}", "w") for number in range(5)]
    during = process_state(ActiveRequests())
    print(during.files - before.files, during.memory_bytes)

asyncio.run(main())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    files, memory_bytes = map(int, printed.split())
    assert files == 5
    assert memory_bytes > 1 << 20
