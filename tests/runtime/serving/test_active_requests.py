"""Requests are counted, rejected while the server drains, and ended when it evicts them."""

from __future__ import annotations

import asyncio

import pytest

from headrace import errors
from headrace.runtime.serving.active_requests import ActiveRequests


async def test_requests_in_flight_are_counted_until_they_end() -> None:
    requests, ends = ActiveRequests(), asyncio.Event()

    async def request() -> None:
        with requests.track():
            await ends.wait()

    tasks = [asyncio.create_task(request()) for _ in range(3)]
    await asyncio.sleep(0)
    assert requests.in_flight == 3
    ends.set()
    await asyncio.gather(*tasks)

    assert requests.in_flight == 0


async def test_new_requests_are_rejected_while_the_server_drains() -> None:
    requests = ActiveRequests()
    requests.drain()

    with pytest.raises(errors.Draining) as caught, requests.track():
        pass

    assert caught.value.retry_after
    assert requests.in_flight == 0


async def test_evicted_requests_end_with_draining_and_cancelled_ones_do_not() -> None:
    requests = ActiveRequests()

    async def request() -> None:
        with requests.track():
            await asyncio.sleep(60)

    cancelled, evicted = (asyncio.create_task(request()) for _ in range(2))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    requests.evict()

    with pytest.raises(errors.Draining):
        await evicted
    assert requests.in_flight == 0
