"""Write HTTP/2 by hand: frames that no gRPC library would send, and what a server answers to them."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from hpack import Decoder, Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
FRAME_BYTES = 16_384
GENERATE = "/headrace.v1.GenerationService/Generate"

Header = tuple[bytes | str, bytes | str]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame; *kind* and *flags* may be any byte."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message(data: bytes, *, compressed: bool = False) -> bytes:
    """A gRPC message as it lies in DATA frames."""
    return struct.pack(">?I", compressed, len(data)) + data


def headers(path: bytes | str, *more: Header, timeout: str = "20S") -> list[Header]:
    """The headers of a gRPC call; an empty *timeout* leaves the deadline out."""
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
    """What a server sent on one stream.

    reset   error code of its RST_STREAM, if one came
    """

    headers: dict[str, str] = field(default_factory=dict)
    data: int = 0
    reset: int | None = None
    ended: bool = False

    @property
    def status(self) -> str:
        """The gRPC status code as text; "" if there was none."""
        return self.headers.get("grpc-status", "")


class Peer:
    """One connection. It answers SETTINGS and PING, reads everything, and keeps what came on each stream."""

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
        self._reading = asyncio.create_task(self._read())

    async def send(self, data: bytes) -> None:
        """Write *data*; a connection that the server has closed takes it and loses it."""
        with suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    def stream(self) -> int:
        """The id of a new stream."""
        self._next += 2
        self.answers[self._next - 2] = Answer()
        return self._next - 2

    def block(self, fields: Sequence[Header]) -> bytes:
        """*fields* as an HPACK block; each must be sent, in order, for the table is shared."""
        return self._encoder.encode(list(fields))

    async def call(self, fields: Sequence[Header], body: bytes | None = None) -> int:
        """Open a stream with *fields*, send *body* and half-close; None sends no data and keeps it open."""
        stream = self.stream()
        await self.send(opened(stream, self.block(fields), body))
        return stream

    async def answered(self, streams: Sequence[int]) -> None:
        """Wait until each of *streams* has ended or the connection is closed."""
        while not self.closed.is_set() and not all(self.answers[stream].ended for stream in streams):
            await asyncio.sleep(0.01)

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

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.kinds[kind] += 1
        answer = self.answers.get(stream)
        if kind == SETTINGS and not flags & ACK:
            self._writer.write(frame(SETTINGS, ACK))
            self.settled.set()
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, ACK, 0, payload))
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
        if answer is not None and kind in (HEADERS, DATA) and flags & END_STREAM:
            answer.ended = True


def opened(stream: int, block: bytes, body: bytes | None) -> bytes:
    """A stream's HEADERS, and its DATA where there is a *body*."""
    sent = [frame(HEADERS, END_HEADERS, stream, block)]
    if body is not None:
        parts = [body[at : at + FRAME_BYTES] for at in range(0, len(body), FRAME_BYTES)] or [b""]
        sent += [frame(DATA, 0, stream, part) for part in parts[:-1]]
        sent.append(frame(DATA, END_STREAM, stream, parts[-1]))
    return b"".join(sent)


@asynccontextmanager
async def peer(port: int, *, source: str = "127.0.0.1", settings: bytes = b"") -> AsyncGenerator[Peer, None]:
    """A connection to *port* on loopback, from the address *source*, after the preface."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, local_addr=(source, 0), family=socket.AF_INET
    )
    talking = Peer(reader, writer)
    try:
        await talking.send(PREFACE + frame(SETTINGS, 0, 0, settings))
        yield talking
    finally:
        await talking.close()
