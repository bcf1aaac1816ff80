"""Answer HTTP requests with handlers: who calls, the body, the end with the client, and errors."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack, suppress

from starlette.types import Receive, Scope, Send

from headrace import errors
from headrace.bearer import AUTHORIZATION
from headrace.gateway.http.exchange import CYCLE, Exchange, Handler, encoded
from headrace.gateway.http.limits import HttpLimits
from headrace.gateway.http.request_body import ClientLeft, RequestBody
from headrace.gateway.http.telemetry import Recording
from headrace.gateway.problems import CLIENT_LEFT, NO_PARAMS, Problem, problem_of
from headrace.metrics.requests import record_refusal
from headrace.runtime.security.guard import Guard, Peer
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.calls import TraceContext
from headrace.runtime.serving.inflight import InflightBudget

log = logging.getLogger(__name__)


class HttpService:
    """The requests of one HTTP server, and what they share.

    requests   those in flight
    budget     limits requests and bytes in flight
    guard      decides which are accepted
    """

    def __init__(
        self,
        limits: HttpLimits,
        guard: Guard,
        *,
        trace_context: TraceContext = "trust",
        forward_authorization: bool = False,
    ) -> None:
        """Create the service.

        trace_context           what is done with the trace context of callers
        forward_authorization   whether calls of the mesh get the caller's authorization
        """
        self.limits = limits
        self.guard = guard
        self.requests = ActiveRequests()
        self.budget = InflightBudget(limits.inflight)
        self.trace_context = trace_context
        self.forward_authorization = forward_authorization
        self.streams: set[Exchange] = set()

    def endpoint(self, handler: Handler, route: str, *methods: str) -> Endpoint:
        """Return the application that answers requests of the API: counted, limited and traced."""
        return Endpoint(self, handler, route, methods)

    def page(self, handler: Handler, route: str) -> Page:
        """Return the application that answers GET for what is not part of the API, such as health."""
        return Page(self, handler, route, ("GET",))

    async def ping(self) -> None:
        """Send comments in streams without events until cancelled, so that no proxy closes them."""
        ticks = 3  # between an event and a comment
        while True:
            await asyncio.sleep(self.limits.ping_seconds / ticks)
            for exchange in list(self.streams):
                exchange.tick(ticks)


class Page:
    """The ASGI application that answers with a handler. A class, because Starlette wraps functions.

    route     its path, for metrics and for what the guard permits
    methods   of HTTP that it answers; HEAD if GET is among them
    """

    def __init__(self, service: HttpService, handler: Handler, route: str, methods: tuple[str, ...]) -> None:
        self._service = service
        self._handler = handler
        self.route = route
        self.methods = (*methods, *(("HEAD",) if "GET" in methods else ()))
        self._allow = {"allow": ", ".join((*self.methods, "OPTIONS"))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange(scope, send)
        body = RequestBody(exchange.headers, receive, self._service.limits, scope[CYCLE])
        try:
            if scope["method"] in self.methods:
                await self._answer(scope, exchange, body)
            elif scope["method"] == "OPTIONS":
                await exchange.reply(b"", status=204, headers=self._allow)
            else:
                raise Problem(
                    405,
                    f"{scope['method']} is not supported: {self.route} answers {', '.join(self.methods)}",
                    code="method_not_allowed",
                    headers=self._allow,
                )
        except ClientLeft:
            pass
        except Exception as error:
            await report(_problem(error, self.route, exchange), exchange, body)

    async def _answer(self, scope: Scope, exchange: Exchange, body: RequestBody) -> None:
        exchange.identity = await self._service.guard.identify(self.route, _metadata(scope), _peer(scope))
        await self._handler(exchange)


class Endpoint(Page):
    """The ASGI application for requests of the API."""

    async def _answer(self, scope: Scope, exchange: Exchange, body: RequestBody) -> None:
        policy = self._service.trace_context
        with Recording(scope, exchange.headers.items(), self.route, policy) as recording:
            if recording.traceparent:
                exchange.extra["traceparent"] = recording.traceparent
            status, reason, message = CLIENT_LEFT, errors.RequestCancelled.reason, ""
            try:
                await self._serve(scope, exchange, body)
                status, reason = exchange.status, ""
            except Exception as error:
                if isinstance(error, ClientLeft):
                    raise
                inner = errors.unwrap(error)
                problem = _problem(inner, self.route, exchange)
                status, message = exchange.status or problem.status, problem.message
                reason = (
                    inner.reason if isinstance(inner, errors.HeadraceError) else (problem.code or "").upper()
                )
                await report(problem, exchange, body)
            finally:
                recording.end(status, reason, message, exchange.first_token_at)

    async def _serve(self, scope: Scope, exchange: Exchange, body: RequestBody) -> None:
        service, peer = self._service, _peer(scope)
        with ExitStack() as stack:
            stack.enter_context(service.requests.track())
            try:
                metadata = _metadata(scope)
                exchange.identity = await service.guard.identify(self.route, metadata, peer)
                reservation = stack.enter_context(service.budget.admit(peer.address))
            except errors.HeadraceError as error:
                record_refusal(error)
                raise
            exchange.body = await body.read(reservation)
            if service.forward_authorization:
                exchange.metadata.update(metadata)
            service.streams.add(exchange)
            stack.callback(service.streams.discard, exchange)
            await _until_left(self._handler, exchange)


async def _until_left(handler: Handler, exchange: Exchange) -> None:
    """Run the handler; cancel it when the client leaves. Raises ClientLeft then."""
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        task.cancel()

    exchange.when_left(leave)
    try:
        await handler(exchange)
    except (asyncio.CancelledError, errors.HeadraceError):  # a call of the mesh may end with either
        if not left:
            raise
        raise ClientLeft from None
    finally:
        exchange.when_left(None)
        if left:
            task.uncancel()


async def report(problem: Problem, exchange: Exchange, body: RequestBody) -> None:
    """Report a problem to the client, as the response or as the last event of a stream."""
    if exchange.streams:
        await exchange.end_events(encoded(problem.body()))
    elif not exchange.started:
        with suppress(ClientLeft):
            await body.skip()
        await exchange.refuse(problem, hold=None if body.complete else body.discard)


def _problem(error: BaseException, route: str, exchange: Exchange) -> Problem:
    """Return what the client is told of an error; log an unexpected one in full."""
    inner = errors.unwrap(error)
    if isinstance(inner, Problem):
        return inner
    if isinstance(inner, errors.HeadraceError):
        return problem_of(inner, exchange.params)
    log.error("unexpected error", exc_info=error, extra={"route": route})
    return problem_of(errors.InternalError("internal error; the gateway's log has the details"), NO_PARAMS)


def _metadata(scope: Scope) -> list[tuple[str, str]]:
    """Return the headers that prove who calls: all of them, so that a second one is refused."""
    name = AUTHORIZATION.encode()
    return [(AUTHORIZATION, value.decode("latin-1")) for sent, value in scope["headers"] if sent == name]


def _peer(scope: Scope) -> Peer:
    """Return the client as gRPC names it, which budget and logs know."""
    client = scope.get("client")
    if client is None:
        return Peer("unix:")
    host, port = client
    return Peer(f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}")
