"""Record HTTP requests: a span and metrics for each, by the HTTP conventions.

Written on OpenTelemetry's API, as `runtime.serving.calls` is: the contributed instrumentation wraps each
event of a stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from opentelemetry import context as otel_context
from opentelemetry import trace
from starlette.types import Scope

from headrace import attributes
from headrace.metrics import catalogue
from headrace.propagation import extract, to_w3c
from headrace.runtime.serving.calls import TraceContext, parent_of

_tracer = trace.get_tracer("headrace.gateway")

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
_SERVER_ERROR = 500


class Recording:
    """The span and the metrics of one request. Use it as a context manager; the span is then current.

    traceparent   of the span, for the response; empty if there is none
    """

    def __init__(
        self, scope: Scope, headers: Iterable[tuple[str, str]], route: str, policy: TraceContext
    ) -> None:
        self._began = time.monotonic()
        method = scope["method"]
        self._method = method if method in _METHODS else "_OTHER"
        self._route, self._scheme = route, scope["scheme"]
        scheme = self._scheme
        parent, links = parent_of(extract(headers), policy)
        self._span = _tracer.start_span(
            f"{self._method} {route}",
            parent,
            trace.SpanKind.SERVER,
            {
                attributes.HTTP_METHOD: self._method,
                attributes.HTTP_ROUTE: route,
                attributes.URL_PATH: route,
                attributes.URL_SCHEME: scheme,
            },
            links,
        )
        self._context = trace.set_span_in_context(self._span, parent)
        self._active = catalogue.HTTP_ACTIVE_REQUESTS.of(http_method=self._method, scheme=scheme)
        # Where nothing is traced, the span is that of the caller.
        ours = self._span is not trace.get_current_span(parent)
        self.traceparent = to_w3c(self._span)[0] if ours else ""

    def __enter__(self) -> Recording:
        self._token = otel_context.attach(self._context)
        self._active.add(1)
        return self

    def __exit__(self, *_: object) -> None:
        otel_context.detach(self._token)
        self._active.add(-1)

    def end(self, status: int, error: str, message: str, first_token_at: float | None) -> None:
        """Record the end of the request.

        status           of the response, or `problems.CLIENT_LEFT`
        error            the reason of its error, in capitals as elsewhere; empty without one
        message          what went wrong, for spans of faults
        first_token_at   time.monotonic() of the first token; None if there was none
        """
        now = time.monotonic()
        catalogue.HTTP_REQUEST_DURATION.of(
            http_method=self._method,
            http_route=self._route,
            http_status=str(status),
            error=error,
            scheme=self._scheme,
        ).record(now - self._began)
        if first_token_at is not None:
            catalogue.HTTP_TIME_TO_FIRST_TOKEN.of(http_route=self._route).record(first_token_at - self._began)
        if self._span.is_recording():
            self._span.set_attribute(attributes.HTTP_STATUS_CODE, status)
            if error:
                self._span.set_attribute(attributes.ERROR_TYPE, error)
            if status >= _SERVER_ERROR or (error and status < 400):
                self._span.set_status(trace.StatusCode.ERROR, message or None)
        self._span.end()
