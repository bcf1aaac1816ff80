"""A server whose Multiplex streams follow scripts, message by message, for tests of the caller's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import grpc
from google.rpc import status_pb2

from headrace.channel import open_channel
from headrace.client import Client
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as wire
from tests.harness import PATIENCE

SERVICE = "headrace.v1.GenerationService"


def echoed(opened: wire.OpenRequest, count: int | None = None) -> list[wire.MultiplexEvent]:
    """Return the events of the answer to a request: its prompt, a byte a token, from where it is resumed.

    count   only so many of its tokens, and then no `finish`
    """
    return [wire.MultiplexEvent(handle=opened.handle, response=one) for one in answer(opened.request, count)]


def answer(request: pb.GenerateRequest, count: int | None = None) -> list[pb.GenerateResponse]:
    """Return the answer to a request; see `echoed`."""
    said = list(request.prompt.encode())
    had = len(request.resume.token_ids)
    assert said[:had] == list(request.resume.token_ids)
    end = len(said) if count is None else had + count
    responses = [pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id, model="echo"))]
    for at, id in enumerate(said[had:end], had):
        delta = pb.Delta(offset=at, token_count=1, token_ids=[id], logprobs=[-float(at)], text=chr(id))
        responses.append(pb.GenerateResponse(delta=delta))
    if count is None:
        responses.append(pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP)))
    return responses


@dataclass
class ServerStream:
    """One Multiplex stream, as the server sees it.

    messages   received so far
    opened     requests so far
    half_closed   whether the caller sends no more, and the script was waiting for it
    """

    requests: AsyncIterator[wire.MultiplexRequest]
    context: Any
    messages: list[wire.MultiplexRequest] = field(default_factory=list)
    half_closed: bool = False

    @property
    def opened(self) -> list[wire.OpenRequest]:
        return [opened for message in self.messages for opened in message.open]

    @property
    def cancelled(self) -> list[int]:
        """The handles of cancellations so far."""
        return [handle for message in self.messages for handle in message.cancel]

    @property
    def credit(self) -> dict[int, int]:
        """The credit of each request."""
        granted = {opened.handle: opened.credit for opened in self.opened}
        for message in self.messages:
            granted |= {credit.handle: credit.events for credit in message.credit}
        return granted

    async def read(self) -> wire.MultiplexRequest:
        """Read the next message; answer a ping."""
        message = await anext(self.requests)
        self.messages.append(message)
        if message.ping:
            await self.write(pong=message.ping)
        return message

    async def read_until(self, condition: Callable[[], object]) -> None:
        """Read messages until *condition* holds."""
        while not condition():
            await self.read()

    async def welcome(self, opens: int = 1) -> list[wire.OpenRequest]:
        """Welcome the caller, and return its first so many requests."""
        first = await self.read()
        await self.write(welcome=wire.MultiplexWelcome(epoch=first.hello.epoch))
        await self.read_until(lambda: len(self.opened) >= opens)
        return self.opened

    async def write(self, raw: bytes | None = None, **fields: Any) -> None:
        """Send a message with these fields, or the bytes *raw*."""
        await self.context.write(wire.MultiplexResponse(**fields) if raw is None else raw)

    async def fail(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, details: str = "") -> NoReturn:
        """End the stream with a status."""
        await self.context.abort(code, details)
        raise AssertionError

    async def hang(self) -> NoReturn:
        """Read and send nothing more."""
        await asyncio.Event().wait()
        raise AssertionError


Script: TypeAlias = Callable[[ServerStream], Awaitable[None]]


async def echo(stream: ServerStream) -> None:
    """Echo every request."""
    first = await stream.read()
    await stream.write(welcome=wire.MultiplexWelcome(epoch=first.hello.epoch))
    message = first
    while True:
        for opened in message.open:
            await stream.write(events=echoed(opened))
        message = await stream.read()


@dataclass
class Scripted:
    """A running server.

    streams    the Multiplex streams so far
    calls      requests by calls of Generate; it echoes them too, and hangs for "wait" after `accepted`
    metadata   of these
    waiting    of these that hang
    """

    address: str = ""
    streams: list[ServerStream] = field(default_factory=list)
    calls: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    waiting: int = 0

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncGenerator[Client, None]:
        """Open a client that multiplexes, does not retry, and has these options."""
        channel = open_channel(self.address)
        async with Client(channel, **{"multiplex": True, "retries": 0, **options}) as client:
            yield client

    async def generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Answer a call of Generate."""
        self.calls.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        for response in answer(request):
            yield response
            if request.prompt == "wait":
                self.waiting += 1
                try:
                    await asyncio.Event().wait()
                finally:
                    self.waiting -= 1


@asynccontextmanager
async def scripted(*scripts: Script | None) -> AsyncGenerator[Scripted, None]:
    """Serve streams by these scripts in turn, the last one repeatedly; None: the method is not known."""
    running = Scripted()

    async def multiplex(requests: AsyncIterator[Any], context: Any) -> None:
        number = len(running.streams)
        running.streams.append(stream := ServerStream(requests, context))
        script = scripts[min(number, len(scripts) - 1)]
        if script is None:
            await stream.fail(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        try:
            async with asyncio.timeout(PATIENCE):
                await script(stream)
        except StopAsyncIteration:
            stream.half_closed = True

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                SERVICE,
                {
                    "Multiplex": grpc.stream_stream_rpc_method_handler(
                        multiplex, wire.MultiplexRequest.FromString, _serialized
                    ),
                    "Generate": grpc.unary_stream_rpc_method_handler(
                        running.generate, pb.GenerateRequest.FromString, _serialized
                    ),
                },
            ),
        )
    )
    running.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield running
    finally:
        await server.stop(None)


def failed(handle: int, code: grpc.StatusCode) -> wire.MultiplexEvent:
    """Return the event that ends a request with an error that has no details."""
    return wire.MultiplexEvent(handle=handle, error=status_pb2.Status(code=code.value[0], message="failed"))


def _serialized(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()
