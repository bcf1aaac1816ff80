"""Call a Headrace server: the router, or a batcher; a caller cannot tell them apart.

    async with connect("127.0.0.1:50051") as client:
        async with aclosing(client.generate(chat("Why is the sky blue?"), timeout=30)) as stream:
            async for response in stream:
                print(response.delta.text, end="")

Leaving the stream cancels the call, and every failure is an exception of `headrace.errors`. A request that a
server could not take is tried again, and an answer whose stream broke off is carried on at the very next
token: the caller reads one stream, whatever becomes of the server.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Self, TypeVar

import grpc
from opentelemetry import metrics, trace

from headrace import attributes, errors, statuses
from headrace.channel import MAX_MESSAGE_BYTES, open_channel, proxy_variable, reconnected, target_problem
from headrace.progress import Progress, Told, route_change
from headrace.propagation import check_headers, inject
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2_grpc, routing_service_pb2, routing_service_pb2_grpc

T = TypeVar("T")

LONGEST_SECONDS = 1e8  # three years; beyond some centuries, and at infinity, gRPC takes a deadline for passed
BACKOFF_DOUBLINGS = 5  # of the delay before the next try, from 50 to 100 ms
CONNECT_SECONDS = 2.0  # the longest that a request whose connection broke waits for a new one

_GENERATE = "headrace.v1.GenerationService/Generate"
LIST_TIERS = "/headrace.v1.RoutingService/ListTiers"

_tracer = trace.get_tracer("headrace.client")
_call_duration = metrics.get_meter("headrace.client").create_histogram(
    attributes.METRIC_CLIENT_CALL_DURATION,
    unit="s",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_CALL,
)


def chat(
    text: str | Sequence[tuple[str, str]],
    *,
    system: str = "",
    continue_final_message: bool = False,
    **sampling: object,
) -> pb.GenerateRequest:
    """A request for the answer to *text*, or to a conversation of (role, content) pairs.

    continue_final_message   the answer continues the last message, which is the assistant's

    sampling   fields of `headrace.v1.Sampling`, such as temperature=0, max_tokens=64, stop=["\\n"]

    Raises InvalidText for text that cannot be sent: halves of surrogate pairs, as bytes in some other
    encoding become on their way through Python.
    """
    turns = [("user", text)] if isinstance(text, str) else list(text)
    if system:
        turns.insert(0, ("system", system))
    request = pb.GenerateRequest(sampling=pb.Sampling(**sampling))  # type: ignore[arg-type]
    for role, content in turns:
        try:
            request.chat.messages.add(role=role, content=content)
        except UnicodeEncodeError as error:
            raise errors.InvalidText(f"the text is not UTF-8, from character {error.start} on") from None
    if continue_final_message:
        request.chat.continue_final_message = True
    return request


class RetryBudget:
    """How many retries may follow upon how many calls (gRPC proposal A6, retry throttling).

    Each retry costs one token, each success gives back *refund*, and at half of *tokens* retrying
    stops: a server in trouble is not buried under second tries.
    """

    def __init__(self, tokens: float = 10, refund: float = 0.1) -> None:
        self._most = tokens
        self._tokens = tokens
        self._refund = refund

    def take(self) -> bool:
        """Pay for one retry; false if it cannot be afforded."""
        if self._tokens <= self._most / 2:
            return False
        self._tokens -= 1
        return True

    def succeed(self) -> None:
        """Book a call that went well."""
        self._tokens = min(self._most, self._tokens + self._refund)


class Client:
    """Calls one target over one channel; make it with `connect`.

    retries   most tries after the first, for calls that failed as UNAVAILABLE before any event; an answer
              under way is carried on without regard to it
    patience  seconds that an answer under way waits, within its deadline, for a server that takes it up
    advice    added to the message of calls that reach no server
    """

    def __init__(
        self, channel: grpc.aio.Channel, *, retries: int = 2, patience: float = 30.0, advice: str = ""
    ) -> None:
        self._channel = channel
        self._advice = advice
        self._generation = generation_service_pb2_grpc.GenerationServiceStub(channel)
        self._routing = routing_service_pb2_grpc.RoutingServiceStub(channel)
        self._retries = retries
        self._patience = patience
        self._budget = RetryBudget()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and close the channel."""
        await self._channel.close()

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        resume: bool = True,
        labels: Mapping[str, str | int] | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream the answer to *request*: `accepted`, deltas, `finish`.

        timeout    seconds for the whole answer; None leaves the deadline to the router
        metadata   further headers; keys in lower case, values in printable ASCII
        resume     whether to carry on when the stream breaks off. The rest is what would have come if the
                   model is EXACT, for the seed is drawn here if the request has none
        labels     further attributes of the calls' spans

        Raises a HeadraceError. Iterate under `contextlib.aclosing`: leaving then cancels the call.
        """
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise errors.MessageTooLarge(
                f"the request has {size} bytes, servers take {MAX_MESSAGE_BYTES}", size=size
            )
        check_headers(metadata or {})
        ends = None if timeout is None else time.monotonic() + timeout
        answer = _Answer(request) if resume else None
        failures = 0  # in a row, that brought nothing
        broke = 0.0  # time.monotonic() of the first of them
        while True:
            seen, had = False, None if answer is None else answer.mark
            try:
                left = None if ends is None else min(max(ends - time.monotonic(), 0.0), LONGEST_SECONDS)
                asked = request if answer is None else answer.request()
                async with aclosing(self._call(asked, left, metadata or {}, labels or {})) as responses:
                    async for response in responses:
                        seen = True
                        for told in (response,) if answer is None else answer.take(response):
                            yield told
                if answer is not None and not answer.finished:
                    raise errors.Unavailable("the stream ended without a finish")
                self._budget.succeed()
                return
            except errors.HeadraceError as error:
                if answer is not None and answer.finished:
                    return  # whatever became of the stream after its last event
                failures = failures + 1 if answer is None or answer.mark == had else 1
                if failures == 1:
                    broke = time.monotonic()
                begun = answer is not None and answer.accepted is not None
                if begun:
                    again = await self._carry_on(error, failures, taken=seen, broke=broke, ends=ends)
                else:
                    again = not seen and await self._retry(error, failures, ends=ends)
                if not again:
                    raise
                if answer is not None and begun:
                    answer.lose(error)

    async def _retry(self, error: errors.HeadraceError, failures: int, *, ends: float | None) -> bool:
        """Whether to ask again for an answer that has not begun; returns when it makes sense.

        The first try after a connection broke is free, for all calls that broke with it wait together for
        one new connection. The budget pays for others.
        """
        broken = _is_broken(error)
        free = broken and failures == 1
        if not (broken or isinstance(error, errors.Unavailable)) or failures > self._retries:
            return False
        if not free and not self._budget.take():
            return False
        return await self._wait(error, failures, pause=not free, seconds=_until(ends, CONNECT_SECONDS))

    async def _carry_on(
        self, error: errors.HeadraceError, failures: int, *, taken: bool, broke: float, ends: float | None
    ) -> bool:
        """Whether to ask for the rest of an answer; returns when it makes sense.

        taken   whether the server had taken the request that failed
        broke   time.monotonic() of the first failure in this row

        The first try after a stream that brought something is free. So are tries that no server took: other
        answers wait for the same server, and `patience` ends it. A try that was taken and brought nothing
        may be what ends the servers: the budget pays for the next one.
        """
        if not _may_pass(error, resuming=failures > 1):
            return False
        if failures > 1 and taken and not self._budget.take():
            return False
        patience = self._patience - (time.monotonic() - broke)
        return await self._wait(error, failures, pause=failures > 1, seconds=_until(ends, patience))

    async def _wait(self, error: errors.HeadraceError, failures: int, *, pause: bool, seconds: float) -> bool:
        """Wait for the time and the connection to ask again; false if that takes longer than *seconds*."""
        # Whoever cancelled is still connected, and busy it seems.
        pause = pause or isinstance(error, errors.RequestCancelled) or error.retry_after is not None
        delay = _backoff(failures - 1, error) if pause else 0.0
        if delay >= seconds:
            return False
        try:
            async with asyncio.timeout(seconds):
                await asyncio.sleep(delay)
                if _is_broken(error):
                    await reconnected(self._channel)
        except TimeoutError:
            return False
        return True

    async def explain(
        self, request: pb.GenerateRequest, *, timeout: float = 5.0
    ) -> routing_service_pb2.ExplainResponse:
        """Where the router would send *request*, and why. Nothing is generated."""
        return await self._unary(
            self._routing.Explain(
                routing_service_pb2.ExplainRequest(request=request), timeout=timeout, metadata=inject()
            )
        )

    async def list_tiers(self, *, timeout: float = 5.0) -> routing_service_pb2.ListTiersResponse:
        """The tiers with model, limits, health and load, smallest first."""
        return await self._unary(
            self._routing.ListTiers(
                routing_service_pb2.ListTiersRequest(), timeout=timeout, metadata=inject()
            )
        )

    async def feedback(
        self,
        request_id: str,
        *,
        ok: bool | None = None,
        quality: float | None = None,
        tier: str = "",
        tenant: str = "",
        timeout: float = 5.0,
    ) -> routing_service_pb2.FeedbackResponse:
        """Report how good the answer to a request was: *ok* or not, or a *quality* from 0 to 1.

        tier     that answered; empty: whichever did
        tenant   of the request, as in its `routing.tenant`
        """
        request = routing_service_pb2.FeedbackRequest(request_id=request_id, tier=tier, tenant=tenant)
        if ok is not None:
            request.ok = ok
        if quality is not None:
            request.quality = quality
        return await self._unary(self._routing.Feedback(request, timeout=timeout, metadata=inject()))

    async def _unary(self, call: Awaitable[T]) -> T:
        try:
            return _parsed(await call)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: grpc.aio.AioRpcError) -> errors.HeadraceError:
        translated = statuses.from_rpc_error(error)
        # These two come from gRPC itself; servers of ours send their subclasses.
        if self._advice and type(translated) in (errors.Unavailable, errors.DeadlineExceeded):
            translated.add(self._advice)
        return translated

    async def _call(
        self,
        request: pb.GenerateRequest,
        timeout: float | None,
        metadata: Mapping[str, str],
        labels: Mapping[str, str | int],
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """One call, as a client span with the events that a caller sees."""
        # Not `start_as_current_span`: a generator's body runs in whoever's context asks for the next item.
        span = _tracer.start_span(
            _GENERATE,
            kind=trace.SpanKind.CLIENT,
            attributes={attributes.RPC_SYSTEM: "grpc", attributes.RPC_METHOD: _GENERATE, **labels},
        )
        headers = inject(trace.set_span_in_context(span), metadata)
        began = time.monotonic()
        code = grpc.StatusCode.CANCELLED  # unless it ends some other way
        call = self._generation.Generate(request, timeout=timeout, metadata=headers)
        delivered = False
        try:
            async for received in call:
                response = _parsed(received)
                event = response.WhichOneof("event")
                if event == "delta" and not delivered:
                    delivered = True
                    span.add_event(attributes.EVENT_FIRST_TOKEN)
                elif event == "finish":
                    span.add_event(attributes.EVENT_FINISH)
                yield response
            code = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            code = error.code()
            translated = self._translated(error)
            span.set_attribute(attributes.ERROR_TYPE, translated.reason)
            span.set_status(trace.StatusCode.ERROR, translated.message)
            raise translated from error
        finally:
            call.cancel()  # harmless once the stream has ended
            span.set_attribute(attributes.RPC_STATUS_CODE, code.name)
            span.end()
            _call_duration.record(
                time.monotonic() - began,
                {attributes.RPC_METHOD: _GENERATE, attributes.RPC_STATUS_CODE: code.name},
            )


class _Answer(Progress):
    """An answer as the caller reads it: one stream, over all those that it takes."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        named = pb.GenerateRequest()
        named.CopyFrom(request)
        # What is drawn by a server is lost with it.
        if not named.sampling.HasField("seed"):
            named.sampling.seed = secrets.randbits(64)
        named.request_id = named.request_id or str(uuid.uuid4())
        super().__init__(named)
        self._lost: errors.HeadraceError | None = None

    @property
    def mark(self) -> tuple[bool, int]:
        """How far it has come: it differs after a stream that brought something."""
        return self.accepted is not None, len(self.ids)

    def request(self) -> pb.GenerateRequest:
        """What to ask for."""
        request = super().request()
        if self.accepted is not None:
            # The token ids are those of the model that began.
            request.routing.tier = self.accepted.tier
            request.routing.model = self.accepted.model
        return request

    def take(self, response: pb.GenerateResponse) -> Told:
        """What the caller hears of this event. Raises as `Progress` does."""
        event = response.WhichOneof("event")
        if event == "delta":
            return self.add(response)
        if event == "finish":
            return self.finish(response)
        if event == "route_change":
            self.attempt = max(self.attempt, response.route_change.attempt)
        elif event == "accepted" and not self.accept(response.accepted):
            if not self._asked.stream.include_route_changes or self._lost is None:
                return ()
            return (route_change("", "", self._lost.reason, self.attempt),)
        return (response,)

    def lose(self, error: errors.HeadraceError) -> None:
        """The stream ended early, and the rest will be asked for."""
        self.broke()
        self._lost = error


@asynccontextmanager
async def connect(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    retries: int = 2,
    patience: float = 30.0,
) -> AsyncGenerator[Client, None]:
    """A client for *target*, a gRPC name such as "127.0.0.1:50051", "[::1]:50051" or "dns:///router:50051".

    credentials         for TLS; None speaks plain text
    retries, patience   see `Client`
    """
    channel = open_channel(target, credentials=credentials)
    advice = target_problem(target) if credentials is None else ""
    if not advice and (variable := proxy_variable(target)):
        advice = f"connections to {target} go through the proxy that {variable} names; no_proxy exempts hosts"
    async with Client(channel, retries=retries, patience=patience, advice=advice) as client:
        yield client


def _parsed(response: T | None) -> T:
    """The response; gRPC gives None for bytes that are none. Raises Unavailable."""
    if response is None:
        raise errors.Unavailable("the server's response cannot be parsed: it is no Headrace server")
    return response


def _may_pass(error: errors.HeadraceError, *, resuming: bool) -> bool:
    """Whether an answer may be carried on after *error*.

    It broke off if the server is gone or going, or says when to try again, or did not wait for a caller that
    read slowly. Not after WORKER_LOST: the batcher has tried, and a request that kills its workers must end
    somewhere. *resuming*: the server has not even taken the rest; then its being busy may pass, too.
    """
    if isinstance(error, errors.Unavailable) and not isinstance(error, errors.WorkerLost):
        return type(error) is errors.Unavailable or error.retry_after is not None
    if isinstance(error, errors.RequestCancelled | errors.SlowReader):
        return True
    return resuming and isinstance(error, errors.Overloaded)


def _is_broken(error: errors.HeadraceError) -> bool:
    """Whether the connection broke, or a server or something on the way cancelled the call.

    A caller that leaves raises CancelledError instead.
    """
    return isinstance(error, errors.RequestCancelled) or type(error) is errors.Unavailable


def _until(ends: float | None, most: float) -> float:
    """Seconds until the deadline *ends*, a time.monotonic(), and at most *most*."""
    return most if ends is None else min(most, ends - time.monotonic())


def _backoff(attempt: int, error: errors.HeadraceError) -> float:
    """Seconds until the next try: what the server asked for, else jittered doubling from 50 ms to 3 s."""
    if error.retry_after is not None:
        return error.retry_after
    return random.uniform(0.5, 1) * 0.1 * 2.0 ** min(attempt, BACKOFF_DOUBLINGS)
