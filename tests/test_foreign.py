"""Statuses of proxies, web servers and other services have a class, advice and a retry rule."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest

from headrace import errors, statuses
from headrace.cli.complaints import advice
from headrace.client import chat, connect
from headrace.v1 import generation_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from tests.harness import PATIENCE, collect, prompt
from tests.multiplexed import MultiplexedServicer
from tests.router.fake_batchers import FakeBatcher, routed

TARGET = "mesh.example:50051"
CLASSES = {
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
    grpc.StatusCode.UNKNOWN: errors.InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.ABORTED: errors.Aborted,
    grpc.StatusCode.OUT_OF_RANGE: errors.OutOfRange,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.INTERNAL: errors.InternalError,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DATA_LOSS: errors.DataLoss,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
}


class Between(MultiplexedServicer):
    """Ends its first calls with a bare status, as a proxy does; then it answers "ab" and finishes.

    failures   the number of calls that end so, after the first event if *late*
    """

    def __init__(self, code: grpc.StatusCode, failures: int = 10_000, *, late: bool = False) -> None:
        self.code = code
        self.failures = failures
        self.late = late
        self.calls = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.calls += 1
        failing = self.calls <= self.failures
        if failing and not self.late:
            await context.abort(self.code, "says the proxy")
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r", tier="t", model="echo"))
        for offset in range(len(request.resume.token_ids), 2):
            delta = pb.Delta(offset=offset, token_count=1, token_ids=[97 + offset], text="ab"[offset])
            yield pb.GenerateResponse(delta=delta)
            if failing:
                await context.abort(self.code, "says the proxy")
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))


@asynccontextmanager
async def behind(servicer: Between) -> AsyncGenerator[str, None]:
    """Serve it without our interceptors; yields its address."""
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize("code", CLASSES, ids=lambda code: code.name)
async def test_every_status_of_another_server_has_its_class_and_advice(code: grpc.StatusCode) -> None:
    async with behind(Between(code)) as target, connect(target, retries=0) as client:
        with pytest.raises(errors.HeadraceError) as caught:
            await collect(client, chat("x"))

    assert type(caught.value) is CLASSES[code]
    if code is not grpc.StatusCode.UNKNOWN:
        assert caught.value.code is code
    said = advice(caught.value, TARGET)
    if isinstance(caught.value, errors.Foreign):
        assert "says the proxy" in said
        assert "proxy" in said.partition(";")[2], "the message names the possible senders"
        assert "logs of the servers" not in said


def test_every_status_is_covered() -> None:
    assert set(CLASSES) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE])
async def test_a_call_that_an_intermediary_cancelled_is_retried(code: grpc.StatusCode, late: bool) -> None:
    servicer = Between(code, 2, late=late)
    async with behind(servicer) as target, connect(target) as client:
        answer = await collect(client, chat("x"))

    assert answer.text == "ab"
    assert servicer.calls == 3


@pytest.mark.parametrize(
    "code",
    [code for code, cls in CLASSES.items() if issubclass(cls, errors.Foreign)],
    ids=lambda code: code.name,
)
async def test_a_call_that_a_proxy_rejected_is_not_retried(code: grpc.StatusCode) -> None:
    servicer = Between(code)
    async with behind(servicer) as target, connect(target) as client:
        with pytest.raises(errors.Foreign):
            await collect(client, chat("x"))

    assert servicer.calls == 1


@pytest.mark.parametrize(
    "foreign", [errors.PermissionDenied("RBAC: access denied"), errors.Aborted("reset")], ids=str
)
async def test_a_proxy_that_rejects_the_router_does_not_reject_the_caller(
    foreign: errors.Foreign,
) -> None:
    """The router tries the next batcher. Without one, the tier is unreachable."""
    denied, other = FakeBatcher(refuses=foreign), FakeBatcher(running=9)
    async with routed(only=[denied, other]) as client:
        assert (await collect(client, prompt("hello"))).text == "hello"
    assert len(denied.requests) == len(other.requests) == 1

    async with routed(only=FakeBatcher(refuses=foreign)) as client:
        with pytest.raises(errors.Unavailable, match=foreign.reason):
            await collect(client, prompt("hello"))


async def test_an_answer_that_a_proxy_ended_is_resumed_on_another_batcher() -> None:
    first, second = FakeBatcher(breaks=[2], breaks_with=errors.Aborted("reset")), FakeBatcher(running=9)
    async with routed(only=[first, second]) as client:
        assert (await collect(client, prompt("hello"))).text == "hello"
    assert len(second.requests) == 1


@asynccontextmanager
async def speaking_http2(status: int, body: bytes) -> AsyncGenerator[str, None]:
    """Run a web server that answers every request with HTML; yields its address."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
        )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readexactly(24)  # the preface
            writer.write(frame(4, 0, 0))  # SETTINGS
            while True:
                head = await reader.readexactly(9)
                stream = int.from_bytes(head[5:])
                await reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == 4 and not head[4] & 1:
                    writer.write(frame(4, 1, 0))
                if head[3] == 1:  # HEADERS: :status and content-type, as HPACK literals
                    block = b"\x08\x03" + str(status).encode() + b"\x0f\x10\x09text/html"
                    writer.write(frame(1, 4 if body else 5, stream, block))
                    writer.write(frame(0, 1, stream, body) if body else b"")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (301, errors.InternalError),
        (400, errors.InternalError),
        (401, errors.Unauthenticated),
        (403, errors.PermissionDenied),
        (404, errors.Unimplemented),
        (429, errors.Unavailable),
        (500, errors.InternalError),
        (502, errors.Unavailable),
        (503, errors.Unavailable),
        (504, errors.Unavailable),
    ],
)
async def test_answers_in_http_are_reported_as_such(
    status: int, expected: type[errors.HeadraceError]
) -> None:
    """The class follows gRPC's mapping of HTTP statuses, and so does the retry rule."""
    async with speaking_http2(status, b"") as target, connect(target, retries=0) as client:
        with pytest.raises(errors.HeadraceError) as caught:
            await client.list_tiers(timeout=PATIENCE)

    assert type(caught.value) is expected
    assert f"HTTP status {status}" in caught.value.message
    assert caught.value.fields["http_status"] == str(status)
    said = advice(caught.value, target)
    assert f"check that {target} is the gRPC port of a mesh" in said
    assert "start one" not in said
    assert "logs of the servers" not in said


async def test_html_in_place_of_a_status_is_reported_as_http() -> None:
    async with speaking_http2(200, b"<html>welcome</html>") as target, connect(target, retries=0) as client:
        with pytest.raises(errors.HeadraceError, match="a proxy or web server") as caught:
            await client.list_tiers(timeout=PATIENCE)

    assert "gRPC port of a mesh" in advice(caught.value, target)


async def test_a_server_of_http_1_is_reported_as_such() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with connect(target, retries=0) as client:
            with pytest.raises(errors.Unavailable, match="HTTP status 400") as caught:
                await client.list_tiers(timeout=PATIENCE)

    assert "gRPC port of a mesh" in advice(caught.value, target)


def test_headers_that_are_too_large_are_reported_as_too_large() -> None:
    nothing = grpc.aio.Metadata()
    said = "received initial metadata size exceeds hard limit (20000 vs. 16384)"

    error = statuses.from_rpc_error(
        grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, nothing, nothing, said)
    )

    assert type(error) is errors.MessageTooLarge
