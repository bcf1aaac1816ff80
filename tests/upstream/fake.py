"""A service with OpenAI's API that behaves as a test says. On plain sockets, so that it can misbehave."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tests.harness import PATIENCE, eventually

MODEL = "gpt-fake"


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)


class Exchange:
    """One request, and the connection to respond on."""

    def __init__(
        self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, released: asyncio.Event
    ) -> None:
        self.seen = seen
        self.released = released
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def head(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        """Begin a response with a body in chunks."""
        lines = [f"HTTP/1.1 {status} Status", f"content-type: {kind}", "transfer-encoding: chunked"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        """Send a chunk of the body; an empty one ends it."""
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def reply(self, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        """Send a whole response."""
        await self.head(status, kind, **headers)
        await self.chunk(body if isinstance(body, bytes) else json.dumps(body).encode())
        await self.chunk(b"")

    async def stream(self, *events: bytes) -> None:
        """Send a whole stream, each event in a chunk of its own."""
        await self.head()
        for one in events:
            await self.chunk(one)
        await self.chunk(b"")

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    def reset(self) -> None:
        """Reset the connection."""
        self._writer.transport.abort()

    async def until_released(self) -> None:
        """Wait until the test releases stalled responses."""
        await self.released.wait()

    async def released_or_gone(self) -> None:
        """Wait until the test releases stalled responses, or the client has closed the connection."""
        waits = [asyncio.create_task(self.released.wait()), asyncio.create_task(self.until_gone())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)

    @property
    def gone(self) -> bool:
        """Whether the client has closed the connection, as far as is known."""
        return self._writer.transport.is_closing()

    async def until_gone(self) -> None:
        """Wait until the client has closed the connection."""
        with suppress(ConnectionError):
            while await self._reader.read(1024):
                pass


Script: TypeAlias = Callable[[Exchange], Awaitable[None]]


def event(value: Any) -> bytes:
    """Return an event of a stream."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str = "", **fields: Any) -> bytes:
    """Return an event with a part of a chat's answer."""
    content = {"content": text} if text or not fields else {}
    return event({"choices": [{"index": 0, "delta": {**content, **fields}}]})


def finish(reason: str = "stop") -> bytes:
    """Return the event with the reason of the end."""
    return event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})


def usage(prompt: int = 7, completion: int = 3) -> bytes:
    """Return the event with the usage."""
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
DONE = b"data: [DONE]\n\n"
ANSWER = (ROLE, delta("Hel"), delta("lo "), delta("you"), finish(), usage(), DONE)


async def answers(exchange: Exchange) -> None:
    """Answer "Hello you", in three tokens."""
    await exchange.stream(*ANSWER)


async def lists_models(exchange: Exchange) -> None:
    """List the model."""
    await exchange.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})


def says(*events: bytes) -> Script:
    """Return a script that sends a stream."""
    return lambda exchange: exchange.stream(*events)


def refuses(status: int, message: str = "no", kind: str = "server_error", **headers: str) -> Script:
    """Return a script that responds with an error."""
    body = {"error": {"message": message, "type": kind}}
    return lambda exchange: exchange.reply(status, body, **headers)


@dataclass
class Fake:
    """A running fake.

    scripts    of the next requests for answers, one each; afterwards `usual`
    usual      how further requests are answered
    models     how GET /models is answered
    seen       requests for answers
    checks     requests for models
    answering  requests that are being answered
    most_answering   the most at a time
    connections      that were accepted
    released   set to let stalled responses continue
    """

    port: int = 0
    scripts: deque[Script] = field(default_factory=deque)
    usual: Script = answers
    models: Script = lists_models
    seen: list[Seen] = field(default_factory=list)
    checks: list[Seen] = field(default_factory=list)
    answering: int = 0
    most_answering: int = 0
    connections: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)
    server: asyncio.Server | None = None
    tls: ssl.SSLContext | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        """The base URL."""
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}/v1"

    async def listen(self) -> None:
        """Accept connections, on the same port as before."""
        self.server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, limit=1 << 24, ssl=self.tls
        )
        self.port = self.server.sockets[0].getsockname()[1]

    def die(self) -> None:
        """Reset all connections, and refuse new ones."""
        if self.server is not None:
            self.server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await eventually(lambda: not self.answering)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split(" ")
        seen = Seen(method, path, headers, body)
        exchange = Exchange(seen, reader, writer, self.released)
        if path.endswith("/models"):
            self.checks.append(seen)
            await self.models(exchange)
        else:
            self.seen.append(seen)
            script = self.scripts.popleft() if self.scripts else self.usual
            self.answering += 1
            self.most_answering = max(self.most_answering, self.answering)
            try:
                await script(exchange)
            finally:
                self.answering -= 1
        return not writer.transport.is_closing()


@asynccontextmanager
async def fake_upstream(tls: ssl.SSLContext | None = None) -> AsyncGenerator[Fake, None]:
    """Run a fake, over TLS or without."""
    fake = Fake(tls=tls)
    await fake.listen()
    try:
        yield fake
    finally:
        fake.released.set()
        fake.die()
        async with asyncio.timeout(PATIENCE):
            await fake.idle()
