"""One trace per request, links between batches and requests, and serving without a collector."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, propagate, trace
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import (
    Getter,
    Setter,
    TextMapPropagator,
    default_getter,
    default_setter,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import client_span, errors
from headrace.cli.demo.otlp_receiver import Span, is_complete, otlp_receiver
from headrace.cli.launch.mesh import MeshSpec
from headrace.cli.launch.mesh import mesh as processes
from headrace.client import chat, connect
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh

GENERATE = "headrace.v1.GenerationService/Generate"


def by_name(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


async def test_every_stage_of_a_request_is_a_span_of_one_trace(
    mesh: Mesh, spans: InMemorySpanExporter
) -> None:
    with trace.get_tracer("test").start_as_current_span("caller"):
        await collect(mesh.client, prompt("hello"))
    await eventually(lambda: by_name(spans.get_finished_spans(), "worker.decode"))
    await eventually(lambda: len(by_name(spans.get_finished_spans(), GENERATE)) == 4)

    (caller,) = by_name(spans.get_finished_spans(), "caller")
    ours = [span for span in spans.get_finished_spans() if span.context.trace_id == caller.context.trace_id]
    names = sorted(span.name for span in ours)
    assert names == sorted(
        [
            "caller",
            *[GENERATE] * 4,  # client, router, router's client, batcher
            "router.score",
            "batcher.tokenize",
            "batcher.queue",
            "worker.prefill",
            "worker.decode",
        ]
    )
    ids = {span.context.span_id for span in ours}
    assert all(span.parent is None or span.parent.span_id in ids for span in ours)
    events = {event.name for span in ours for event in span.events}
    assert {"first_token", "finish"} <= events


async def test_polls_of_the_tiers_leave_no_traces(mesh: Mesh, spans: InMemorySpanExporter) -> None:
    """A router polls every batcher each second. These traces would hide those of requests."""
    await mesh.client.list_tiers()
    await collect(mesh.client, prompt("hello"))
    await eventually(lambda: len(by_name(spans.get_finished_spans(), GENERATE)) == 4)

    assert not [span.name for span in spans.get_finished_spans() if "ListTiers" in span.name]


async def test_a_batch_and_its_members_link_to_each_other(spans: InMemorySpanExporter) -> None:
    async with running_mesh("only", engine=lambda: EchoEngine(max_running=2, step_seconds=0.01)) as mesh:
        coalescer = mesh.tiers["only"].batcher.coalescer
        (worker,) = coalescer.pool
        room, worker.credit.sequences = worker.credit.sequences, 0
        answers = [asyncio.create_task(collect(mesh.client, prompt(f"text {n}"))) for n in range(6)]
        await eventually(lambda: len(coalescer.queue) == 6)
        worker.credit.sequences = room
        coalescer.changed()
        await asyncio.gather(*answers)
    finished = spans.get_finished_spans()
    contexts = {span.context.span_id: span for span in finished}
    batches = by_name(finished, "batcher.batch")

    members = 0
    for batch in batches:
        assert batch.parent is None, "a batch has links to its requests and no parent"
        assert batch.attributes is not None
        assert batch.attributes["headrace.batch.size"] == len(batch.links)
        for link in batch.links:
            members += 1
            member = contexts[link.context.span_id]
            assert batch.context.span_id in {back.context.span_id for back in member.links}
    assert members == 6
    assert any(len(batch.links) > 1 for batch in batches), "requests that are queued together share a batch"
    for span in by_name(finished, "worker.prefill"):
        assert [contexts[link.context.span_id].name for link in span.links] == ["batcher.batch"]


async def test_the_span_of_a_failed_or_cancelled_stream_has_its_status(spans: InMemorySpanExporter) -> None:
    async with running_mesh("only", engine=lambda: EchoEngine(step_seconds=0.01)) as mesh:
        with pytest.raises(errors.InvalidSampling):
            await collect(mesh.client, prompt("x", top_p=9))
        reading = asyncio.create_task(collect(mesh.client, prompt("x", max_tokens=1000, ignore_eos=True)))
        await eventually(lambda: mesh.tiers["only"].worker.streams.in_flight)
        reading.cancel()
        await asyncio.wait([reading])
        await eventually(lambda: not mesh.left_behind)
        await eventually(lambda: len(by_name(spans.get_finished_spans(), GENERATE)) == 6)

    codes = [
        (span.kind.name, (span.attributes or {}).get("rpc.status_code"))
        for span in by_name(spans.get_finished_spans(), GENERATE)
    ]
    assert sorted(codes, key=str) == [
        ("CLIENT", "CANCELLED"),  # the caller's
        ("CLIENT", "CANCELLED"),  # the router's, of the batcher
        ("CLIENT", "INVALID_ARGUMENT"),
        ("SERVER", "CANCELLED"),
        ("SERVER", "CANCELLED"),
        ("SERVER", "INVALID_ARGUMENT"),
    ]


async def test_the_core_metrics_are_recorded(count: Callable[..., float]) -> None:
    names = (
        "headrace.tokens.generated",
        "headrace.tokens.delivered",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "gen_ai.server.request.duration",
        "headrace.batch.size",
        "headrace.queue.wait",
        "headrace.routed",
        "rpc.server.call.duration",
    )
    before = {name: count(name) for name in names}
    # Steps take time here: tokens that arrive at once have no time per token.
    async with running_mesh(engine=lambda: EchoEngine(step_seconds=0.005)) as mesh:
        answer = await collect(mesh.client, prompt("x" * 3000, max_tokens=300))

    assert count("headrace.tokens.generated") - before["headrace.tokens.generated"] == answer.tokens == 300
    delivered = count("headrace.tokens.delivered") - before["headrace.tokens.delivered"]
    assert delivered == 2 * 300, "by the batcher to the router, and by the router"
    await eventually(lambda: count("rpc.server.call.duration") > before["rpc.server.call.duration"])
    for name in names:
        assert count(name) > before[name], name
    assert count("headrace.queue.depth", tier="small") == 0
    assert count("headrace.tokens_per_second") >= 0


async def test_a_real_receiver_gets_one_trace_across_all_processes(tmp_path: Path) -> None:
    async with otlp_receiver() as sink:
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", fake=True, environment=sink.environment)
        async with processes(spec) as running, connect(running.address) as client:
            answers = await asyncio.gather(*(collect(client, chat(f"hello {number}")) for number in range(4)))

            def complete(spans: Sequence[Span]) -> bool:
                return sum(span.name == "worker.decode" for span in spans) == len(answers) and all(
                    whole_without_client(spans, span.trace_id) for span in spans
                )

            await sink.wait_for(complete, timeout=PATIENCE)
        spans = list(sink.spans)

    for answer in answers:
        (entry,) = [
            span
            for span in spans
            if span.service == "headrace-router"
            and span.attributes.get("headrace.request.id") == answer.accepted.request_id
        ]
        ours = [span for span in spans if span.trace_id == entry.trace_id]
        assert {span.service for span in ours} == {"headrace-router", "headrace-batcher", "headrace-worker"}
    known = {span.span_id for span in spans}
    batches = [span for span in spans if span.name == "batcher.batch"]
    assert sum(len(batch.links) for batch in batches) == len(answers)
    assert all(link in known for span in spans for link in span.links), "every link resolves"


def whole_without_client(spans: Sequence[Span], trace_id: str) -> bool:
    """Return whether every span of the trace has its parent. The test's own client exports nothing."""
    roots = [span for span in spans if span.trace_id == trace_id and span.name == GENERATE]
    if not roots:
        return is_complete(spans, trace_id)
    ids = {span.span_id for span in spans}
    orphans = [span for span in spans if span.trace_id == trace_id and span.parent_id not in ids]
    return len(orphans) == 1 and orphans[0].service == "headrace-router"


async def test_an_unreachable_collector_does_not_affect_serving(tmp_path: Path) -> None:
    spec = MeshSpec(
        cache=tmp_path,
        log_dir=tmp_path / "logs",
        fake=True,
        environment={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "100"},
    )
    async with processes(spec) as running, connect(running.address) as client:
        for number in range(3):
            assert (await collect(client, chat(f"hello {number}"))).text == f"hello {number}"


def sent_by_caller(*, sampled: bool) -> Context:
    """Return the context of a caller whose span is not recorded here."""
    context = trace.SpanContext(0x1234, 0x56, is_remote=False, trace_flags=trace.TraceFlags(int(sampled)))
    return trace.set_span_in_context(trace.NonRecordingSpan(context))


@contextmanager
def as_caller(context: Context) -> Generator[None, None, None]:
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)


@asynccontextmanager
async def two_hops(**router_settings: object) -> AsyncGenerator[Mesh, None]:
    async with running_mesh("only", engine=EchoEngine, router_settings=router_settings) as mesh:
        yield mesh


async def test_a_request_that_its_caller_did_not_sample_leaves_no_span(
    spans: InMemorySpanExporter,
) -> None:
    async with two_hops() as mesh:
        with as_caller(sent_by_caller(sampled=False)):
            await collect(mesh.client, prompt("hello"))
        await eventually(lambda: not mesh.left_behind)

    assert [span.name for span in spans.get_finished_spans()] == []


async def test_a_batch_is_recorded_with_its_sampled_members(spans: InMemorySpanExporter) -> None:
    async with two_hops() as mesh:
        coalescer = mesh.tiers["only"].batcher.coalescer
        (worker,) = coalescer.pool
        room, worker.credit.sequences = worker.credit.sequences, 0
        with as_caller(sent_by_caller(sampled=False)):
            silent = asyncio.create_task(collect(mesh.client, prompt("silent")))
        with as_caller(sent_by_caller(sampled=True)):
            shown = asyncio.create_task(collect(mesh.client, prompt("shown")))
        await eventually(lambda: len(coalescer.queue) == 2)
        worker.credit.sequences = room
        coalescer.changed()
        await asyncio.gather(silent, shown)

    (batch,) = by_name(spans.get_finished_spans(), "batcher.batch")
    assert sorted(link.context.trace_flags.sampled for link in batch.links) == [False, True]
    assert len(by_name(spans.get_finished_spans(), "worker.decode")) == 1


@pytest.mark.parametrize("sampled", [True, False])
async def test_an_untrusted_caller_neither_hides_requests_nor_forces_traces(
    spans: InMemorySpanExporter, sampled: bool
) -> None:
    async with two_hops(trace_context="link") as mesh:
        with as_caller(sent_by_caller(sampled=sampled)):
            await collect(mesh.client, prompt("hello"))
        await eventually(lambda: by_name(spans.get_finished_spans(), "worker.decode"))
        await eventually(lambda: len([s for s in spans.get_finished_spans() if s.kind.name == "SERVER"]) == 2)

    ours = [span for span in spans.get_finished_spans() if span.context.trace_id != 0x1234]
    (entry,) = [span for span in ours if span.kind.name == "SERVER" and span.parent is None]
    assert [link.context.trace_id for link in entry.links] == [0x1234]
    batch_is_apart = [span for span in ours if span.name != "batcher.batch"]
    assert {span.context.trace_id for span in batch_is_apart} == {entry.context.trace_id}
    assert {"router.score", "batcher.tokenize", "worker.decode"} <= {span.name for span in ours}


async def test_the_context_of_a_caller_can_be_ignored(spans: InMemorySpanExporter) -> None:
    async with two_hops(trace_context="ignore") as mesh:
        with as_caller(sent_by_caller(sampled=True)):
            await collect(mesh.client, prompt("hello"))
        await eventually(lambda: len([s for s in spans.get_finished_spans() if s.kind.name == "SERVER"]) == 2)

    (entry,) = [s for s in spans.get_finished_spans() if s.kind.name == "SERVER" and s.parent is None]
    assert not entry.links
    assert entry.context.trace_id != 0x1234


@pytest.mark.parametrize("sampler", ["parentbased_traceidratio", "traceidratio"])
async def test_a_sampled_request_is_recorded_at_all_hops_and_another_at_none(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the requests. A batch is recorded if one of its requests is, and links to all of them."""
    requests = 40
    monkeypatch.setattr(client_span, "_tracer", trace.NoOpTracer())  # a caller that traces nothing
    async with otlp_receiver() as sink:
        variables = {
            **sink.environment,
            "OTEL_TRACES_SAMPLER": sampler,
            "OTEL_TRACES_SAMPLER_ARG": "0.5",
        }
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", fake=True, environment=variables)
        async with processes(spec) as running, connect(running.address) as client:
            await asyncio.gather(*(collect(client, chat(f"hello {number}")) for number in range(requests)))
    # All processes have ended, and so exported what they had.
    batches = [span for span in sink.spans if span.name == "batcher.batch"]
    of_request: dict[str, list[Span]] = {}
    for span in sink.spans:
        if span.name != "batcher.batch":
            of_request.setdefault(span.trace_id, []).append(span)

    assert 5 <= len(of_request) <= 35
    whole = sorted(
        [GENERATE] * 3  # router, router's client, batcher
        + ["router.score", "batcher.tokenize", "batcher.queue", "worker.prefill", "worker.decode"]
    )
    for spans in of_request.values():
        assert sorted(span.name for span in spans) == whole
    recorded = {span.span_id for spans in of_request.values() for span in spans}
    for batch in batches:
        assert recorded & set(batch.links), "a batch without a recorded request"
    members = {link for batch in batches for link in batch.links}
    entries = {span.span_id for span in sink.spans if span.service == "headrace-batcher"}
    assert len(members & entries) == len(of_request), "each recorded request has its batch"
    assert all(link in recorded | {batch.span_id for batch in batches} for link in links_of(of_request))


def links_of(of_request: Mapping[str, Sequence[Span]]) -> list[str]:
    return [link for spans in of_request.values() for span in spans for link in span.links]


async def test_an_answer_that_the_client_resumes_is_one_trace(spans: InMemorySpanExporter) -> None:
    """Also without a span of the caller. Otherwise the rest of a sampled answer might not be."""
    async with running_mesh("only", engine=lambda: EchoEngine(step_seconds=0.01)) as mesh:
        reading = asyncio.create_task(collect(mesh.client, prompt("x" * 50, max_tokens=50)))
        await eventually(lambda: mesh.tiers["only"].worker.streams.in_flight)
        mesh.client.fail_calls(errors.Unavailable("the connection broke"))
        assert (await reading).tokens == 50
        await eventually(lambda: not mesh.left_behind)

    attempts = [
        span
        for span in by_name(spans.get_finished_spans(), GENERATE)
        if span.kind.name == "CLIENT" and (span.parent is None or not span.parent.is_remote)
    ]
    entries = [s for s in by_name(spans.get_finished_spans(), GENERATE) if s.kind.name == "SERVER"]
    assert len(entries) == 4, "two attempts at two hops"
    assert len({span.context.trace_id for span in [*attempts, *entries]}) == 1


class Noting(TextMapPropagator):
    """A propagator with capitals in its key, as some have. It records what arrives."""

    def __init__(self) -> None:
        self.arrived: list[str] = []

    def inject(
        self, carrier: Any, context: Context | None = None, setter: Setter[Any] = default_setter
    ) -> None:
        setter.set(carrier, "X-Noted", str(baggage.get_baggage("noted", context)))

    def extract(
        self, carrier: Any, context: Context | None = None, getter: Getter[Any] = default_getter
    ) -> Context:
        (value,) = getter.get(carrier, "X-Noted") or [""]
        self.arrived.append(value)
        return baggage.set_baggage("noted", value, context)

    @property
    def fields(self) -> set[str]:
        return {"X-Noted"}


async def test_baggage_of_a_caller_reaches_every_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baggage, and keys with capitals, which gRPC does not accept."""
    noting = Noting()
    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", noting)
    async with two_hops() as mesh:
        noting.arrived.clear()
        with as_caller(baggage.set_baggage("noted", "from afar")):
            await collect(mesh.client, prompt("hello"))

    assert noting.arrived.count("from afar") == 2, "router and batcher"


@pytest.mark.parametrize("name", ["b3", "b3multi"])
async def test_the_trace_is_one_by_other_propagators_too(
    name: str, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hop to the worker carries the trace context in fields, whatever the headers are."""
    (point,) = entry_points(group="opentelemetry_propagator", name=name)
    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", point.load()())
    async with two_hops() as mesh:
        await collect(mesh.client, prompt("hello"))
        await eventually(lambda: by_name(spans.get_finished_spans(), "worker.decode"))
        await eventually(lambda: len(by_name(spans.get_finished_spans(), GENERATE)) == 4)

    ours = [span for span in spans.get_finished_spans() if span.name != "batcher.batch"]
    assert len({span.context.trace_id for span in ours}) == 1


@pytest.mark.parametrize(("mode", "recorded"), [("trust", True), ("link", False), ("ignore", False)])
async def test_processes_that_sample_nothing_record_what_a_trusted_caller_samples(
    mode: str, recorded: bool, tmp_path: Path
) -> None:
    """With a parent-based sampler. The batch is recorded with its member, although it is a root span."""
    async with otlp_receiver() as sink:
        variables = {
            **sink.environment,
            "OTEL_TRACES_SAMPLER": "parentbased_always_off",
            "HEADRACE_TRACE_CONTEXT": mode,
        }
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", fake=True, environment=variables)
        async with processes(spec) as running, connect(running.address) as client:
            for sampled in (False, True):
                with as_caller(sent_by_caller(sampled=sampled)):
                    await collect(client, chat("hello"))

    names = {span.name for span in sink.spans}
    assert names >= {GENERATE, "router.score", "batcher.batch", "worker.decode"} if recorded else not names
    assert len([span for span in sink.spans if span.name == "worker.decode"]) == int(recorded)
