"""A process measures itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from headrace.metrics.catalogue import EVENT_LOOP_LAG
from headrace.runtime.telemetry import vitals
from tests.harness import eventually


@pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")
async def test_cpu_time_memory_and_open_files_are_measured(count: Callable[..., float]) -> None:
    async with vitals.measuring():
        assert 0 < count("process.cpu.time") <= time.process_time()
        assert count("process.memory.usage") > 10_000_000
        assert count("process.open_fds") > 3


async def test_a_blocked_event_loop_is_measured(
    count: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitals, "LAG_SECONDS", 0.01)
    series = EVENT_LOOP_LAG.of()
    before, late = count("headrace.event_loop.lag"), sum(series.counts[8:])  # above 0.2 seconds
    async with vitals.measuring():
        await eventually(lambda: count("headrace.event_loop.lag") > before)
        time.sleep(0.3)  # noqa: ASYNC251 # it blocks the loop
        await eventually(lambda: sum(series.counts[8:]) > late)
