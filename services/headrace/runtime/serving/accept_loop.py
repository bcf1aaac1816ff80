"""Accept calls in a loop that no caller can stop or delay; the loop of grpc.aio has two defects.

- It decodes the `:path` of a call to an unregistered method. If that is not UTF-8, the server stops for good:
  the port is closed in a process that is still running. Here such calls end as UNIMPLEMENTED without a look
  at their path: all methods are registered, so every other path is unknown.
- It accepts one call per iteration of the event loop. A thousand calls that one caller opens at once then
  delay the next call of everyone else by a thousand iterations. Here up to `ACCEPTORS` calls of each method
  are accepted per iteration, and calls beyond the limits are rejected immediately.

Both were observed in grpcio 1.85.1.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

log = logging.getLogger(__name__)

ACCEPTORS = 32

# The private names of grpcio that this module uses.
_NEEDED = (
    (cygrpc, "AioServer"),
    (cygrpc, "_ServicerContext"),
    (cygrpc, "_MethodResolver"),
    (cygrpc, "_handle_rpc"),
    (cygrpc, "_schedule_rpc_coro"),
    (cygrpc, "get_working_loop"),
    (getattr(cygrpc, "AioServer", None), "_request_call"),
    (getattr(cygrpc, "AioServer", None), "_request_registered_call"),
    (_server, "_augment_channel_arguments"),
)
GUARDED = all(hasattr(owner, name) for owner, name in _NEEDED)


def server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """Return a grpc.aio server with the accept loop of this module, or grpc.aio's own for an unknown grpcio.

    It serves only methods that were added by `add_registered_method_handlers`, as generated code does.
    """
    if not GUARDED:
        log.warning(
            "unknown grpcio version: a call whose path is not UTF-8 may stop the server",
            extra={"grpcio": grpc.__version__},
        )
        return grpc.aio.server(interceptors=interceptors, options=options)
    made: grpc.aio.Server = _Server(interceptors, options)  # type: ignore[assignment] # not its subclass
    return made


if GUARDED:

    class _Accepting(cygrpc.AioServer):  # type: ignore[misc]
        """Accepts and starts calls itself. The methods that the base class awaits never return a call."""

        def __init__(
            self, loop: asyncio.AbstractEventLoop, interceptors: tuple[Any, ...], options: Any
        ) -> None:
            super().__init__(loop, None, (), interceptors, options, None)
            self._running_loop = loop
            self._chain = interceptors
            self._handlers: dict[str, Any] = {}
            self._calls: set[asyncio.Task[None]] = set()

        def add_registered_method_handlers(self, method_handlers: dict[str, Any]) -> None:
            super().add_registered_method_handlers(method_handlers)
            self._handlers.update(method_handlers)

        async def _request_call(self) -> Any:
            async def accept() -> None:
                while True:
                    call = await super(_Accepting, self)._request_call()
                    self._start(call, "unknown method", _reject(call, self._running_loop))

            await _together(accept)

        async def _request_registered_call(self, method: bytes) -> Any:
            name = method.decode()
            resolver = cygrpc._MethodResolver([], self._handlers)

            async def accept() -> None:
                while True:
                    call = await super(_Accepting, self)._request_registered_call(method)
                    handling = cygrpc._handle_rpc(
                        name, resolver, self._chain, call, self._running_loop, False
                    )
                    self._start(call, name, handling)

            await _together(accept)

        def _start(self, call: Any, name: str, handling: Coroutine[Any, Any, None]) -> None:
            scheduled = cygrpc._schedule_rpc_coro(handling, call, self._running_loop, name)
            task = self._running_loop.create_task(scheduled)
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    class _Server(_server.Server):
        """grpc.aio's server around the accept loop above."""

        def __init__(
            self,
            interceptors: Sequence[grpc.aio.ServerInterceptor],
            options: Sequence[tuple[str, Any]],
        ) -> None:
            self._loop = cygrpc.get_working_loop()
            arguments = _server._augment_channel_arguments(tuple(options), None)
            self._server = _Accepting(self._loop, tuple(interceptors), arguments)


async def _together(accept: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `ACCEPTORS` copies of *accept* until one fails; all fail when the server stops."""
    tasks = [asyncio.create_task(accept()) for _ in range(ACCEPTORS)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _reject(call: Any, loop: asyncio.AbstractEventLoop) -> None:
    context = cygrpc._ServicerContext(call, None, None, loop)
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
