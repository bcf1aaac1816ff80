"""Random requests, readers and losses on shared streams: nothing is lost, twice or hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.channel import open_channel
from headrace.client import Client
from headrace.multiplex.serving import METHOD, Incoming, Multiplexer, Write
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.server import serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from tests.faults.proxy import Proxy
from tests.harness import PATIENCE, eventually, prompt
from tests.multiplex.scripted import answer

LENGTHS = [1, 5, 60, 70, 300]  # around the credit of a call, and several times that


@dataclass(frozen=True)
class Visit:
    """One request: its answer's length, and how its caller reads.

    after         iterations of the event loop before it is sent
    flush         whether the caller chooses that each token is a delta of its own
    pauses        events between pauses of the reader; 0: it never pauses
    leaves_after  events after which it cancels, if it does
    timeout       its deadline
    """

    length: int
    after: int
    flush: bool
    pauses: int
    leaves_after: int | None
    timeout: float


@dataclass(frozen=True)
class Fault:
    """What happens once the server has sent *after* more events.

    kind   "reset" of the connections, "ended", "aborted" or "evicted" streams, a "restart", or a "refusal" of
           the next request
    """

    after: int
    kind: str


VISITS = st.builds(
    Visit,
    length=st.sampled_from(LENGTHS),
    after=st.integers(0, 6),
    flush=st.booleans(),
    pauses=st.sampled_from([0, 0, 1, 10]),
    leaves_after=st.one_of(st.none(), st.none(), st.integers(0, 70)),
    timeout=st.sampled_from([PATIENCE, PATIENCE, PATIENCE, 0.03]),
)
FAULTS = st.builds(
    Fault,
    after=st.integers(1, 200),
    kind=st.sampled_from(["reset", "ended", "aborted", "evicted", "restart", "refusal"]),
)


@dataclass
class Unreliable(GenerationServiceServicer):
    """Echoes prompts, a byte a token, and has one fault after the other.

    faults   those that are left
    broken   kinds of those that happened, which `Place` carries out
    """

    faults: list[Fault]
    broken: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    multiplexer: Multiplexer | None = None
    sent: int = 0
    refuses: int = 0
    running: int = 0
    ending: dict[asyncio.Task[Any], str] = field(default_factory=dict)

    async def Multiplex(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]
        assert self.multiplexer is not None
        task = asyncio.create_task(self.multiplexer.serve(context))
        self.ending[task] = ""
        try:
            await asyncio.wait([task])
        finally:
            kind = self.ending.pop(task)
            task.cancel()
            await asyncio.wait([task])
        if kind == "aborted":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as a proxy does")
        if not kind:
            await task

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        raise NotImplementedError
        yield

    async def answer(self, incoming: Incoming, write: Write) -> None:
        self.running += 1
        try:
            if self.refuses:
                self.refuses -= 1
                raise errors.Draining("not now", retry_after=0.001)
            for response in answer(incoming.request):
                await write(response)
                self.sent += 1
                if self.faults and self.sent >= self.faults[0].after:
                    self.sent = 0
                    self.broken.put_nowait(self.faults.pop(0).kind)
                if self.sent % 3 == 0:
                    await asyncio.sleep(0)
        finally:
            self.running -= 1

    def end_streams(self, kind: str) -> None:
        """End all streams: with OK, or as *kind* says."""
        for task in self.ending:
            self.ending[task] = kind
            task.cancel()


@asynccontextmanager
async def place(servicer: Unreliable) -> AsyncGenerator[Client, None]:
    """Run the server behind a proxy that resets connections, with its faults; yield a client."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(AsyncExitStack())
        calls, port = await start(server, servicer, 0)
        proxy = await stack.enter_async_context(Proxy(f"127.0.0.1:{port}").serving())
        client = await stack.enter_async_context(
            Client(open_channel(proxy.address), multiplex=True, retries=8, stall_seconds=5)
        )

        async def fail() -> None:
            nonlocal calls
            while True:
                match await servicer.broken.get():
                    case "reset":
                        proxy.reset()
                    case "evicted":
                        calls.requests.evict()
                    case "refusal":
                        servicer.refuses += 1
                    case "restart":
                        servicer.end_streams("aborted")
                        await server.aclose()
                        calls, _ = await start(server, servicer, port)
                    case kind:
                        servicer.end_streams(kind)

        failing = asyncio.create_task(fail())
        try:
            yield client
        finally:
            failing.cancel()
            await asyncio.wait([failing])


async def start(stack: AsyncExitStack, servicer: Unreliable, port: int) -> tuple[Calls, int]:
    """Start a server of *servicer*; return its calls and its port."""
    calls = Calls()
    servicer.multiplexer = Multiplexer(servicer.answer, calls)
    running = await stack.enter_async_context(
        serving(
            lambda server: add_GenerationServiceServicer_to_server(servicer, server),
            (),
            host="127.0.0.1",
            port=port,
            drain_seconds=0,
            calls=calls,
            untracked=frozenset({METHOD}),
            ready=lambda: True,
        )
    )
    return calls, running.port


async def pay(client: Client, number: int, visit: Visit, faults: int) -> None:
    """Send one request and check what comes, whatever ends it."""
    for _ in range(visit.after):
        await asyncio.sleep(0)
    said = (f"{number}:" + "abcdefghijklmnopqrstuvwxyz" * 12)[: visit.length]
    request = prompt(said)
    if visit.flush:
        request.stream.flush_tokens = 1
    text = ""
    kinds: list[str | None] = []
    try:
        async with (
            asyncio.timeout(PATIENCE),
            aclosing(client.generate(request, timeout=visit.timeout)) as events,
        ):
            async for response in events:
                assert kinds[-1:] != ["finish"]
                kinds.append(response.WhichOneof("event"))
                if kinds[-1] == "delta":
                    delta = response.delta
                    assert delta.offset == len(text)
                    assert list(delta.token_ids) == list(delta.text.encode())
                    text += delta.text
                if visit.leaves_after == len(kinds):
                    break
                if visit.pauses and len(kinds) % visit.pauses == 0:
                    await asyncio.sleep(0.001)
    except errors.DeadlineExceeded:
        assert visit.timeout < 1
    except errors.Unavailable:
        assert faults, "only a fault makes the server unavailable"
    else:
        if visit.leaves_after is None or len(kinds) < visit.leaves_after:
            assert text == said
            assert kinds[-1] == "finish"
    assert kinds[:1] in ([], ["accepted"])
    assert kinds.count("accepted") <= 1
    assert text == said[: len(text)]


@given(visits=st.lists(VISITS, min_size=1, max_size=25), faults=st.lists(FAULTS, max_size=4))
@settings(max_examples=40)
async def test_every_answer_is_complete_or_ends_with_an_error(
    visits: list[Visit], faults: list[Fault]
) -> None:
    servicer = Unreliable(list(faults))
    async with place(servicer) as client:
        async with asyncio.TaskGroup() as tasks:
            for number, visit in enumerate(visits):
                tasks.create_task(pay(client, number, visit, len(faults)))

        await eventually(lambda: not servicer.running)
