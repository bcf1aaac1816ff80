"""A span that serves several requests is sampled if one of them is."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from headrace.runtime.telemetry.span_sampler import LinkedRoots


def test_a_root_that_links_to_a_sampled_span_of_this_process_is_sampled() -> None:
    """If it were sampled at random, it would be missing from traces that link to it."""
    exporter = InMemorySpanExporter()
    tracers = TracerProvider(sampler=LinkedRoots(ALWAYS_OFF))
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = tracers.get_tracer("test")

    def link(*, sampled: bool, remote: bool = False) -> trace.Link:
        flags = trace.TraceFlags(int(sampled))
        return trace.Link(trace.SpanContext(1, 2, is_remote=remote, trace_flags=flags))

    tracer.start_span("nobody").end()
    tracer.start_span("unsampled", links=[link(sampled=False)]).end()
    tracer.start_span("stranger", links=[link(sampled=True, remote=True)]).end()
    tracer.start_span("child", unsampled_parent(), links=[link(sampled=True)]).end()
    tracer.start_span("batch", links=[link(sampled=False), link(sampled=True)]).end()

    assert [span.name for span in exporter.get_finished_spans()] == ["batch"]


def unsampled_parent() -> Context:
    parent = trace.SpanContext(3, 4, is_remote=True, trace_flags=trace.TraceFlags(0))
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))
