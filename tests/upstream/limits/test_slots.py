"""Requests beyond the slots wait in their order, and none is lost whatever ends its wait."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.deadline import NEVER, Deadline
from headrace.upstream.limits.slots import Slots


async def test_requests_get_slots_in_the_order_of_their_arrival() -> None:
    slots, order = Slots(1, 10, tier="t"), []

    async def request(number: int) -> None:
        async with slots.held(NEVER):
            order.append(number)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(request(number))
            await asyncio.sleep(0)

    assert order == [0, 1, 2, 3, 4]
    assert (slots.taken, slots.queued) == (0, 0)


async def test_a_full_queue_rejects_at_once_with_a_delay() -> None:
    slots = Slots(1, 0, tier="t")
    async with slots.held(NEVER):
        with pytest.raises(errors.Overloaded, match="1 requests are in flight") as refused:
            async with slots.held(NEVER):
                pass

    assert refused.value.retry_after is not None
    assert refused.value.retry_after > 0


async def test_a_deadline_ends_the_wait() -> None:
    slots = Slots(1, 5, tier="t")
    async with slots.held(NEVER):
        with pytest.raises(errors.DeadlineInQueue):
            async with slots.held(Deadline(time.monotonic() + 0.01)):
                pass
        assert slots.queued == 0

    assert slots.taken == 0


@given(
    most=st.integers(1, 4),
    ends=st.lists(st.sampled_from(["run", "cancel", "deadline"]), min_size=1, max_size=20),
)
def test_slots_are_never_lost_and_never_too_many(most: int, ends: list[str]) -> None:
    async def scenario() -> None:
        slots, running = Slots(most, 100, tier="t"), 0

        async def request(end: str) -> None:
            nonlocal running
            deadline = Deadline(asyncio.get_running_loop().time()) if end == "deadline" else NEVER
            async with slots.held(deadline):
                running += 1
                assert running <= most
                try:
                    await asyncio.sleep(0)
                finally:
                    running -= 1

        tasks = [asyncio.create_task(request(end)) for end in ends]
        await asyncio.sleep(0)
        for task, end in zip(tasks, ends, strict=True):
            if end == "cancel":
                task.cancel()
                await asyncio.sleep(0)
        await asyncio.wait(tasks)
        failed = [task.exception() for task in tasks if not task.cancelled()]
        assert all(error is None or isinstance(error, errors.DeadlineInQueue) for error in failed)
        assert (slots.taken, slots.queued) == (0, 0)

    asyncio.run(scenario())
