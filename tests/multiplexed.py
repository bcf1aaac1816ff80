"""Let a fake server offer Multiplex: each request on the stream is answered by its own `Generate`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from headrace import statuses
from headrace.multiplex.serving import Incoming, Multiplexer, Write
from headrace.runtime.serving.calls import Calls
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer


class MultiplexedServicer(GenerationServiceServicer):
    """A servicer whose `Generate` is an asynchronous generator.

    multiplexes   whether it offers Multiplex; an older server does not
    """

    multiplexes: bool = True

    async def Multiplex(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]
        if not self.multiplexes:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        await Multiplexer(self._answer, Calls()).serve(context)

    async def _answer(self, incoming: Incoming, write: Write) -> None:
        responses: Any = self.Generate(incoming.request, _Context(incoming))  # type: ignore[arg-type]
        async with aclosing(responses):  # a request that is cancelled ends now, not when memory is collected
            async for response in responses:
                await write(response)


@dataclass(frozen=True)
class _Context:
    """What fakes use of a call's context."""

    incoming: Incoming

    def time_remaining(self) -> float | None:
        return self.incoming.time_remaining

    def invocation_metadata(self) -> Any:
        return self.incoming.metadata

    async def abort(self, code: grpc.StatusCode, details: str, **_: object) -> NoReturn:
        raise statuses.from_rpc_error(
            grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
        )
