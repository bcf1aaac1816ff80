"""Reports of several steps are delivered together, in order, and none that cannot wait waits."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.flow.delivery import Delivery
from headrace.worker.runner import FinishReason, SequenceUpdate, StepReport
from tests.harness import eventually

NEVER_SOON = 3600.0
Delivered = list[list[StepReport[int]]]


def decode(number: int) -> StepReport[int]:
    """A step that only continued answers."""
    return StepReport([SequenceUpdate(1, number, (7,))], rows=1, tokens=1, decodes=1, started=number)


def prefill(number: int) -> StepReport[int]:
    """A step that also computed a prompt."""
    return StepReport([SequenceUpdate(2, 0, (7,))], rows=2, tokens=5, decodes=1, started=number)


def end(number: int) -> StepReport[int]:
    """A step after which a sequence ended."""
    update = SequenceUpdate(1, number, (7,), finish=FinishReason.LENGTH)
    return StepReport([update], rows=1, tokens=1, decodes=1, started=number)


def between_steps(number: int) -> StepReport[int]:
    """A report of no step."""
    return StepReport([SequenceUpdate(1, number, finish=FinishReason.CANCELLED)], started=number)


async def test_tokens_wait_until_a_report_comes_that_cannot_wait() -> None:
    for urgent in (prefill, end, between_steps):
        delivered: Delivered = []
        delivery = Delivery(NEVER_SOON, delivered.append)
        delivery.add(decode(0))
        await asyncio.sleep(0)
        delivery.add(decode(1))
        delivery.add(decode(2))
        await asyncio.sleep(0)
        assert delivered == [[decode(0)]]
        delivery.add(urgent(3))
        await asyncio.sleep(0)
        assert delivered == [[decode(0)], [decode(1), decode(2), urgent(3)]]
        delivery.add(decode(4))
        await asyncio.sleep(0)
        assert len(delivered) == 2  # it pauses again


async def test_tokens_are_delivered_when_the_pause_ends_and_after_an_empty_pause_at_once() -> None:
    delivered: Delivered = []
    delivery = Delivery(0.01, delivered.append)
    delivery.add(decode(0))
    await asyncio.sleep(0)
    delivery.add(decode(1))
    assert delivered == [[decode(0)]]
    await eventually(lambda: delivered == [[decode(0)], [decode(1)]])
    await asyncio.sleep(0.02)  # a whole pause without a report
    delivery.add(decode(2))
    await asyncio.sleep(0)
    assert delivered[2:] == [[decode(2)]]


async def test_tokens_do_not_wait_for_a_step_that_would_come_too_late() -> None:
    delivered: Delivered = []
    delivery = Delivery(NEVER_SOON, delivered.append)
    late = replace(decode(1), seconds=NEVER_SOON + 1)
    delivery.add(decode(0))
    await asyncio.sleep(0)
    delivery.add(late)
    await asyncio.sleep(0)
    assert delivered == [[decode(0)], [late]]


async def test_each_step_is_delivered_at_once_if_none_waits() -> None:
    for seconds, waits in ((0.0, True), (NEVER_SOON, False)):
        delivered: Delivered = []
        delivery = Delivery(seconds, delivered.append)
        delivery.waits = waits
        for number in range(3):
            delivery.add(decode(number))
            await asyncio.sleep(0)
        assert delivered == [[decode(0)], [decode(1)], [decode(2)]]


@given(
    kinds=st.lists(st.sampled_from([decode, prefill, end, between_steps]), max_size=200),
    seconds=st.sampled_from([0.0, 0.0001, 0.001]),
)
def test_every_report_of_a_thread_is_delivered_once_and_in_order(kinds: list, seconds: float) -> None:  # type: ignore[type-arg]
    reports = [kind(number) for number, kind in enumerate(kinds)]

    async def run() -> list[StepReport[int]]:
        delivered: list[StepReport[int]] = []
        delivery = Delivery(seconds, delivered.extend)
        thread = threading.Thread(target=lambda: deque(map(delivery.add, reports)))
        thread.start()
        await eventually(lambda: len(delivered) >= len(reports))
        thread.join()
        await asyncio.sleep(2 * seconds)
        return delivered

    assert asyncio.run(run()) == reports
