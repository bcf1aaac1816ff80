"""Write HTTP/2 by hand: frames that no gRPC library sends, and the answers of a server."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import grpc
from hpack import Decoder, Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
FRAME_BYTES = 16_384
INITIAL_WINDOW_SIZE = 4
# A peer enlarges no window of a stream: without these settings it reads 64 KiB of each.
READS_ALL = struct.pack(">HI", INITIAL_WINDOW_SIZE, 2**31 - 1)
STATUSES = {str(code.value[0]): code.name for code in grpc.StatusCode}
GENERATE = "/headrace.v1.GenerationService/Generate"

Header = tuple[bytes | str, bytes | str]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Return a frame; *kind* and *flags* may be any byte."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message(data: bytes, *, compressed: bool = False) -> bytes:
    """Return a gRPC message as DATA frames contain it."""
    return struct.pack(">?I", compressed, len(data)) + data


def headers(path: bytes | str, *more: Header, timeout: str = "20S") -> list[Header]:
    """Return the headers of a gRPC call; an empty *timeout* sets no deadline."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *([("grpc-timeout", timeout)] if timeout else []),
        *more,
    ]


@dataclass
class Answer:
    """The answer of a server on one stream.

    reset   error code of its RST_STREAM, if one came
    """

    headers: dict[str, str] = field(default_factory=dict)
    data: int = 0
    reset: int | None = None
    ended: bool = False

    @property
    def status(self) -> str:
        """The gRPC status code as text; "" without one."""
        return self.headers.get("grpc-status", "")


class Peer:
    """One connection. It answers SETTINGS and PING, reads everything, and keeps the answer of each stream.

    `call` and `body` respect the server's flow control; `send` does not.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._decoder.max_header_list_size = 1 << 24
        self.answers: dict[int, Answer] = {}
        self.kinds: Counter[int] = Counter()
        self.goaway: bytes | None = None
        self.closed = asyncio.Event()
        self.settled = asyncio.Event()
        self._next = 1
        self._room = 65_535  # bytes of DATA that the connection accepts now
        self._stream_room = 65_535  # a new stream's
        self._rooms: dict[int, int] = {}
        self._more_room = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def send(self, data: bytes) -> None:
        """Write *data*; if the server has closed the connection, *data* is lost."""
        if self.closed.is_set():
            return
        with suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    def stream(self) -> int:
        """Return the id of a new stream."""
        self._next += 2
        self.answers[self._next - 2] = Answer()
        return self._next - 2

    def block(self, fields: Sequence[Header]) -> bytes:
        """Encode *fields* as an HPACK block. All blocks must be sent in order, as they share a table."""
        return self._encoder.encode(list(fields), huffman=False)  # whose cost is quadratic

    async def call(self, fields: Sequence[Header], body: bytes | None = None) -> int:
        """Open a stream with *fields*, send *body* and half-close; None sends no data and keeps it open."""
        stream = self.stream()
        await self.send(frame(HEADERS, END_HEADERS, stream, self.block(fields)))
        if body is not None:
            await self.body(stream, body)
        return stream

    async def body(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Send *data* on *stream* as flow control allows; stop when the stream has ended."""
        rest = memoryview(data)
        while rest or end:
            room = min(self._room, self._rooms.setdefault(stream, self._stream_room), FRAME_BYTES)
            if rest and room <= 0:
                if self.closed.is_set() or self.answers[stream].ended:
                    return
                self._more_room.clear()
                await self._more_room.wait()
                continue
            part, rest = rest[:room], rest[room:]
            self._room -= len(part)
            self._rooms[stream] -= len(part)
            await self.send(frame(DATA, END_STREAM if end and not rest else 0, stream, bytes(part)))
            if not rest:
                return

    async def answered(self, streams: Sequence[int], *, seconds: float = 30.0) -> None:
        """Wait until each of *streams* has ended, the connection is closed or so many seconds are over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.closed.is_set() and not all(self.answers[each].ended for each in streams):
                    await asyncio.sleep(0.01)

    def outcome(self, stream: int) -> str:
        """Return the outcome of *stream*: a status, "reset", "closed" with the connection, or "open"."""
        answer = self.answers[stream]
        if answer.status:
            return STATUSES.get(answer.status, answer.status)
        if answer.headers.get(":status", "200") != "200":
            return f"http {answer.headers[':status']}"
        return "reset" if answer.reset is not None else "closed" if self.closed.is_set() else "open"

    async def close(self) -> None:
        self._reading.cancel()
        self._writer.close()
        with suppress(ConnectionError, asyncio.CancelledError):
            await self._reading

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                self._take(head[3], head[4], int.from_bytes(head[5:9]) & 0x7FFFFFFF, payload)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.closed.set()
            self._more_room.set()
            self.settled.set()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.kinds[kind] += 1
        answer = self.answers.get(stream)
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, at)
                if name == INITIAL_WINDOW_SIZE:
                    for other in self._rooms:
                        self._rooms[other] += value - self._stream_room
                    self._stream_room = value
            self._more_room.set()
            self._writer.write(frame(SETTINGS, ACK))
            self.settled.set()
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            room = int.from_bytes(payload)
            if stream:
                self._rooms[stream] = self._rooms.get(stream, self._stream_room) + room
            else:
                self._room += room
            self._more_room.set()
        elif kind == GOAWAY:
            self.goaway = payload
        elif kind == HEADERS:
            decoded = self._decoder.decode(payload)
            if answer is not None:
                answer.headers.update((str(key), str(value)) for key, value in decoded)
        elif kind == DATA and payload:
            self._writer.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload))))
            if answer is not None:
                answer.data += len(payload)
        elif kind == RST_STREAM and answer is not None:
            answer.reset = int.from_bytes(payload)
            answer.ended = True
            self._more_room.set()
        if answer is not None and kind in (HEADERS, DATA) and flags & END_STREAM:
            answer.ended = True
            self._more_room.set()


def opened(stream: int, block: bytes, body: bytes) -> bytes:
    """Return the frames of a whole call with a short *body*, without regard to flow control."""
    return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, body)


@asynccontextmanager
async def peer(port: int, *, source: str = "127.0.0.1", settings: bytes = b"") -> AsyncGenerator[Peer, None]:
    """Open a connection to *port* on loopback, from the address *source*, and send the preface."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, local_addr=(source, 0), family=socket.AF_INET
    )
    talking = Peer(reader, writer)
    try:
        await talking.send(PREFACE + frame(SETTINGS, 0, 0, settings))
        await talking.settled.wait()
        yield talking
    finally:
        await talking.close()
