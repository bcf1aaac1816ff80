"""Call a Headrace server: a router, or a batcher with the same API.

    async with connect("127.0.0.1:50051") as client:
        async with aclosing(client.generate(chat("Why is the sky blue?"), timeout=30)) as stream:
            async for response in stream:
                print(response.delta.text, end="")

Closing the stream cancels the call, and every failure is an exception of `headrace.errors`. A request that
the server could not accept is retried, and an answer whose stream was lost is resumed at the next token: the
caller reads one uninterrupted stream.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Generator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Self, TypeVar

import grpc

from headrace import attributes, errors, statuses
from headrace.channel import MAX_MESSAGE_BYTES, open_channel, proxy_variable, target_problem
from headrace.client_span import Attempts, ClientSpan, server_attributes
from headrace.deadline import Deadline
from headrace.flushing import Flusher
from headrace.multiplex.calling import NOT_HEADRACE, STALL_SECONDS, Caller
from headrace.progress import Progress, Responses, route_change
from headrace.propagation import check_headers, inject
from headrace.retries import Retries
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2, routing_service_pb2_grpc

T = TypeVar("T")

LONGEST_SECONDS = 1e8  # three years: gRPC treats deadlines of centuries, or infinity, as expired

_GENERATE = "headrace.v1.GenerationService/Generate"
_EXPLAIN = "headrace.v1.RoutingService/Explain"
_FEEDBACK = "headrace.v1.RoutingService/Feedback"
LIST_TIERS = "/headrace.v1.RoutingService/ListTiers"

_EMPTY: Mapping[str, Any] = {}


def chat(
    text: str | Sequence[tuple[str, str]],
    *,
    system: str = "",
    continue_final_message: bool = False,
    **sampling: object,
) -> pb.GenerateRequest:
    """Return a request for the answer to *text*, or to a conversation of (role, content) pairs.

    continue_final_message   whether the answer continues the last message, which must be the assistant's
    sampling                 fields of `headrace.v1.Sampling`, such as temperature=0, max_tokens=64,
                             stop=["\\n"]

    Raises InvalidText for text with lone surrogates, which result from decoding bytes of another encoding.
    """
    turns = [("user", text)] if isinstance(text, str) else list(text)
    if system:
        turns.insert(0, ("system", system))
    request = pb.GenerateRequest(sampling=pb.Sampling(**sampling))  # type: ignore[arg-type]
    for role, content in turns:
        try:
            request.chat.messages.add(role=role, content=content)
        except UnicodeEncodeError as error:
            raise errors.InvalidText(f"the text is not valid UTF-8 from character {error.start} on") from None
    if continue_final_message:
        request.chat.continue_final_message = True
    return request


class Client:
    """Calls one target over one channel; use `connect` to create it.

    retries   most retries of a request that failed with UNAVAILABLE before any event
    patience  seconds for which an answer that has begun waits, within its deadline, for a server to resume it
    advice    added to the error message of calls that reach no server
    target    what the channel connects to, for spans
    multiplex, stall_seconds, caller_id   see `headrace.multiplex.calling.Caller`
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        retries: int = 2,
        patience: float = 30.0,
        advice: str = "",
        target: str = "",
        multiplex: bool | None = None,
        stall_seconds: float = STALL_SECONDS,
        caller_id: str = "",
    ) -> None:
        self._channel = channel
        self._advice = advice
        self._server = server_attributes(target)
        self._caller = Caller(
            channel, multiplex=multiplex, stall_seconds=stall_seconds, caller_id=caller_id or _caller_id()
        )
        self._routing = routing_service_pb2_grpc.RoutingServiceStub(channel)
        self._retries = Retries(channel, most=retries, patience=patience)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all calls and close the channel."""
        await self._caller.close()
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

        timeout    seconds for the whole answer; None: the router sets its default deadline
        metadata   additional headers; keys in lower case, values in printable ASCII
        resume     whether to resume the answer when its stream is lost. If the model's determinism is EXACT,
                   the rest is the same as without the loss: the client draws the seed if the request has none
        labels     additional attributes of the spans

        Raises a HeadraceError. Iterate under `contextlib.aclosing`, which cancels the call on exit.
        """
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise errors.MessageTooLarge(
                f"the request has {size} bytes, the limit is {MAX_MESSAGE_BYTES}", size=size
            )
        check_headers(metadata or {})
        deadline = Deadline.after(timeout, time.monotonic())
        answer = _Answer(request) if resume else None
        attempts = Attempts()
        failures = 0  # consecutive ones that brought nothing
        since = 0.0  # time.monotonic() of the first of them
        while True:
            received, before = False, None if answer is None else answer.position
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
                )
                async with aclosing(stream) as responses:
                    async for response in responses:
                        received = True
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
                if answer is not None and answer.accepted is not None:
                    if not await self._retries.resume(
                        error, failures, accepted=received, since=since, deadline=deadline
                    ):
                        raise
                    answer.lose(error)
                elif received or not await self._retries.retry(error, failures, deadline=deadline):
                    raise

    async def explain(
        self, request: pb.GenerateRequest, *, timeout: float = 5.0
    ) -> routing_service_pb2.ExplainResponse:
        """Return which tier the router would choose for *request*, and why. Nothing is generated."""
        asked = routing_service_pb2.ExplainRequest(request=request)
        with self._span(_EXPLAIN) as headers:
            return await self._unary(self._routing.Explain(asked, timeout=timeout, metadata=headers))

    async def list_tiers(self, *, timeout: float = 5.0) -> routing_service_pb2.ListTiersResponse:
        """Return the tiers with model, limits, health and load, smallest first."""
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

        tier     the tier that answered; empty: not checked
        tenant   the request's `routing.tenant`
        """
        request = routing_service_pb2.FeedbackRequest(request_id=request_id, tier=tier, tenant=tenant)
        if ok is not None:
            request.ok = ok
        if quality is not None:
            request.quality = quality
        with self._span(_FEEDBACK) as headers:
            return await self._unary(self._routing.Feedback(request, timeout=timeout, metadata=headers))

    @contextmanager
    def _span(self, method: str) -> Generator[list[tuple[str, str]], None, None]:
        """Make the call in the block a client span; yield the metadata to send with it."""
        span = ClientSpan(method, self._server)
        try:
            yield inject(span.context)
            span.succeed()
        except Exception as error:
            span.fail(error)
            raise
        finally:
            span.end()

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
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Make one call, in a client span with events for the first token and the end, and stream its events.

        flusher   when tokens that were gathered on the shared stream are handed over; None: each at once
        attempts  those made for the same request

        The other arguments are those of `generate`, which makes further attempts if this one fails.
        """
        # The span is never the current one: a generator runs in the context of each caller that requests an
        # item.
        span = ClientSpan(_GENERATE, self._server, labels, attempts)
        call = self._caller.call(
            request, timeout=timeout, metadata=inject(span.context, metadata), flusher=flusher
        )
        first = span.recording
        try:
            while (response := await call.next()) is not None:
                if first and response.HasField("delta"):
                    first = False
                    span.add_event(attributes.EVENT_FIRST_TOKEN)
                yield response
            span.succeed()
        except Exception as error:
            if isinstance(error, errors.HeadraceError):
                self._advise(error)
            span.fail(error)
            raise
        finally:
            self._caller.ended(call)
            span.end()

    def fail_calls(self, error: Exception) -> None:
        """End all calls of Generate in flight with *error*."""
        self._caller.fail_all(error)


class _Answer(Progress):
    """An answer as the caller reads it: one stream, made of one or several streams from servers."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        complete = pb.GenerateRequest()
        complete.CopyFrom(request)
        # A seed or id that a server draws is lost with it.
        if not complete.sampling.HasField("seed"):
            complete.sampling.seed = secrets.randbits(64)
        complete.request_id = complete.request_id or str(uuid.uuid4())
        super().__init__(complete)
        self._lost: errors.HeadraceError | None = None

    @property
    def position(self) -> tuple[bool, int]:
        """How much of the answer is there: it changes with each stream that brings something."""
        return self.accepted is not None, len(self.ids)

    def request(self) -> pb.GenerateRequest:
        """Return the request for the answer, or for the rest of it."""
        request = super().request()
        if self.accepted is not None:
            # The token ids so far belong to this model.
            request.routing.tier = self.accepted.tier
            request.routing.model = self.accepted.model
        return request

    def take(self, response: pb.GenerateResponse) -> Responses:
        """Process an event and return what the caller receives. Raises the errors of `Progress`."""
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
        """Prepare for the next stream after *error* ended this one."""
        self.restart()
        self._lost = error


@asynccontextmanager
async def connect(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    retries: int = 2,
    patience: float = 30.0,
    multiplex: bool | None = None,
) -> AsyncGenerator[Client, None]:
    """Open a client for *target*, such as "127.0.0.1:50051", "[::1]:50051" or "dns:///router:50051".

    credentials         for TLS; None for plaintext
    retries, patience   see `Client`
    multiplex           whether requests share one stream, which costs a fraction of the CPU time of one call
                        each. None: they do once more than a few are in flight at a time, until the client was
                        idle for a minute. Behind a load balancer that
                        distributes calls, not connections, False keeps them distributed
    """
    channel = open_channel(target, credentials=credentials)
    advice = target_problem(target) if credentials is None else ""
    if not advice and (variable := proxy_variable(target)):
        advice = f"connections to {target} use the proxy that {variable} sets; no_proxy exempts hosts"
    async with Client(
        channel, retries=retries, patience=patience, advice=advice, target=target, multiplex=multiplex
    ) as client:
        yield client


def _caller_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"[:128]
