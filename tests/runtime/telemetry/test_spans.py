"""Our spans are recorded, sampled, limited and encoded as the SDK's."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider, sampling
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
)

from headrace.runtime.telemetry.otlp_spans import Encoder
from headrace.runtime.telemetry.span_sampler import LinkedRoots
from headrace.runtime.telemetry.spans import ReadableExporter, Tracers

RESOURCE = Resource.create({"service.name": "headrace-test"})
Act = Callable[[trace.Tracer], None]


class Kept(SpanProcessor):
    """Keeps the spans that ended."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def on_end(self, span: Any) -> None:
        self.spans.append(span)


def ours(sampler: sampling.Sampler = sampling.DEFAULT_ON) -> tuple[trace.Tracer, list[Any]]:
    kept = Kept()
    return Tracers(LinkedRoots(sampler), [kept]).get_tracer("scope", "1.0"), kept.spans


def theirs(sampler: sampling.Sampler, limits: SpanLimits) -> tuple[trace.Tracer, list[Any]]:
    kept = Kept()
    provider = TracerProvider(LinkedRoots(sampler), RESOURCE, shutdown_on_exit=False, span_limits=limits)
    provider.add_span_processor(kept)
    return provider.get_tracer("scope", "1.0"), kept.spans


def encoded(spans: list[Any], limits: SpanLimits) -> ExportTraceServiceRequest:
    encoder = Encoder(RESOURCE, limits)
    request = encoder.request(spans)
    return ExportTraceServiceRequest.FromString(request.SerializeToString())


def exported(act: Act, limits: SpanLimits | None = None) -> list[ExportTraceServiceRequest]:
    """Return what is exported of our spans and of the SDK's, with the same ids."""
    limits = limits or SpanLimits()
    tracer, spans = ours()
    act(tracer)
    sdk_tracer, sdk_spans = theirs(sampling.DEFAULT_ON, limits)
    act(sdk_tracer)
    requests = [encoded(spans, limits), encode_spans(sdk_spans)]
    for request in requests:
        for number, span in enumerate(request.resource_spans[0].scope_spans[0].spans):
            assert len(span.trace_id) == 16
            span.span_id = bytes([number] * 8)
            span.status.SetInParent()  # the SDK encodes one that is unset, too
            span.attributes.sort(key=lambda pair: pair.key)  # it moves one that is set again to the end
            if not span.parent_span_id:
                span.trace_id = bytes(16)
    return requests


PARENT = SpanContext(0xABC, 0xDEF, True, TraceFlags(1), TraceState([("vendor", "x")]))


def under(parent: SpanContext) -> Any:
    return trace.set_span_in_context(NonRecordingSpan(parent))


def test_a_span_is_exported_as_the_sdk_exports_it() -> None:
    def act(tracer: trace.Tracer) -> None:
        span = tracer.start_span(
            "pkg.Service/Method",
            under(PARENT),
            SpanKind.SERVER,
            {"text": "x", "long": "y" * 200, "number": 3, "share": 0.5, "yes": True, "one": 1},
            [Link(SpanContext(0x11, 0x22, True), {"why": "batch"}), Link(SpanContext(0x33, 0x44, False))],
            start_time=1_000,
        )
        span.set_attribute("reasons", ["stop", "length"])
        span.set_attribute("numbers", (1, 2))
        span.set_attributes({"text": "z", "none": ""})
        span.add_event("first_token", timestamp=2_000)
        span.add_event("finish", {"outcome": "stop"}, timestamp=3_000)
        span.add_link(SpanContext(0x55, 0x66, False))
        span.set_status(StatusCode.ERROR, "lost")
        span.set_status(StatusCode.UNSET)
        span.update_name("renamed")
        span.end(4_000)
        span.set_attribute("late", "ignored")
        span.add_event("late")
        span.set_status(StatusCode.OK)
        span.end(5_000)

    mine, sdk = exported(act)

    assert mine == sdk
    assert len(mine.resource_spans[0].scope_spans[0].spans) == 1


VALUES = st.one_of(
    st.text(max_size=80),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.lists(st.text(max_size=5), max_size=3),
    st.lists(st.integers(-9, 9), max_size=3),
    st.lists(st.booleans(), max_size=3),
)
ATTRIBUTES = st.dictionaries(st.text("abc", min_size=1), VALUES, max_size=6)


@given(
    attributes=ATTRIBUTES,
    events=st.lists(ATTRIBUTES, max_size=4),
    links=st.lists(ATTRIBUTES, max_size=4),
    kind=st.sampled_from(SpanKind),
    most=st.integers(0, 4),
    longest=st.integers(0, 9) | st.none(),
)
def test_any_span_is_exported_as_the_sdk_exports_it(
    attributes: dict[str, Any],
    events: list[dict[str, Any]],
    links: list[dict[str, Any]],
    kind: SpanKind,
    most: int,
    longest: int | None,
) -> None:
    """Whatever it contains, and within the limits of OTEL_SPAN_*_LIMIT and OTEL_*_LENGTH_LIMIT."""

    def act(tracer: trace.Tracer) -> None:
        to = [Link(SpanContext(7, 8, False), each) for each in links]
        span = tracer.start_span("span", under(PARENT), kind, attributes, to, start_time=1)
        for number, each in enumerate(events):
            span.add_event("event", each, timestamp=number)
        span.end(9)

    limits = SpanLimits(
        max_span_attributes=most,
        max_events=most,
        max_links=most,
        max_event_attributes=most,
        max_link_attributes=most,
        max_attribute_length=longest,
    )
    mine, sdk = exported(act, limits)

    assert mine == sdk


def test_spans_of_several_tracers_are_grouped_by_them() -> None:
    kept = Kept()
    provider = Tracers(sampling.ALWAYS_ON, [kept])
    for scope in ("one", "two", "one"):
        provider.get_tracer(scope).start_span("span").end()

    (block,) = encoded(kept.spans, SpanLimits()).resource_spans
    assert [(each.scope.name, len(each.spans)) for each in block.scope_spans] == [("one", 2), ("two", 1)]
    assert {pair.key: pair.value.string_value for pair in block.resource.attributes}[
        "service.name"
    ] == "headrace-test"


def test_a_span_that_cannot_be_encoded_is_dropped_alone(caplog: pytest.LogCaptureFixture) -> None:
    tracer, spans = ours()
    for number in range(200):  # more than are encoded in a row
        span = tracer.start_span(f"span {number}")
        if number == 100:
            span.set_attribute(5, "a key that is no text")  # type: ignore[arg-type]
        span.end()

    (block,) = encoded(spans, SpanLimits()).resource_spans
    names = [span.name for span in block.scope_spans[0].spans]
    assert names == [f"span {number}" for number in range(200) if number != 100]
    assert [record.getMessage() for record in caplog.records] == ["span cannot be exported"]


SAMPLERS = {
    "always_on": sampling.ALWAYS_ON,
    "always_off": sampling.ALWAYS_OFF,
    "parentbased_always_on": sampling.DEFAULT_ON,
    "parentbased_always_off": sampling.DEFAULT_OFF,
    "traceidratio": sampling.TraceIdRatioBased(0.5),
    "parentbased_traceidratio": sampling.ParentBased(sampling.TraceIdRatioBased(0.5)),
    "custom": sampling.ParentBased(sampling.ALWAYS_ON, local_parent_sampled=sampling.ALWAYS_OFF),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_a_sampler_decides_as_with_the_sdk(name: str, remote: bool, flags: int) -> None:
    """Also where it is not asked, because its decision follows from the parent's."""
    sampler = SAMPLERS[name]
    mine, (sdk, _) = ours(sampler)[0], theirs(sampler, SpanLimits())
    for trace_id in (1, 2**63 + 1, 2**64 - 1, 2**127):
        parent = SpanContext(trace_id, 5, remote, TraceFlags(flags), TraceState([("vendor", "x")]))
        made, expected = mine.start_span("child", under(parent)), sdk.start_span("child", under(parent))

        assert made.is_recording() == expected.is_recording()
        context, other = made.get_span_context(), expected.get_span_context()
        assert context.trace_id == other.trace_id
        assert context.trace_flags.sampled == other.trace_flags.sampled
        assert context.trace_state == other.trace_state
        if made.is_recording():
            assert context.trace_flags == other.trace_flags
            assert not context.is_remote
            assert context.span_id != 5


def test_roots_get_ids_of_their_own_and_are_sampled_at_the_ratio() -> None:
    tracer, _ = ours(sampling.ParentBased(sampling.TraceIdRatioBased(0.25)))
    roots = [tracer.start_span("root") for _ in range(2000)]

    assert len({root.get_span_context().trace_id for root in roots}) == 2000
    assert all(root.get_span_context().is_valid for root in roots)
    assert 350 < sum(root.is_recording() for root in roots) < 650


def test_an_exception_is_recorded_by_its_class_alone() -> None:
    tracer, spans = ours()
    with pytest.raises(ValueError, match="prompt"), tracer.start_as_current_span("step"):
        raise ValueError("text of a prompt")

    (span,) = spans
    assert [event.name for event in span.events] == ["exception"]
    assert dict(span.events[0].attributes) == {"exception.type": "builtins.ValueError"}
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ValueError")


def test_a_block_makes_its_span_the_current_one() -> None:
    tracer, spans = ours()
    with tracer.start_as_current_span("outer") as outer:
        assert trace.get_current_span() is outer
        with tracer.start_as_current_span("inner", end_on_exit=False) as inner:
            assert trace.get_current_span() is inner
        assert trace.get_current_span() is outer
        assert inner.is_recording()
    assert [span.name for span in spans] == ["outer"]
    assert inner.parent == outer.get_span_context()  # type: ignore[attr-defined]


def test_other_exporters_get_spans_of_the_sdk() -> None:
    out = io.StringIO()
    exporter = ReadableExporter(ConsoleSpanExporter(out=out), RESOURCE)
    tracer = Tracers(sampling.ALWAYS_ON, [SimpleSpanProcessor(exporter)]).get_tracer("scope")
    with tracer.start_as_current_span("step", attributes={"rows": 3}) as span:
        span.add_event("finish", {"outcome": "stop"})
    tracer.start_span("after").end()

    assert '"rows": 3' in out.getvalue()
    assert '"outcome": "stop"' in out.getvalue()
    assert out.getvalue().count('"service.name": "headrace-test"') == 2
