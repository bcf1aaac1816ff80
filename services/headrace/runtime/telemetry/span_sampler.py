"""Sample spans that serve several requests if one of those requests is sampled."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes


class LinkedRoots(Sampler):
    """Samples a root span that links to sampled spans of this process; *inner* decides on all others.

    A span that serves several requests is a root with links to them. If it were sampled at random, it would
    be missing from traces that link to it. Links to spans of other processes are ignored, because callers
    that are not trusted are linked to as well.
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide on one span; see opentelemetry.sdk.trace.sampling.Sampler."""
        if links and not trace.get_current_span(parent_context).get_span_context().is_valid:
            linked = (link.context for link in links)
            if any(one.trace_flags.sampled and not one.is_remote for one in linked):
                return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, trace_state)
        return self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        """Return a description; see opentelemetry.sdk.trace.sampling.Sampler."""
        return f"LinkedRoots{{{self._inner.get_description()}}}"
