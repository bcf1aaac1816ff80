"""The calls of a client: a request is retried or resumed until its answer is complete."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Generator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, Self, TypeVar

import grpc
from opentelemetry.context import Context

from headrace import attributes, errors, statuses
from headrace.bearer import (
    Authorization,
    Headers,
    authorized,
    no_authorization,
)
from headrace.channel import MAX_MESSAGE_BYTES
from headrace.client.span import Attempts, ClientSpan, server_attributes
from headrace.client.tokenizers import TokenizerCalls
from headrace.client.whole import WholeAnswers
from headrace.deadline import Deadline
from headrace.endpoints.endpoint import Endpoint
from headrace.endpoints.endpoints import Endpoints, Spread
from headrace.flushing import Flusher
from headrace.multiplex.call import Call, Take
from headrace.multiplex.calling import NOT_HEADRACE, STALL_SECONDS, Caller
from headrace.progress import Answer
from headrace.propagation import check_headers, inject
from headrace.retries import Retries
from headrace.v1 import admin_service_pb2, routing_service_pb2
from headrace.v1 import generation_pb2 as pb

T = TypeVar("T")

LONGEST_SECONDS = 1e8  # three years: gRPC treats deadlines of centuries, or infinity, as expired

_GENERATE = "headrace.v1.GenerationService/Generate"
_EXPLAIN = "headrace.v1.RoutingService/Explain"
_FEEDBACK = "headrace.v1.RoutingService/Feedback"
LIST_TIERS = "/headrace.v1.RoutingService/ListTiers"

MAX_RESUMED = 4096  # answers that were resumed and may still be rated

_EMPTY: Mapping[str, Any] = {}


class Client(TokenizerCalls, WholeAnswers):
    """Calls one target; use `connect` to create it.

    channel   to the target
    spread    how the servers behind the target are found, over which calls are spread; None: all calls use
              *channel*. See `endpoints`
    retries   most retries of a request that failed with UNAVAILABLE before any event
    patience  seconds for which an answer that has begun waits, within its deadline, for a server to resume it
    advice    added to the error message of calls that reach no server
    target    what the channel connects to, for spans
    multiplex, stall_seconds, caller_id, authorization   see `headrace.multiplex.calling.Caller`
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        spread: Spread | None = None,
        retries: int = 2,
        patience: float = 30.0,
        advice: str = "",
        target: str = "",
        multiplex: bool | None = None,
        stall_seconds: float = STALL_SECONDS,
        caller_id: str = "",
        authorization: Authorization = no_authorization,
    ) -> None:
        self._advice = advice
        self._server = server_attributes(target)
        self._authorization = authorization
        calling = functools.partial(
            Caller,
            multiplex=multiplex,
            stall_seconds=stall_seconds,
            caller_id=caller_id or _caller_id(),
            authorization=authorization,
        )
        self._endpoints = Endpoints(channel, calling, spread)
        self._resumed_as: OrderedDict[str, str] = OrderedDict()  # ids of answers
        self._retries = Retries(self._endpoints.reconnected, most=retries, patience=patience)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all calls and close all channels."""
        await self._endpoints.close()

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        resume: bool = True,
        labels: Mapping[str, str | int] | None = None,
        flusher: Flusher | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream the answer to *request*: `accepted`, deltas, `finish`.

        timeout    seconds for the whole answer; None: the router sets its default deadline
        metadata   additional headers; keys in lower case, values in printable ASCII
        resume     whether to resume the answer when its stream is lost. If the model's determinism is EXACT,
                   the rest is the same as without the loss: the client draws the seed if the request has
                   none. An answer of text alone (`accepted.text_only`) raises UpstreamLost instead
        labels     additional attributes of the spans
        flusher    when tokens that were gathered on the shared stream are handed over; None: each at once

        Raises a HeadraceError. Iterate under `contextlib.aclosing`, which cancels the call on exit.
        """
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise errors.MessageTooLarge(
                f"the request has {size} bytes, the limit is {MAX_MESSAGE_BYTES}", size=size
            )
        check_headers(metadata or {})
        deadline = Deadline.after(timeout, time.monotonic())
        answer = Answer(request) if resume else None
        attempts = Attempts()
        failures = 0  # consecutive ones that brought nothing
        since = 0.0  # time.monotonic() of the first of them
        while True:
            received, before = False, None if answer is None else answer.position
            first = None if answer is None else answer.accepted
            try:
                left = None
                if timeout is not None:
                    left = min(max(deadline.left(time.monotonic()), 0.0), LONGEST_SECONDS)
                outgoing = request if answer is None else answer.request()
                stream = self.attempt(
                    outgoing,
                    timeout=left,
                    metadata=metadata or _EMPTY,
                    labels=labels or _EMPTY,
                    attempts=attempts,
                    flusher=flusher,
                )
                async with aclosing(stream) as responses:
                    async for response in responses:
                        received = True
                        if first is not None and response.HasField("accepted"):
                            self._remember_resumed(first.answer_id, response.accepted.answer_id)
                        for event in (response,) if answer is None else answer.take(response):
                            yield event
                if answer is not None and not answer.finished:
                    raise errors.Unavailable("the stream ended without a finish")
                self._retries.succeed()
                return
            except errors.HeadraceError as error:
                if answer is not None and answer.finished:
                    return  # an error after the last event does not matter
                failures = failures + 1 if answer is None or answer.position == before else 1
                if failures == 1:
                    since = time.monotonic()
                if answer is not None and not answer.resumable:
                    if (broken_off := answer.broken_off(error)) is error:
                        raise
                    raise broken_off from error
                if answer is not None and answer.accepted is not None:
                    if not await self._retries.resume(
                        error, failures, accepted=received, since=since, deadline=deadline
                    ):
                        raise
                    answer.lose(error)
                elif received or not await self._retries.retry(error, failures, deadline=deadline):
                    raise

    async def explain(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float = 5.0,
        metadata: Mapping[str, str] = _EMPTY,
    ) -> routing_service_pb2.ExplainResponse:
        """Return which tier the router would choose for *request*, and why. Nothing is generated.

        metadata   as of `generate`
        """
        asked = routing_service_pb2.ExplainRequest(request=request)
        with self._span(_EXPLAIN, metadata) as headers:
            routing = (await self._endpoint(timeout, request.routing.session_id)).routing
            return await self._unary(routing.Explain(asked, timeout=timeout, metadata=headers))

    async def _call_tokenizer(
        self, method: str, request: Any, timeout: float, metadata: Mapping[str, str]
    ) -> Any:
        with self._span(f"headrace.v1.TokenizerService/{method}", metadata) as headers:
            tokenizer = (await self._endpoint(timeout)).tokenizer
            return await self._unary(getattr(tokenizer, method)(request, timeout=timeout, metadata=headers))

    async def list_tiers(
        self, *, timeout: float = 5.0, metadata: Mapping[str, str] = _EMPTY
    ) -> routing_service_pb2.ListTiersResponse:
        """Return the tiers with model, limits, health and load, smallest first.

        metadata   as of `generate`
        """
        headers = self._headers(None, metadata)
        routing = (await self._endpoint(timeout)).routing
        request = routing_service_pb2.ListTiersRequest()
        return await self._unary(routing.ListTiers(request, timeout=timeout, metadata=headers))

    async def inspect(self, *, timeout: float = 5.0) -> admin_service_pb2.InspectResponse:
        """Return the state of the server's process. It may need the scope admin."""
        endpoint = await self._endpoint(timeout)
        request = admin_service_pb2.InspectRequest(max_sequences=1)
        return await self._unary(
            endpoint.admin.Inspect(request, timeout=timeout, metadata=self._headers(None))
        )

    async def feedback(
        self,
        request_id: str = "",
        *,
        answer_id: str = "",
        ok: bool | None = None,
        quality: float | None = None,
        tier: str = "",
        tenant: str = "",
        timeout: float = 5.0,
    ) -> routing_service_pb2.FeedbackResponse:
        """Report how good an answer was: *ok* or not, or a *quality* from 0 to 1.

        request_id   of its request, as in `accepted`; rejected if several answers have it
        answer_id    its own, as in `accepted`; one of the two ids is needed
        tier         the tier that answered; empty: not checked
        tenant       the request's `routing.tenant`
        """
        answer_id = self._resumed_as.get(answer_id, answer_id)
        request = routing_service_pb2.FeedbackRequest(
            request_id=request_id, answer_id=answer_id, tier=tier, tenant=tenant
        )
        if ok is not None:
            request.ok = ok
        if quality is not None:
            request.quality = quality
        with self._span(_FEEDBACK) as headers:
            known = self._endpoints.of(answer_id) or self._endpoints.of(request_id)
            routing = (known or await self._endpoint(timeout)).routing
            return await self._unary(routing.Feedback(request, timeout=timeout, metadata=headers))

    def _remember_resumed(self, first: str, resumed: str) -> None:
        """Remember the id of an answer that another stream resumed: the caller has the first stream's."""
        if first and resumed:
            self._resumed_as[first] = resumed
            if len(self._resumed_as) > MAX_RESUMED:
                self._resumed_as.popitem(last=False)

    def _headers(self, context: Context | None, metadata: Mapping[str, str] = _EMPTY) -> Headers:
        check_headers(metadata)
        return authorized(inject(context, metadata), self._authorization())

    @contextmanager
    def _span(self, method: str, metadata: Mapping[str, str] = _EMPTY) -> Generator[Headers, None, None]:
        """Make the call in the block a client span; yield the metadata to send with it."""
        span = ClientSpan(method, self._server)
        try:
            yield self._headers(span.context, metadata)
            span.succeed()
        except Exception as error:
            span.fail(error)
            raise
        finally:
            span.end()

    async def _endpoint(self, timeout: float | None, session: str = "") -> Endpoint:
        """Return the endpoint for the next call, within *timeout*."""
        if (endpoint := self._endpoints.pick(session)) is not None:
            return endpoint
        try:
            async with asyncio.timeout(timeout):
                return await self._endpoints.wait(session)
        except TimeoutError:
            error = errors.DeadlineExceeded("the deadline passed before the server's address was known")
            self._advise(error)
            raise error from None

    async def _unary(self, call: Awaitable[T]) -> T:
        try:
            response = await call
        except grpc.aio.AioRpcError as raised:
            error = statuses.from_rpc_error(raised)
            self._advise(error)
            raise error from raised
        if response is None:  # gRPC's result for a message that it cannot parse
            raise errors.Unavailable(NOT_HEADRACE)
        return response

    def _advise(self, error: errors.HeadraceError) -> None:
        # These two classes come from gRPC itself; Headrace servers send their subclasses.
        if self._advice and type(error) in (errors.Unavailable, errors.DeadlineExceeded):
            error.add(self._advice)

    async def attempt(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None,
        metadata: Mapping[str, str] = _EMPTY,
        labels: Mapping[str, str | int] = _EMPTY,
        flusher: Flusher | None = None,
        attempts: Attempts | None = None,
        take: Take | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Make one call, in a client span with events for the first token and the end, and stream its events.

        flusher   when tokens that were gathered on the shared stream are handed over; None: each at once
        attempts  those made for the same request
        take      is offered each delta after the first while the reader waits: one that it takes is not among
                  the events. See `headrace.multiplex.call.Call.offer`

        The other arguments are those of `generate`, which makes further attempts if this one fails.
        """
        # The span is never the current one: a generator runs in the context of each caller that requests an
        # item.
        span = ClientSpan(_GENERATE, self._server, labels, attempts)
        headers = inject(span.context, metadata)
        began = time.monotonic()
        first = span.recording
        endpoint: Endpoint | None = None
        call: Call | None = None
        try:
            endpoint = await self._endpoint(timeout, request.routing.session_id)
            if timeout is not None:
                timeout = max(timeout - (time.monotonic() - began), 0.0)
            call = endpoint.start(request, timeout=timeout, metadata=headers, flusher=flusher)
            while (response := await call.next()) is not None:
                if response.HasField("delta"):
                    if first:
                        first = False
                        span.add_event(attributes.EVENT_FIRST_TOKEN)
                    if take is not None:
                        call.offer(take)
                elif response.HasField("accepted"):
                    self._endpoints.remember(response.accepted.request_id, endpoint)
                    if response.accepted.answer_id:
                        self._endpoints.remember(response.accepted.answer_id, endpoint)
                yield response
            endpoint.succeed()
            span.succeed()
        except Exception as error:
            if isinstance(error, errors.HeadraceError):
                self._advise(error)
                if endpoint is not None:
                    endpoint.fail(error)
            span.fail(error)
            raise
        finally:
            if endpoint is not None and call is not None:
                self._endpoints.end(endpoint, call)
            span.end()

    def fail_calls(self, error: Exception) -> None:
        """End all calls of Generate in flight with *error*."""
        self._endpoints.fail_all(error)


def _caller_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"[:128]
