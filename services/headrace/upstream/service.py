"""Serve the gRPC contract for one tier. `answering` answers requests; this module only translates."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from headrace import errors
from headrace.multiplex.serving import Incoming, Multiplexer, Write
from headrace.runtime.security.identity import current
from headrace.runtime.serving.calls import Calls
from headrace.upstream.answering import Answering
from headrace.upstream.limits.slots import Slots
from headrace.upstream.settings import Settings
from headrace.upstream.urls import Urls
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2, multiplex_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1 import tokenizer_service_pb2 as tokens
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer
from headrace.v1.tokenizer_service_pb2_grpc import TokenizerServiceServicer

SERVICES = (
    *generation_service_pb2.DESCRIPTOR.services_by_name.values(),
    *routing.DESCRIPTOR.services_by_name.values(),
    *tokens.DESCRIPTOR.services_by_name.values(),
)


class GenerationServicer(GenerationServiceServicer, RoutingServiceServicer):
    """Serves one tier to callers.

    calls   the calls of the server, which requests on shared streams count among
    """

    def __init__(
        self, answering: Answering, slots: Slots, urls: Urls, calls: Calls, settings: Settings
    ) -> None:
        self._answering = answering
        self._multiplexer = Multiplexer(answering.answer, calls)
        self._slots = slots
        self._urls = urls
        self._settings = settings

    async def Generate(  # type: ignore[override] # the stub knows generators only; a coroutine may write, too
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, pb.GenerateResponse]
    ) -> None:
        """Stream the answer to one prompt.

        A coroutine that writes, not a generator, so that it can end while a caller that does not read blocks
        a write.
        """
        write: Write = context.write
        await self._answering.answer(Incoming(request, context.time_remaining(), current()), write)

    async def Multiplex(  # type: ignore[override] # as above
        self,
        request_iterator: AsyncIterator[multiplex_pb2.MultiplexRequest],
        context: grpc.aio.ServicerContext[object, multiplex_pb2.MultiplexResponse],
    ) -> None:
        """Serve many requests on one stream."""
        await self._multiplexer.serve(context)

    async def ListTiers(
        self, request: routing.ListTiersRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.ListTiersResponse:
        """Return the one tier that this process serves. The URLs that are usable are its workers."""
        now, slots, settings = time.monotonic(), self._slots, self._settings
        usable = self._urls.usable(now)
        tier = routing.Tier(
            name=settings.tier,
            model=settings.model,
            healthy=bool(usable),
            unhealthy_reason="" if usable else self._urls.problem(now),
            limits=routing.TierLimits(
                context_length=settings.context_length or self._urls.context_length,
                max_tokens=settings.max_tokens,
                queue_limit=settings.queue_limit,
                max_running=settings.max_concurrent,
            ),
            load=routing.TierLoad(
                queued=slots.queued,
                running=slots.taken,
                workers=len(usable),
                tokens_per_second=self._answering.rate.per_second(now),
            ),
        )
        tier.load.oldest_wait.FromNanoseconds(int(slots.oldest_wait(now) * 1e9))
        return routing.ListTiersResponse(tiers=[tier])

    async def Explain(
        self, request: routing.ExplainRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.ExplainResponse:
        """Reject the call: an upstream makes no routing decision."""
        raise errors.Unimplemented(
            "an upstream has one tier and computes no score: call Explain on the router"
        )

    async def Feedback(
        self, request: routing.FeedbackRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.FeedbackResponse:
        """Reject the call: an upstream makes no routing decision."""
        raise errors.Unimplemented("an upstream does not route requests: send feedback to the router")


class TokenizerServicer(TokenizerServiceServicer):
    """Rejects all calls: the tokenizer of the model is at the service outside."""

    def __init__(self, tier: str) -> None:
        self._tier = tier

    async def Tokenize(self, request: tokens.TokenizeRequest, context: Any) -> tokens.TokenizeResponse:
        """Reject the call."""
        self._reject()

    async def Detokenize(self, request: tokens.DetokenizeRequest, context: Any) -> tokens.DetokenizeResponse:
        """Reject the call."""
        self._reject()

    async def CountTokens(
        self, request: tokens.CountTokensRequest, context: Any
    ) -> tokens.CountTokensResponse:
        """Reject the call."""
        self._reject()

    async def GetTokenizer(
        self, request: tokens.GetTokenizerRequest, context: Any
    ) -> tokens.GetTokenizerResponse:
        """Reject the call."""
        self._reject()

    def _reject(self) -> NoReturn:
        raise errors.Unimplemented(
            f"tier {self._tier!r} is served by a service outside of the mesh, whose tokenizer is not "
            "available here"
        )
