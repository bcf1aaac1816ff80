"""Spans that a real SDK exports are received and become a tree."""

from __future__ import annotations

import asyncio
import os

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, StatusCode
from rich.console import Console

from headrace.cli.demo.demo import arrived
from headrace.cli.demo.otlp_receiver import Event, Span, is_complete, otlp_receiver
from headrace.cli.demo.trace_tree import busiest, trace_tree

MS = 1_000_000


def span(span_id: str, parent: str, start: int, end: int, **more: object) -> Span:
    fields: dict[str, object] = {
        "service": "router",
        "name": f"span-{span_id}",
        "trace_id": "t1",
        "span_id": span_id,
        "parent_id": parent,
        "kind": "internal",
        "start": start * MS,
        "end": end * MS,
        "attributes": {},
        "events": [],
        "links": [],
        "failed": False,
    }
    return Span(**{**fields, **more})  # type: ignore[arg-type]


def drawn(spans: list[Span], trace_id: str = "t1") -> list[str]:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(trace_tree(spans, trace_id))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_children_are_below_their_parents_in_order_of_time() -> None:
    lines = drawn(
        [
            span("c", "a", 50, 60, name="worker.decode", service="worker"),
            span("b", "a", 10, 40, events=[Event("first_token", 30 * MS)]),
            span("a", "", 0, 100, name="root", service="client"),
        ]
    )

    assert lines[0] == "trace t1"
    assert [line.split()[-3:] for line in lines[1:]] == [
        ["root", "100", "ms"],
        ["span-b", "30", "ms"],
        ["ms", "•", "first_token"],
        ["worker.decode", "10", "ms"],
    ]
    assert "+10 ms router" in lines[2]
    assert "+30 ms • first_token" in lines[3]


def test_a_batch_of_another_trace_is_shown_where_it_is_linked() -> None:
    batch = span("x", "", 20, 25, trace_id="t2", name="batcher.batch", links=["b", "other"])
    lines = drawn([span("a", "", 0, 100), span("b", "a", 10, 40), batch])

    assert "⇄ router batcher.batch 5 ms with 2 requests" in lines[3]
    assert len(lines) == 4


def test_linked_spans_are_shown_once_in_either_direction() -> None:
    batch = span("x", "", 20, 25, trace_id="t2", name="batcher.batch", links=["a", "b"])
    lines = drawn([span("a", "", 0, 100, links=["x", "gone"]), span("b", "a", 1, 2, links=["x"]), batch])

    assert sum("batcher.batch" in line for line in lines) == 1


def test_the_busiest_trace_shares_its_batch_with_the_most() -> None:
    spans = [span(f"root-{n}", "", 0, 9, trace_id=f"t{n}") for n in (1, 2, 3)]
    spans.append(span("x", "", 1, 2, trace_id="b1", links=["root-1"]))
    spans.append(span("y", "", 1, 2, trace_id="b2", links=["root-2", "root-3"]))

    assert busiest(spans, ["t1", "t2", "t3"]) == "t2"
    assert busiest(spans, ["t1"]) == "t1"
    assert busiest([], ["t1", "t2"]) == "t1"


def test_client_and_server_spans_are_distinguished() -> None:
    name = "headrace.v1.GenerationService/Generate"
    call = span("a", "", 0, 100, name=name, kind="client", service="headrace-client")
    lines = drawn([call, span("b", "a", 1, 99, name=name, kind="server", service="headrace-router")])

    assert "client → GenerationService/Generate" in lines[1]
    assert "router GenerationService/Generate" in lines[2]


def test_a_span_without_its_parent_is_still_shown() -> None:
    assert any("span-b" in line for line in drawn([span("b", "lost", 0, 1)]))


def test_no_spans_are_an_empty_tree() -> None:
    assert drawn([], "") == ["trace (none)"]


def test_a_trace_is_whole_when_every_parent_is_there() -> None:
    root, child, grandchild = span("a", "", 0, 9), span("b", "a", 1, 8), span("c", "b", 2, 7)

    assert is_complete([root, child, grandchild], "t1")
    assert not is_complete([root, grandchild], "t1")
    assert not is_complete([child, grandchild], "t1")
    assert not is_complete([], "t1")


def test_the_demo_waits_for_the_spans_of_the_worker() -> None:
    """Each process exports at its own interval; the root span may arrive before the worker's spans."""
    spans = [span("a", "", 0, 9), span("b", "a", 1, 8)]

    assert not arrived(spans, ["t1"], {"t1"})
    assert arrived([*spans, span("c", "b", 2, 7, name="worker.decode")], ["t1"], {"t1"})
    assert arrived(spans, ["t1"], set()), "a rejected request reached no worker"
    assert not arrived([*spans[1:], span("c", "b", 2, 7, name="worker.decode")], ["t1"], {"t1"})


async def test_exported_spans_are_received(monkeypatch: pytest.MonkeyPatch) -> None:
    async with otlp_receiver() as sink:
        for name, value in sink.environment.items():
            monkeypatch.setenv(name, value)
        provider = TracerProvider(resource=Resource({"service.name": "test"}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        tracer = provider.get_tracer("test")
        with tracer.start_as_current_span("parent", attributes={"n": 1, "names": ["a", "b"]}) as parent:
            parent.add_event("halfway")
            with tracer.start_as_current_span("child", links=[Link(parent.get_span_context())]) as child:
                child.set_status(StatusCode.ERROR)

        await sink.wait_for(lambda spans: len(spans) == 2, timeout=90)
        await asyncio.to_thread(provider.shutdown)

    by_name = {each.name: each for each in sink.spans}
    assert by_name["child"].parent_id == by_name["parent"].span_id
    assert by_name["child"].links == [by_name["parent"].span_id]
    assert by_name["child"].failed
    assert by_name["child"].kind == "internal"
    assert by_name["parent"].attributes == {"n": 1, "names": ["a", "b"]}
    assert [event.name for event in by_name["parent"].events] == ["halfway"]
    assert by_name["parent"].service == "test"
    assert os.environ["OTEL_METRICS_EXPORTER"] == "none"


async def test_the_wait_for_missing_spans_ends() -> None:
    async with otlp_receiver() as sink:
        with pytest.raises(TimeoutError):
            await sink.wait_for(lambda spans: bool(spans), timeout=0)
