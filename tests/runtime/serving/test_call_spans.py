"""How each call ends is what its spans and metrics say: on the server and the client, for each kind of RPC.

Which statuses are errors: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/. On a server these are the
server's own failures, on a client all but OK. `error.type` is the reason of the error where there is one,
which says more than the status.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.channel import open_channel
from headrace.client import Client, chat, connect
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.multiplex.serving import Incoming, Multiplexer, Write
from headrace.runtime.security.guard import Peer
from headrace.runtime.security.identity import ANONYMOUS, Identity, current
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.interceptor import ServerInterceptor
from headrace.runtime.serving.limits import Limits
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2_grpc as generation
from headrace.v1 import routing_service_pb2, routing_service_pb2_grpc
from tests.harness import PATIENCE, eventually
from tests.runtime.serving.conftest import Durations

SERVICE = "headrace.test.Kinds"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@dataclass(frozen=True)
class Ending:
    """How a call ends.

    status        its gRPC status
    error_type    of the spans and metrics
    failed        whether the server's span has status ERROR
    """

    status: str
    error_type: str
    failed: bool


# By the name of a method, which does what its name says.
ENDINGS = {
    "Succeed": Ending("OK", "", failed=False),
    "Overload": Ending("RESOURCE_EXHAUSTED", "QUEUE_FULL", failed=False),
    "Refuse": Ending("INVALID_ARGUMENT", "INVALID_SAMPLING", failed=False),
    "Lose": Ending("UNAVAILABLE", "WORKER_LOST", failed=True),
    "Crash": Ending("INTERNAL", "INTERNAL", failed=True),
    "Forget": Ending("UNIMPLEMENTED", "UNIMPLEMENTED", failed=True),
    "Abort": Ending("NOT_FOUND", "NOT_FOUND", failed=False),
    "AbortFailed": Ending("DATA_LOSS", "DATA_LOSS", failed=True),
    "SetCode": Ending("ALREADY_EXISTS", "ALREADY_EXISTS", failed=False),
    "Cancel": Ending("CANCELLED", "CANCELLED", failed=False),
    "Outlast": Ending("DEADLINE_EXCEEDED", "DEADLINE", failed=True),
    "Unknown": Ending("UNAUTHENTICATED", "CREDENTIALS_INVALID", failed=False),
    "Crowd": Ending("RESOURCE_EXHAUSTED", "SERVER_BUSY", failed=False),
}


class Doorman:
    """A guard that knows nobody who calls `Unknown`."""

    async def identify(self, method: str, metadata: object, peer: Peer) -> Identity:
        if method.endswith("Unknown"):
            raise errors.CredentialsInvalid("unknown")
        return ANONYMOUS

    async def maintain(self) -> None: ...


async def end(name: str, began: asyncio.Event, context: Any = None) -> None:
    """End a call as *name* says."""
    began.set()
    match name:
        case "Overload":
            raise errors.Overloaded("full")
        case "Refuse":
            raise errors.InvalidSampling("wrong")
        case "Lose":
            raise errors.WorkerLost("lost")
        case "Crash":
            raise RuntimeError("text of a prompt")
        case "Forget":
            raise NotImplementedError
        case "Abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        case "AbortFailed":
            await context.abort(grpc.StatusCode.DATA_LOSS, "gone")
        case "SetCode":
            context.set_code(grpc.StatusCode.ALREADY_EXISTS)
        case "Cancel" | "Outlast":
            await asyncio.Event().wait()


def behaviour(kind: str, name: str, began: asyncio.Event) -> Callable[..., Any]:
    """Return a method of a kind of RPC: it reads its requests, and sends a response before it ends."""
    sends_stream = kind.endswith("stream")

    async def one(requests: Any, context: Any) -> bytes:
        if kind.startswith("stream"):
            assert [each async for each in requests] == [b"x"]
        await end(name, began, context)
        return b"y"

    async def many(requests: Any, context: Any) -> AsyncIterator[bytes]:
        if kind.startswith("stream"):
            assert [each async for each in requests] == [b"x"]
        yield b"y"
        await end(name, began, context)

    return many if sends_stream else one


@asynccontextmanager
async def running(calls: Calls) -> AsyncGenerator[tuple[grpc.aio.Channel, asyncio.Event], None]:
    """Serve every ending of every kind; the event is set once a call has begun."""
    handlers, began = {}, asyncio.Event()
    for kind in KINDS:
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        for name in ENDINGS:
            handlers[f"{kind}_{name}"] = make(behaviour(kind, name, began), request_deserializer=bytes)
    calls.guard = Doorman()
    server = grpc.aio.server(interceptors=[ServerInterceptor(calls)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield channel, began
    await server.stop(0)


async def call(channel: grpc.aio.Channel, kind: str, name: str, began: asyncio.Event) -> None:
    """Make a call with a plain gRPC client, and read its responses. Raises AioRpcError."""
    timeout = 0.3 if name == "Outlast" else PATIENCE
    made = getattr(channel, kind)(f"/{SERVICE}/{kind}_{name}")(
        iter([b"x"]) if kind.startswith("stream") else b"x", timeout=timeout
    )

    async def read() -> None:
        if kind.endswith("stream"):
            async for _ in made:
                pass
        else:
            await made

    reading = asyncio.create_task(read())
    if name == "Cancel":
        await began.wait()
        made.cancel()
    await reading


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_records_how_a_call_ended(
    kind: str, name: str, spans: InMemorySpanExporter, durations: Durations
) -> None:
    expected, method = ENDINGS[name], f"{SERVICE}/{kind}_{name}"
    calls = Calls(Limits(max_calls=0)) if name == "Crowd" else Calls()
    before = durations("rpc.server.call.duration")
    async with running(calls) as (channel, began):
        if name == "Succeed":
            await call(channel, kind, name, began)
        else:
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await call(channel, kind, name, began)
        await eventually(lambda: [span for span in spans.get_finished_spans() if span.name == method])
    (span,) = [span for span in spans.get_finished_spans() if span.name == method]
    assert_ended(span, expected, failed=expected.failed)
    assert "text of a prompt" not in span.to_json()
    new = durations("rpc.server.call.duration") - before
    assert new == Counter({(method, expected.status, expected.error_type): 1})


def assert_ended(span: ReadableSpan, expected: Ending, *, failed: bool) -> None:
    attributes = span.attributes or {}
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.method"] == span.name
    assert attributes["rpc.status_code"] == expected.status
    assert attributes.get("error.type", "") == expected.error_type
    assert span.status.status_code.name == ("ERROR" if failed else "UNSET")
    assert not span.events or not failed or span.events[-1].name != "finish"


class Scripted(generation.GenerationServiceServicer, routing_service_pb2_grpc.RoutingServiceServicer):
    """Ends each request as its prompt says, by every RPC of Headrace's contract."""

    def __init__(self, calls: Calls) -> None:
        self.began = asyncio.Event()
        self._multiplexer = Multiplexer(self._answer, calls)

    async def _answer(self, incoming: Incoming, write: Write) -> None:
        await write(pb.GenerateResponse(accepted=pb.Accepted(request_id="r")))
        await end(incoming.request.chat.messages[0].content, self.began)
        await write(pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP)))

    async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._answer(Incoming(request, context.time_remaining(), current()), context.write)

    async def Multiplex(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        await self._multiplexer.serve(context)

    async def ListTiers(self, request: Any, context: Any) -> routing_service_pb2.ListTiersResponse:
        return routing_service_pb2.ListTiersResponse()

    async def Explain(self, request: Any, context: Any) -> routing_service_pb2.ExplainResponse:
        await end(request.request.chat.messages[0].content, self.began)
        return routing_service_pb2.ExplainResponse()

    async def Feedback(self, request: Any, context: Any) -> routing_service_pb2.FeedbackResponse:
        await end(request.request_id, self.began)
        return routing_service_pb2.FeedbackResponse()


@asynccontextmanager
async def scripted(calls: Calls) -> AsyncGenerator[tuple[int, Scripted], None]:
    calls.guard = Doorman()
    server = grpc.aio.server(interceptors=[ServerInterceptor(calls, untracked=frozenset({MULTIPLEX}))])
    servicer = Scripted(calls)
    generation.add_GenerationServiceServicer_to_server(servicer, server)
    routing_service_pb2_grpc.add_RoutingServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    calls.address = ("127.0.0.1", port)
    await server.start()
    yield port, servicer
    await server.stop(0)


async def ask(client: Client, way: str, name: str) -> None:
    """Make a call with our client; see WAYS."""
    timeout = 0.3 if name == "Outlast" else PATIENCE
    if way == "explain":
        await client.explain(chat(name), timeout=timeout)
    elif way == "feedback":
        await client.feedback(name, ok=True, timeout=timeout)
    else:
        async with aclosing(client.generate(chat(name), timeout=timeout, resume=False)) as stream:
            async for _ in stream:
                pass


# How a request reaches the server, and the method of its spans.
WAYS = {
    "generate": "headrace.v1.GenerationService/Generate",
    "multiplex": "headrace.v1.GenerationService/Generate",
    "explain": "headrace.v1.RoutingService/Explain",
    "feedback": "headrace.v1.RoutingService/Feedback",
}
OURS = ("Succeed", "Overload", "Refuse", "Lose", "Crash", "Cancel", "Outlast", "Crowd")


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("way", WAYS)
async def test_our_client_and_the_server_record_how_a_call_ended(
    way: str, name: str, spans: InMemorySpanExporter, durations: Durations
) -> None:
    expected, method = ENDINGS[name], WAYS[way]
    metrics = ("rpc.client.call.duration", "rpc.server.call.duration")
    before = [durations(metric) for metric in metrics]
    # A connection may hold half of the calls. A shared stream is one.
    limits = Limits(max_calls=2 if way == "multiplex" else 0) if name == "Crowd" else Limits()

    def ended() -> dict[str, ReadableSpan]:
        return {span.kind.name: span for span in spans.get_finished_spans() if span.name == method}

    async with (
        scripted(Calls(limits)) as (port, servicer),
        connect(f"127.0.0.1:{port}", retries=0, multiplex=way == "multiplex") as client,
    ):
        asking = asyncio.create_task(ask(client, way, name))
        if name == "Cancel":
            await servicer.began.wait()
            asking.cancel()
        if name == "Succeed":
            await asking
        else:
            with pytest.raises((errors.HeadraceError, asyncio.CancelledError)):
                await asking
        await eventually(lambda: len(ended()) == 2)

    client_span, server_span = ended()["CLIENT"], ended()["SERVER"]
    assert_ended(client_span, expected, failed=name != "Succeed")
    assert_ended(server_span, expected, failed=expected.failed)
    for span in (client_span, server_span):
        assert span.attributes is not None
        assert (span.attributes["server.address"], span.attributes["server.port"]) == ("127.0.0.1", port)
    assert server_span.parent is not None
    assert server_span.parent.span_id == client_span.context.span_id
    for metric, old in zip(metrics, before, strict=True):
        new = durations(metric) - old
        assert new == Counter({(method, expected.status, expected.error_type): 1}), metric


async def test_a_client_records_calls_that_reach_no_server(
    spans: InMemorySpanExporter, durations: Durations
) -> None:
    before = durations("rpc.client.call.duration")
    async with connect("127.0.0.1:9", retries=0) as client:
        for way in ("generate", "explain"):
            with pytest.raises(errors.Unavailable):
                await ask(client, way, "Succeed")

    for span in spans.get_finished_spans():
        assert_ended(span, Ending("UNAVAILABLE", "UNAVAILABLE", failed=True), failed=True)
    new = durations("rpc.client.call.duration") - before
    assert new == Counter({(WAYS[way], "UNAVAILABLE", "UNAVAILABLE"): 1 for way in ("generate", "explain")})


@pytest.mark.parametrize("multiplex", [True, False])
async def test_a_call_that_the_client_gives_an_error_of_its_own_has_its_class(
    multiplex: bool, spans: InMemorySpanExporter
) -> None:
    """As the router does with calls of a batcher that sends nothing any more."""
    async with (
        scripted(Calls()) as (port, servicer),
        connect(f"127.0.0.1:{port}", retries=0, multiplex=multiplex) as client,
    ):
        asking = asyncio.create_task(ask(client, "generate", "Cancel"))
        await servicer.began.wait()
        client.fail_calls(LookupError("silent"))
        with pytest.raises(LookupError):
            await asking

    (span,) = [span for span in spans.get_finished_spans() if span.kind.name == "CLIENT"]
    assert_ended(span, Ending("UNKNOWN", "LookupError", failed=True), failed=True)
