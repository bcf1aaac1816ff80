"""Accept calls in a way that no caller can end: grpc.aio's server stops for good at a path that is not UTF-8.

Its accept loop decodes the `:path` of a call to a method that nobody registered, and an error there shuts the
server down: no port, no call, in a process that is still running. Here such calls are answered
UNIMPLEMENTED without their path being read. The methods of all services are registered, so each other path
is unknown by definition. Seen in grpcio 1.85.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

log = logging.getLogger(__name__)

# What this module needs of grpcio beyond its public names.
_NEEDED = (
    (cygrpc, "AioServer"),
    (cygrpc, "_ServicerContext"),
    (cygrpc, "_schedule_rpc_coro"),
    (cygrpc, "get_working_loop"),
    (getattr(cygrpc, "AioServer", None), "_request_call"),
    (_server, "_augment_channel_arguments"),
)
GUARDED = all(hasattr(owner, name) for owner, name in _NEEDED)


def server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """A grpc.aio server whose accept loop survives whatever path a call has.

    Only methods that are registered (`add_registered_method_handlers`, as generated code does) are served.
    """
    if not GUARDED:
        log.warning(
            "this grpcio is not known: a call whose path is not UTF-8 may stop the server",
            extra={"grpcio": grpc.__version__},
        )
        return grpc.aio.server(interceptors=interceptors, options=options)
    made: grpc.aio.Server = _Server(interceptors, options)  # type: ignore[assignment] # its stub is another's
    return made


if GUARDED:

    class _Accepting(cygrpc.AioServer):  # type: ignore[misc]
        """Answers the calls of unknown methods itself; the base class never sees one."""

        async def _request_call(self) -> Any:
            loop = asyncio.get_running_loop()
            answering: set[asyncio.Task[None]] = set()
            while True:
                call = await super()._request_call()
                refusal = cygrpc._schedule_rpc_coro(_refuse(call, loop), call, loop, "unknown method")
                task = loop.create_task(refusal)
                answering.add(task)
                task.add_done_callback(answering.discard)

    class _Server(_server.Server):
        """grpc.aio's server around the accept loop above."""

        def __init__(
            self,
            interceptors: Sequence[grpc.aio.ServerInterceptor],
            options: Sequence[tuple[str, Any]],
        ) -> None:
            self._loop = cygrpc.get_working_loop()
            arguments = _server._augment_channel_arguments(tuple(options), None)
            self._server = _Accepting(self._loop, None, (), tuple(interceptors), arguments, None)


async def _refuse(call: Any, loop: asyncio.AbstractEventLoop) -> None:
    context = cygrpc._ServicerContext(call, None, None, loop)
    with contextlib.suppress(grpc.aio.AbortError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
