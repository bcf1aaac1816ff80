"""Send one HTTP request for an answer to one URL, and record how it went.

Failures become errors of the mesh. Their `retry_after` is None if the same request would fail there again.
Otherwise it is the seconds to wait first, as in `api.problems`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from opentelemetry import trace

from headrace import attributes, errors, propagation, statuses
from headrace.metrics import upstream as metrics
from headrace.runtime.breaker import BreakerState
from headrace.upstream.api.events import AnswerReader
from headrace.upstream.api.problems import UNUSABLE, problem_of
from headrace.upstream.call import Call
from headrace.upstream.http.events import AnswerStream
from headrace.upstream.http.session import MAX_ERROR_BYTES, Broken, Http, Response
from headrace.upstream.urls import UpstreamUrl
from headrace.v1 import generation_pb2 as pb

_tracer = trace.get_tracer("headrace.upstream")


@dataclass(frozen=True, kw_only=True)
class AttemptLimits:
    """The limits of one HTTP request.

    first_token_seconds   from the start to the first content
    stall_seconds         between events
    trace                 whether the trace context is sent
    """

    first_token_seconds: float
    stall_seconds: float
    trace: bool = False


@dataclass(slots=True)
class Begun:
    """An answer that has begun.

    deltas    the first ones, as far as they have arrived
    failure   how it broke off; None: it did not
    """

    url: UpstreamUrl
    stream: AnswerStream
    deltas: list[pb.Delta]
    failure: errors.UpstreamLost | None = None

    async def read(self, until: float) -> list[pb.Delta]:
        """See `AnswerStream.read`. A failure counts against the URL."""
        try:
            return await self.stream.read(until)
        except errors.UpstreamLost as lost:
            self.failure = lost
            raise

    def finish(self) -> pb.Finish:
        """See `AnswerReader.finish`. A failure counts against the URL."""
        try:
            return self.stream.reader.finish()
        except errors.UpstreamLost as lost:
            self.failure = lost
            raise


@asynccontextmanager
async def attempt(
    http: Http, url: UpstreamUrl, call: Call, limits: AttemptLimits, number: int
) -> AsyncGenerator[Begun, None]:
    """Send *call* to *url*, wait until the answer begins, and hold the connection while the block runs.

    number   of the attempt, from 0

    Raises NoWorkers, Overloaded and InvalidRequest.
    """
    record = _Record(url, call, number)
    record.start()
    begun: Begun | None = None
    try:
        async with AsyncExitStack() as stack:
            try:
                begun = await _begin(http, url, call, limits, record, stack)
            except errors.HeadraceError as error:
                record.fail(error)
                raise
            record.answering()
            yield begun
            if begun.failure is None and begun.stream.reader.finished:
                record.succeed()
                await begun.stream.close()
    finally:
        if begun is not None:
            record.first_byte(begun.stream.first_byte)
            if begun.failure is not None:
                record.fail(begun.failure)
        record.end()


async def _begin(
    http: Http, url: UpstreamUrl, call: Call, limits: AttemptLimits, record: _Record, stack: AsyncExitStack
) -> Begun:
    key = http.key.value
    headers = dict(propagation.inject(record.context)) if limits.trace else None
    try:
        async with asyncio.timeout(limits.first_token_seconds) as timer:
            response = await stack.enter_async_context(
                http.request("POST", url.url, call.path, call.body, headers)
            )
            record.status = response.status
            if response.status != 200:
                raise await _refusal(response, key)
            reader = AnswerReader(call.request, call.terms, key=key)
            stream = AnswerStream(response, reader, stall_seconds=limits.stall_seconds)
            return Begun(url, stream, await stream.begin())
    except TimeoutError:
        if not timer.expired():
            raise
        raise errors.NoWorkers(
            f"the upstream at {url.url} sent no token within {limits.first_token_seconds:g} s",
            retry_after=0.0,
        ) from None
    except Broken as broken:
        record.connected = broken.connected
        raise errors.NoWorkers(
            f"the upstream at {url.url} cannot be used: {broken}", retry_after=0.0
        ) from None


async def _refusal(response: Response, key: str) -> errors.HeadraceError:
    """Return the error for a response with another status than 200."""
    status = response.status
    if 300 <= status < 400:
        return errors.NoWorkers(
            f"the upstream redirects (HTTP {status}), which is not followed: correct --url",
            upstream_status=status,
        )
    try:
        body = await response.body(MAX_ERROR_BYTES)
    except Broken:
        body = b""  # the status says enough
    return problem_of(status, response.headers, body, key=key, now=time.time())


class _Record:
    """What is recorded of one attempt: its span, its metrics, and what it says about the URL.

    status      of HTTP; 0: none arrived
    connected   whether the URL was reached
    """

    def __init__(self, url: UpstreamUrl, call: Call, number: int) -> None:
        self.status = 0
        self.connected = True
        self._url = url
        self._call = call
        self._began = time.monotonic()
        self._error = errors.RequestCancelled.reason  # unless another end is recorded
        self._message = ""
        self._probing = False
        model = call.terms.model
        self._span = _tracer.start_span(
            f"{call.operation} {model}",
            kind=trace.SpanKind.CLIENT,
            attributes={
                attributes.GEN_AI_OPERATION: call.operation,
                attributes.GEN_AI_PROVIDER: call.terms.api,
                attributes.GEN_AI_REQUEST_MODEL: model,
                attributes.HTTP_METHOD: "POST",
                attributes.SERVER_ADDRESS: url.host,
                attributes.SERVER_PORT: url.port,
                attributes.TIER: call.terms.tier,
                attributes.ATTEMPT: number,
            },
        )
        self.context = trace.set_span_in_context(self._span)

    def start(self) -> None:
        """Count the request as in flight."""
        self._url.in_flight += 1
        self._probing = self._url.breaker.state(self._began) is not BreakerState.CLOSED
        self._url.breaker.sent()

    def answering(self) -> None:
        """Record that the answer has begun."""
        self._span.add_event(attributes.EVENT_FIRST_TOKEN)
        self._url.answering(time.monotonic())
        self._probing = False

    def first_byte(self, moment: float | None) -> None:
        """Record when the body began."""
        if moment is not None:
            metrics.FIRST_BYTE.of(tier=self._call.terms.tier, server=self._url.host).record(
                moment - self._began
            )

    def succeed(self) -> None:
        """Record a complete answer."""
        self._error = ""
        self._url.succeeded()

    def fail(self, error: errors.HeadraceError) -> None:
        """Record a failure, and count it against the URL if it is the URL's fault."""
        now = time.monotonic()
        self._error = error.reason
        # Messages about the caller's mistakes may quote the request.
        self._message = error.message if error.code in statuses.SERVER_ERRORS else ""
        if isinstance(error, errors.InvalidRequest) or UNUSABLE in error.fields:
            self._url.succeeded()  # it serves
        elif isinstance(error, errors.Overloaded):
            self._url.block(error.retry_after or 0.0, now)
            return  # a probe has no result
        else:
            # A connection that fails, or a wrong key, is never the fault of one request.
            may_be_its = error.retry_after is not None or isinstance(error, errors.UpstreamLost)
            cause = self._call.request.request_id if self.connected and may_be_its else None
            self._url.failed(error, now, cause)
            self._url.block(error.retry_after or 0.0, now)
        self._probing = False

    def end(self) -> None:
        """Record the end."""
        self._url.in_flight -= 1
        if self._probing:
            self._url.breaker.release_probe()
        status = str(self.status) if self.status else ""
        metrics.DURATION.of(
            http_method="POST", server=self._url.host, http_status=status, error=self._error
        ).record(time.monotonic() - self._began)
        if self.status:
            self._span.set_attribute(attributes.HTTP_STATUS_CODE, self.status)
        if self._error:
            self._span.set_attribute(attributes.ERROR_TYPE, self._error)
            if self._error != errors.RequestCancelled.reason:
                self._span.set_status(trace.StatusCode.ERROR, self._message or None)
        self._span.end()
