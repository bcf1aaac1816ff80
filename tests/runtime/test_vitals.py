"""A process knows what it holds of its system."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from headrace.runtime.interceptors import Activity
from headrace.runtime.vitals import vitals


async def test_tasks_and_requests_are_counted() -> None:
    activity = Activity()
    before = vitals(activity)
    ends = asyncio.Event()

    async def request() -> None:
        with activity.call():
            await ends.wait()

    tasks = [asyncio.create_task(request()) for _ in range(5)]
    await asyncio.sleep(0)
    during = vitals(activity)
    ends.set()
    await asyncio.gather(*tasks)
    after = vitals(activity)

    assert (during.tasks - before.tasks, during.requests) == (5, 5)
    assert (after.tasks, after.requests) == (before.tasks, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")
async def test_files_and_memory_are_counted(tmp_path: Path) -> None:
    before = vitals(Activity())
    handles = [(tmp_path / str(number)).open("w") for number in range(5)]
    during = vitals(Activity())
    for handle in handles:
        handle.close()

    assert during.files - before.files == 5
    assert during.memory_bytes > 1 << 20
