"""Attacks on Multiplex: streams, and requests on them, that a careful caller would never send."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from headrace.client import chat
from headrace.multiplex.limits import MAX_HANDLES, MAX_OPENS
from headrace.v1 import multiplex_pb2 as wire
from tests.hostile.attack import Attack, attack
from tests.hostile.wire import READS_ALL, Peer, headers, message, peer

MULTIPLEX = "/headrace.v1.GenerationService/Multiplex"
HELLO = wire.MultiplexHello(caller_id="hostile", epoch=1)


def opens(handles: Iterable[int], *, text: str = "x", max_tokens: int = 4) -> list[wire.OpenRequest]:
    """Return the entries of `open` for these handles."""
    request = chat(text, max_tokens=max_tokens)
    request.routing.tenant = "hostile"
    return [wire.OpenRequest(handle=handle, request=request) for handle in handles]


async def send(one: Peer, stream: int, sent: wire.MultiplexRequest) -> None:
    """Send a message on a stream."""
    await one.body(stream, message(sent.SerializeToString()), end=False)


async def begin(one: Peer, sent: wire.MultiplexRequest | None = None) -> int:
    """Open a stream without a deadline, with `hello` and the rest of a message."""
    stream = await one.call(headers(MULTIPLEX, timeout=""))
    first = wire.MultiplexRequest(hello=HELLO)
    if sent is not None:
        first.MergeFrom(sent)
    await send(one, stream, first)
    return stream


@asynccontextmanager
async def attacker(run: Attack, *, reads: bool) -> AsyncGenerator[Peer, None]:
    """Open a connection whose streams are read, or not."""
    async with peer(run.port, source=run.source, settings=READS_ALL if reads else b"") as one:
        yield one


@attack
async def opens_and_cancels(run: Attack) -> None:
    """Open 256 requests a message and cancel them in the same one, on and on."""
    async with attacker(run, reads=True) as one:
        stream = await begin(one)
        for first in itertools.count(1, MAX_OPENS):
            if run.over or one.answers[stream].ended or one.closed.is_set():
                break
            handles = range(first, first + MAX_OPENS)
            await send(one, stream, wire.MultiplexRequest(open=opens(handles, max_tokens=64), cancel=handles))
            run.outcomes["sent"] += MAX_OPENS
            await asyncio.sleep(0)
        await one.body(stream, b"")
        await one.answered([stream], seconds=20)
        run.count(one, [stream])


@attack
async def equal_handles(run: Attack) -> None:
    """Open requests with a handle in use, on one stream after the other."""
    async with attacker(run, reads=True) as one:
        while not run.over and not one.closed.is_set():
            streams = [await begin(one, wire.MultiplexRequest(open=opens([7, 8, 7]))) for _ in range(20)]
            await one.answered(streams)
            run.count(one, streams)


@attack
async def too_many_opens(run: Attack) -> None:
    """Send messages of two megabytes, with 500,000 requests each."""
    entry = wire.MultiplexRequest(open=[wire.OpenRequest(handle=1)]).SerializeToString()
    sent = wire.MultiplexRequest(hello=HELLO).SerializeToString() + entry * 500_000
    async with attacker(run, reads=True) as one:
        while not run.over and not one.closed.is_set():
            stream = await one.call(headers(MULTIPLEX, timeout=""))
            await one.body(stream, message(sent), end=False)
            await one.answered([stream])
            run.count(one, [stream])


@attack
async def credit_without_end(run: Attack) -> None:
    """Grant credit to requests that are paused, one event at a time, and to unknown ones."""
    async with attacker(run, reads=True) as one:
        stream = await begin(one)
        paused = opens(range(1, 9), text="word " * 50, max_tokens=200)
        for opened in paused:
            opened.credit = 0
        await send(one, stream, wire.MultiplexRequest(open=paused))
        for events in itertools.count(1):
            if run.over or one.answers[stream].ended or one.closed.is_set():
                break
            grants = [wire.EventCredit(handle=n % 128, events=events) for n in range(MAX_HANDLES)]
            await send(one, stream, wire.MultiplexRequest(credit=grants))
            run.outcomes["sent"] += 1
            await asyncio.sleep(0)
        await send(one, stream, wire.MultiplexRequest(cancel=range(1, 9)))
        await one.body(stream, b"")
        await one.answered([stream], seconds=20)
        run.count(one, [stream])


@attack
async def pings_without_end(run: Attack) -> None:
    """Send thousands of pings, on streams that are not read."""
    async with attacker(run, reads=False) as one:
        streams = [await begin(one) for _ in range(4)]
        for number in itertools.count(1):
            if run.over or one.closed.is_set():
                break
            for stream in streams:
                await send(one, stream, wire.MultiplexRequest(ping=number))
            run.outcomes["sent"] += len(streams)
        run.count(one, streams)


@attack
async def unread_errors(run: Attack) -> None:
    """Open invalid requests, which fail at once, on streams that are not read."""
    async with attacker(run, reads=False) as one:

        async def fill() -> None:
            stream = await begin(one)
            for first in itertools.count(1, MAX_OPENS):
                handles = range(first, first + MAX_OPENS)
                await send(
                    one, stream, wire.MultiplexRequest(open=[wire.OpenRequest(handle=n) for n in handles])
                )
                run.outcomes["sent"] += MAX_OPENS

        filling = [asyncio.create_task(fill()) for _ in range(50)]
        while not run.over and not one.closed.is_set():
            await asyncio.sleep(0.05)
        for task in filling:
            task.cancel()
        await asyncio.wait(filling)


@attack
async def unread_answers(run: Attack) -> None:
    """Open requests with long answers, on streams that are not read."""
    async with attacker(run, reads=False) as one:
        streams = [
            await begin(one, wire.MultiplexRequest(open=opens([1], text="word " * 200, max_tokens=900)))
            for _ in range(8)
        ]
        while not run.over and not one.closed.is_set():
            await asyncio.sleep(0.05)
        run.count(one, streams)


@attack
async def idle_streams(run: Attack) -> None:
    """Open 5,000 streams that carry nothing."""
    async with attacker(run, reads=True) as one:
        streams = []
        for _ in range(5_000):
            if one.closed.is_set():
                break
            streams.append(await begin(one))
        while not run.over and not one.closed.is_set():
            await asyncio.sleep(0.05)
        run.count(one, streams)
