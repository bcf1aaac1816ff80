"""Read and parse the one message of a unary request, within the limits of its size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from headrace import errors
from headrace.runtime.serving.fair_semaphore import Permit
from headrace.runtime.serving.inflight import Reservation

# A message that is not complete after this many pauses is charged as the longest one until it is complete. It
# counts pauses of the event loop, not seconds, so that a delayed loop is not taken for a slow caller.
GRACE_PAUSES, PAUSE_SECONDS = 5, 0.02
# A call whose message is not complete after this time is rejected.
READ_SECONDS = 30.0


async def read_message(context: Any, reservation: Reservation, limit: int, permit: Permit) -> bytes:
    """Read the message of a unary request and charge it to *reservation*.

    Releases *permit* if the message is not there yet, so that other calls can start.

    Raises Busy, MessageTooLarge, InvalidRequest if there is no message, DeadlineExceeded after READ_SECONDS.
    """
    rejected: errors.Busy | None = None
    timer: asyncio.TimerHandle
    loop = asyncio.get_running_loop()

    def pause(left: int) -> None:
        nonlocal rejected, timer
        if left:
            timer = loop.call_later(PAUSE_SECONDS, pause, left - 1)
            return
        permit.release()
        try:
            reservation.reserve_longest()
        except errors.Busy as error:
            rejected = error
            reading.reschedule(loop.time())

    try:
        async with asyncio.timeout(READ_SECONDS) as reading:
            timer = loop.call_later(PAUSE_SECONDS, pause, GRACE_PAUSES - 1)
            try:
                data = await context.read()
            finally:
                timer.cancel()
    except TimeoutError:
        if rejected is not None:
            raise rejected from None
        raise errors.DeadlineExceeded(f"the request did not arrive within {READ_SECONDS:g} s") from None
    if data is grpc.aio.EOF:
        raise errors.InvalidRequest("the call ended without a request message")
    if len(data) > limit:
        raise errors.MessageTooLarge(
            f"the request has {len(data)} bytes, the limit of this method is {limit}",
            size=len(data),
            limit=limit,
        )
    reservation.resize(len(data))
    return bytes(data)


def parser(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Return *deserialize* with its DecodeError replaced by InvalidText."""
    assert deserialize is not None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            raise errors.InvalidText(
                "the request cannot be parsed: all text must be valid UTF-8, and the message must have the "
                f"method's request type ({error})"
            ) from None

    return parse
