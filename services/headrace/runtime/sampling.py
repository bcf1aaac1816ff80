"""Sample spans that were made for several requests as those requests are."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes


class LinkedRoots(Sampler):
    """Samples a root span that links to sampled spans of this process; leaves all others to *inner*.

    A span that was made for several requests is a root that links to them: sampled by chance, it would be
    missing from traces that link to it. Links to other processes count for nothing: a caller that is not
    trusted is linked to as well.
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
        """See opentelemetry.sdk.trace.sampling.Sampler."""
        root = not trace.get_current_span(parent_context).get_span_context().is_valid
        linked = (link.context for link in links or ())
        if root and any(one.trace_flags.sampled and not one.is_remote for one in linked):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, trace_state)
        return self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        """See opentelemetry.sdk.trace.sampling.Sampler."""
        return f"LinkedRoots{{{self._inner.get_description()}}}"
