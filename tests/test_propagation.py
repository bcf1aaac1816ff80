"""Trace contexts in message fields are read and written as OpenTelemetry's W3C propagator does."""

from __future__ import annotations

import string

from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace.propagation import from_w3c, to_w3c

W3C = TraceContextTextMapPropagator()
VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
IDS = st.integers(0, 2**128 - 1)


def extracted(traceparent: str, tracestate: str) -> SpanContext:
    context = W3C.extract({"traceparent": traceparent, "tracestate": tracestate})
    return trace.get_current_span(context).get_span_context()


# Valid ones, ones that are nearly valid, and anything.
PARENTS = st.one_of(
    st.from_regex(r"(00|01|ff)-([0-9a-f]{32}|0{32})-([0-9a-f]{16}|0{16})-[0-9a-f]{2}", fullmatch=True),
    st.integers(0, len(VALID) - 1).flatmap(
        lambda at: st.characters(max_codepoint=0x3FF).map(lambda one: VALID[:at] + one + VALID[at + 1 :])
    ),
    st.text(string.hexdigits + "- \t_+", max_size=60),
)


@given(parent=PARENTS, state=st.sampled_from(["", "vendor=x", "a=1,b=2", "not valid"]))
@example(parent=VALID + "\n", state="")
@example(parent=VALID + "-more", state="")
@example(parent=" " + VALID, state="")
@example(parent=VALID.upper(), state="")
@example(parent=VALID.replace("4bf92f35", "4bf9_f35"), state="")
@example(parent=VALID.replace("4bf92f35", "٤bf92f35"), state="")
def test_a_context_is_read_as_the_propagator_reads_it(parent: str, state: str) -> None:
    made, expected = from_w3c(parent, state), extracted(parent, state)

    assert made == expected
    assert list(made.trace_state.items()) == list(expected.trace_state.items())


@given(trace_id=IDS, span_id=st.integers(0, 2**64 - 1), flags=st.integers(0, 255), state=st.booleans())
def test_a_context_is_written_as_the_propagator_writes_it(
    trace_id: int, span_id: int, flags: int, state: bool
) -> None:
    states = TraceState([("vendor", "x")]) if state else None
    span = NonRecordingSpan(SpanContext(trace_id, span_id, False, TraceFlags(flags), states))
    carrier: dict[str, str] = {}
    if span.get_span_context().is_valid:
        W3C.inject(carrier, trace.set_span_in_context(span))

    assert to_w3c(span) == (carrier.get("traceparent", ""), carrier.get("tracestate", ""))
