"""A server of Multiplex with configurable answers, and a caller that writes and reads the messages itself."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from headrace import errors, statuses
from headrace.channel import open_channel
from headrace.multiplex.serving import METHOD, Incoming, Multiplexer, Write
from headrace.runtime.security.identity import current
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.limits import Limits
from headrace.runtime.serving.server import Serving, serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2
from headrace.v1 import multiplex_pb2 as wire
from headrace.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from tests.harness import PATIENCE

HELLO = wire.MultiplexHello(caller_id="raw", epoch=7)
# The caller's core buffers little of what it does not read.
NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))


class EchoServicer(GenerationServiceServicer):
    """Echoes the prompt, a byte a token, unless the prompt asks for something else.

    "wait"   it sends `accepted` and waits until it is cancelled
    "silent" it sends nothing and waits until it is cancelled
    "fill"   it sends deltas of 10,000 bytes without end
    "fail"   it raises an error with a message of 1,000 bytes
    "stop"   it returns without `finish`
    "late"   it sends `finish` and then raises an error

    received    the requests so far
    running     those that it answers now
    cancelled   those that were cancelled
    written     events that the stream has taken
    """

    def __init__(self, calls: Calls) -> None:
        self._multiplexer = Multiplexer(self._answer, calls)
        self.received: list[Incoming] = []
        self.running = 0
        self.cancelled = 0
        self.written = 0

    async def Multiplex(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]
        await self._multiplexer.serve(context)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise NotImplementedError
        yield

    async def _answer(self, incoming: Incoming, write: Write) -> None:
        assert current() is incoming.identity, "as for a call of Generate"
        self.received.append(incoming)
        self.running += 1
        try:
            async for response in _answer(incoming.request.prompt):
                await write(response)
                self.written += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


async def _answer(prompt: str) -> AsyncIterator[pb.GenerateResponse]:
    if prompt == "fail":
        raise errors.NoWorkers("x" * 1000)
    if prompt == "silent":
        await asyncio.Event().wait()
    yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r"))
    if prompt == "stop":
        return
    if prompt == "wait":
        await asyncio.Event().wait()
    offset = 0
    while prompt == "fill":
        yield pb.GenerateResponse(delta=pb.Delta(offset=offset, token_count=1, text="x" * 10_000))
        offset += 1
        await asyncio.sleep(0)
    for offset, byte in enumerate(prompt.encode()):
        yield pb.GenerateResponse(delta=pb.Delta(offset=offset, token_count=1, text=chr(byte)))
    yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))
    if prompt == "late":
        raise errors.NoWorkers("after the end")


@dataclass(frozen=True)
class Server:
    """A running server of an EchoServicer."""

    echo: EchoServicer
    serving: Serving
    address: str

    @asynccontextmanager
    async def stream(
        self, hello: bool = True, options: tuple[tuple[str, int], ...] = ()
    ) -> AsyncGenerator[RawCaller, None]:
        """Open a stream on a connection of its own, and send `hello` by default."""
        channel = (
            grpc.aio.insecure_channel(self.address, options=options)
            if options
            else open_channel(self.address)
        )
        async with channel:
            caller = RawCaller(
                channel.stream_stream(
                    METHOD,
                    request_serializer=_serialized,
                    response_deserializer=wire.MultiplexResponse.FromString,
                )()
            )
            if hello:
                await caller.send(hello=HELLO)
            try:
                yield caller
            finally:
                caller.call.cancel()


@asynccontextmanager
async def server(limits: Limits | None = None, *, drain_seconds: float = 0.0) -> AsyncGenerator[Server, None]:
    """Serve Multiplex on a free port; leaving the block drains the server."""
    calls = Calls(limits or Limits())
    echo = EchoServicer(calls)

    def register(bare: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(echo, bare)

    async with serving(
        register,
        generation_service_pb2.DESCRIPTOR.services_by_name.values(),
        host="127.0.0.1",
        port=0,
        drain_seconds=drain_seconds,
        calls=calls,
        untracked=frozenset({METHOD}),
        ready=lambda: True,
    ) as running:
        yield Server(echo, running, f"127.0.0.1:{running.port}")


@dataclass
class RawCaller:
    """One stream, as its caller sees it.

    epochs   of the welcomes received
    events   of each handle, by name
    text     of each handle
    ends     errors of each handle
    pongs    received
    """

    call: Any
    epochs: list[int] = field(default_factory=list)
    events: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    text: defaultdict[int, str] = field(default_factory=lambda: defaultdict(str))
    ends: dict[int, errors.HeadraceError] = field(default_factory=dict)
    pongs: list[int] = field(default_factory=list)
    draining: bool = False

    async def send(self, raw: bytes | None = None, **fields: Any) -> None:
        """Send a message with these fields, or the bytes *raw*."""
        await self.call.write(wire.MultiplexRequest(**fields) if raw is None else raw)

    async def open(self, *prompts: str, first: int = 1, **fields: Any) -> None:
        """Open requests for *prompts* in one message, with handles from *first* on and these fields."""
        await self.send(open=[opened(first + n, prompt, **fields) for n, prompt in enumerate(prompts)])

    async def read(self) -> bool:
        """Read one message; return False at the end of the stream. Raises the error that ended it."""
        async with asyncio.timeout(PATIENCE):
            try:
                message = await self.call.read()
            except grpc.aio.AioRpcError as error:
                raise statuses.from_rpc_error(error) from None
        if message is grpc.aio.EOF:
            return False
        if message.HasField("welcome"):
            self.epochs.append(message.welcome.epoch)
        if message.pong:
            self.pongs.append(message.pong)
        self.draining |= message.draining
        for event in message.events:
            kind = event.WhichOneof("event")
            if kind == "response":
                kind = event.response.WhichOneof("event")
                self.text[event.handle] += event.response.delta.text
            else:
                self.ends[event.handle] = statuses.from_status(event.error)
            self.events[event.handle].append(kind)
        return True

    async def read_until(self, condition: Callable[[], object]) -> None:
        """Read until *condition* holds; fail at the end of the stream."""
        while not condition():
            assert await self.read(), "the stream has ended"

    async def answers(self, *handles: int) -> None:
        """Read until the requests with these handles have ended."""
        await self.read_until(lambda: all(self.ended(handle) for handle in handles))

    async def to_the_end(self) -> errors.HeadraceError | None:
        """Read to the end of the stream; return its error, None for OK."""
        with suppress(asyncio.InvalidStateError):
            try:
                while await self.read():
                    pass
            except errors.HeadraceError as error:
                return error
        return None

    def ended(self, handle: int) -> bool:
        """Whether the request has ended."""
        return self.events[handle][-1:] in (["finish"], ["error"])

    def reason(self, handle: int) -> str:
        """Return the reason of a request's error; "" if it has none."""
        return self.ends[handle].reason if handle in self.ends else ""


def opened(
    handle: int, prompt: str, *, ttl: float | Duration | None = None, **fields: Any
) -> wire.OpenRequest:
    """Return the entry of `open` for a prompt."""
    made = wire.OpenRequest(handle=handle, request=pb.GenerateRequest(prompt=prompt), **fields)
    if isinstance(ttl, Duration):
        made.ttl.CopyFrom(ttl)
    elif ttl is not None:
        made.ttl.FromNanoseconds(int(ttl * 1e9))
    return made


def _serialized(message: wire.MultiplexRequest | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()
