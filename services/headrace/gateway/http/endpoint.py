"""Answer HTTP requests with a handler: the body, the caller, the end with the client, and errors."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import Receive, Scope, Send

from headrace import errors
from headrace.gateway.http.exchange import Exchange, Handler, encoded
from headrace.gateway.problems import Problem, problem_of


class Endpoint:
    """The ASGI application that answers with a handler. A class, because Starlette wraps functions.

    methods   of HTTP that it answers
    """

    def __init__(self, handler: Handler, *methods: str) -> None:
        self._handler = handler
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        exchange = Exchange(scope, send, body=body)
        handling = asyncio.ensure_future(_handled(self._handler, exchange))
        leaving = asyncio.ensure_future(receive())  # http.disconnect
        await asyncio.wait((handling, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in (handling, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _handled(handler: Handler, exchange: Exchange) -> None:
    try:
        await handler(exchange)
    except (Problem, errors.HeadraceError) as error:
        problem = error if isinstance(error, Problem) else problem_of(error, exchange.params)
        if not exchange.started:
            await exchange.refuse(problem)
        elif exchange.streams:
            await exchange.send_event(encoded(problem.body()))
            await exchange.end_events()
