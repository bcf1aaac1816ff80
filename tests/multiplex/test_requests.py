"""Each request of a stream behaves as a call of Generate: cancellation, deadline, metadata, one end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable

import pytest
from google.protobuf.duration_pb2 import Duration
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace.multiplex import serving
from headrace.multiplex.serving import TURN
from headrace.router.state.batcher_peer import HOPS
from headrace.runtime.serving.limits import Limits
from tests.harness import eventually
from tests.multiplex.raw import HELLO, Server, opened, server


@pytest.fixture(scope="module")
async def served() -> AsyncGenerator[Server, None]:
    async with server() as running:
        yield running


async def test_a_running_request_is_cancelled(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("wait", "wait")
        await caller.read_until(lambda: caller.events[1] and caller.events[2])
        await caller.send(cancel=[1])
        await caller.answers(1)

        assert caller.events == {1: ["accepted", "error"], 2: ["accepted"]}
        assert caller.reason(1) == "CANCELLED"
        await eventually(lambda: served.echo.running == 1)
    await eventually(lambda: not served.echo.running)


async def test_cancelling_an_unknown_or_ended_request_has_no_effect(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("hi")
        await caller.answers(1)
        await caller.send(cancel=[1, 1, 2, 0, 2**32 - 1])
        await caller.open("there", first=2)
        await caller.answers(2)

    assert caller.events[1] == ["accepted", "delta", "delta", "finish"]
    assert caller.text[2] == "there"


@pytest.mark.parametrize("count", [1, TURN, TURN + 1])
async def test_a_request_that_is_cancelled_in_its_own_message_ends(served: Server, count: int) -> None:
    handles = range(1, count + 1)
    async with served.stream(hello=False) as caller:
        await caller.send(hello=HELLO, open=[opened(n, "wait") for n in handles], cancel=handles)
        await caller.answers(*handles)

        assert {caller.reason(n) for n in handles} == {"CANCELLED"}
        await caller.call.done_writing()
        assert await caller.to_the_end() is None


@pytest.mark.parametrize(
    ("prompt", "end", "reason"),
    [("fail", "error", "NO_WORKERS"), ("stop", "error", "UNAVAILABLE"), ("late", "finish", "")],
)
async def test_each_request_has_exactly_one_end(served: Server, prompt: str, end: str, reason: str) -> None:
    async with served.stream() as caller:
        await caller.open(prompt, "hi")
        await caller.call.done_writing()
        assert await caller.to_the_end() is None

    assert caller.events[1][-1] == end
    assert sum(event in ("finish", "error") for event in caller.events[1]) == 1
    assert caller.reason(1) == reason
    assert caller.text[2] == "hi", "other requests are not affected"


@pytest.mark.parametrize("ttl", [0.0, 0.05])
async def test_a_deadline_ends_a_request_whose_service_does_not_notice(served: Server, ttl: float) -> None:
    async with served.stream() as caller:
        await caller.open("wait", ttl=ttl)
        await caller.answers(1)

    assert caller.reason(1) == "DEADLINE"
    await eventually(lambda: not served.echo.running)


async def test_the_time_left_reaches_the_service(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("timed", ttl=40)
        await caller.open("timeless", first=2)
        await caller.answers(1, 2)

    timed, timeless = served.echo.received[-2:]
    assert timed.time_remaining == 40
    assert timeless.time_remaining is None


async def test_a_request_without_deadline_is_not_ended(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "WATCH_SECONDS", 0.001)
    async with served.stream() as caller:
        await caller.open("wait")
        await caller.open("wait", first=2, ttl=0.01)
        await caller.answers(2)

    assert caller.events[1] == ["accepted"]


@pytest.mark.parametrize(
    "ttl", [Duration(seconds=1, nanos=-1), Duration(seconds=-1, nanos=1), Duration(nanos=2_000_000_000)]
)
async def test_an_invalid_time_ends_the_request_alone(served: Server, ttl: Duration) -> None:
    async with served.stream() as caller:
        await caller.send(open=[opened(1, "hi", ttl=ttl), opened(2, "hi")])
        await caller.answers(1, 2)

    assert caller.reason(1) == "INVALID_REQUEST"
    assert caller.ends[1].field == "open.ttl"
    assert caller.text[2] == "hi"


async def test_metadata_reaches_the_service(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("hi", metadata={HOPS: "2", "x-shop": "7"})
        await caller.answers(1)

    assert dict(served.echo.received[-1].metadata) == {HOPS: "2", "x-shop": "7"}


async def test_each_request_has_a_span_whose_parent_is_its_own_caller(
    served: Server, spans: InMemorySpanExporter
) -> None:
    parents = {1: "00-" + "a" * 32 + "-" + "b" * 16 + "-01", 2: "00-" + "c" * 32 + "-" + "d" * 16 + "-01"}
    async with served.stream() as caller:
        await caller.send(
            open=[opened(n, "hi", metadata={"traceparent": parent}) for n, parent in parents.items()]
        )
        await caller.answers(1, 2)
        await eventually(lambda: len(spans.get_finished_spans()) == 2)

    seen = {
        (trace.format_trace_id(span.context.trace_id), trace.format_span_id(span.parent.span_id))
        for span in spans.get_finished_spans()
        if span.parent is not None
    }
    assert seen == {("a" * 32, "b" * 16), ("c" * 32, "d" * 16)}
    assert {span.name for span in spans.get_finished_spans()} == {"headrace.v1.GenerationService/Generate"}


async def test_requests_count_as_calls_and_bytes_in_flight() -> None:
    async with server() as served, served.stream() as caller:
        await caller.open("wait", "wait")
        await caller.read_until(lambda: caller.events[1] and caller.events[2])

        assert served.serving.budget.calls == 3, "two requests, and the stream itself"
        assert served.serving.budget.bytes == 2 * opened(1, "wait").ByteSize()
        assert served.serving.requests.in_flight == 2, "a stream is not a request"
        await caller.send(cancel=[1, 2])
        await caller.answers(1, 2)
        assert (served.serving.budget.calls, served.serving.budget.bytes) == (1, 0)


async def test_a_busy_server_rejects_the_one_request(count: Callable[..., float]) -> None:
    refused = count("headrace.requests.refused", error="SERVER_BUSY")
    async with server(Limits(max_calls=8)) as served, served.stream() as caller:
        await caller.open(*["wait"] * 6)
        await caller.answers(4, 5, 6)

        assert {caller.reason(n) for n in (4, 5, 6)} == {"SERVER_BUSY"}
        assert count("headrace.requests.refused", error="SERVER_BUSY") == refused + 3
        assert caller.ends[4].retry_after
        await caller.send(cancel=[1])
        await caller.answers(1)
        await caller.open("hi", first=7)
        await caller.answers(7)
        assert caller.text[7] == "hi"


async def test_the_bytes_of_requests_are_limited() -> None:
    async with server(Limits(max_inflight_bytes=20_000)) as served, served.stream() as caller:
        await caller.send(open=[opened(n, "wait", metadata={"x": "y" * 4000}) for n in (1, 2, 3)])
        await caller.answers(3)

        assert caller.reason(3) == "SERVER_BUSY"
        assert not caller.ends.keys() & {1, 2}


async def test_losing_the_stream_cancels_its_requests() -> None:
    async with server() as served:
        async with served.stream() as caller:
            await caller.open(*["wait"] * 40)
            await caller.read_until(lambda: len(caller.events) == 40)
        await eventually(lambda: not served.echo.running)

        assert served.echo.cancelled == 40
        await eventually(lambda: served.serving.budget.calls == 0)


async def test_hundreds_of_requests_of_one_message_start_without_delaying_others() -> None:
    """A message that opens hundreds of requests leaves turns of the event loop to everything else."""
    async with server() as served:
        turns: list[int] = []

        async def watch() -> None:
            while len(served.echo.received) < 256:
                turns.append(len(served.echo.received))
                await asyncio.sleep(0)

        async with served.stream() as caller:
            watching = asyncio.create_task(watch())
            await caller.open(*["wait"] * 256)
            await caller.read_until(lambda: len(caller.events) == 256)
            await watching

    begun = [after - before for before, after in itertools.pairwise(turns)]
    assert max(begun) <= 2 * TURN
