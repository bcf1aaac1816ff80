"""Serve the gRPC contract for one tier. `answering` answers requests; this module only translates."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc

from headrace import errors
from headrace.attributes import TIER
from headrace.batcher.answering import Answering
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.intake.intake import Intake
from headrace.metrics.catalogue import BATCH_FILL, FAILOVERS
from headrace.multiplex.serving import Incoming, Multiplexer, Write
from headrace.runtime.security.identity import current
from headrace.runtime.serving.calls import Calls
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2, multiplex_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer

SERVICES = (
    *generation_service_pb2.DESCRIPTOR.services_by_name.values(),
    *routing.DESCRIPTOR.services_by_name.values(),
)


class GenerationServicer(GenerationServiceServicer, RoutingServiceServicer):
    """Serves one tier to callers.

    calls         the calls of the server, which requests on shared streams count among
    max_tokens    most tokens of an answer
    """

    def __init__(
        self,
        answering: Answering,
        coalescer: Coalescer,
        intake: Intake,
        calls: Calls,
        *,
        tier: str,
        max_tokens: int,
    ) -> None:
        self._answering = answering
        self._multiplexer = Multiplexer(self._answer, calls)
        self._coalescer = coalescer
        self._intake = intake
        self._tier = tier
        self._max_tokens = max_tokens

    async def Generate(  # type: ignore[override] # the stub knows generators only; a coroutine may write, too
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, pb.GenerateResponse]
    ) -> None:
        """Stream the answer to one prompt.

        A coroutine that writes, not a generator, so that it can end while a caller that does not read blocks
        a write.
        """
        await self._answer(Incoming(request, context.time_remaining(), current()), context.write)

    async def Multiplex(  # type: ignore[override] # as above
        self,
        request_iterator: AsyncIterator[multiplex_pb2.MultiplexRequest],
        context: grpc.aio.ServicerContext[object, multiplex_pb2.MultiplexResponse],
    ) -> None:
        """Serve many requests on one stream."""
        await self._multiplexer.serve(context)

    async def _answer(self, incoming: Incoming, write: Write) -> None:
        await self._answering.answer(incoming.request, incoming.time_remaining, write, framed=incoming.framed)

    async def ListTiers(
        self, request: routing.ListTiersRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.ListTiersResponse:
        """Return the one tier that this batcher serves."""
        now = time.monotonic()
        pool, queue = self._coalescer.pool, self._coalescer.queue
        workers = pool.ready()
        oldest = max(queue.oldest_wait(now), self._intake.oldest_wait(now))
        tier = routing.Tier(
            name=self._tier,
            healthy=bool(workers),
            unhealthy_reason="" if workers else pool.problem,
            limits=routing.TierLimits(max_tokens=self._max_tokens, queue_limit=queue.limit),
            load=routing.TierLoad(
                queued=self._intake.waiting + len(queue),
                running=sum(link.outstanding for link in pool),
                workers=len(workers),
                tokens_per_second=sum(link.rate.per_second(now) for link in workers),
            ),
        )
        tier.load.oldest_wait.FromNanoseconds(int(oldest * 1e9))
        fill = BATCH_FILL.of(tier=self._tier)
        tier.figures.batches, tier.figures.batch_fill = sum(fill.counts), fill.total
        failovers = (series.value for labels, series in FAILOVERS if labels.get(TIER) == self._tier)
        tier.figures.failovers = int(sum(failovers))
        models = [link.model for link in workers if link.model is not None]
        if models:
            tier.model = models[0].name
            tier.limits.context_length = min(model.context_length for model in models)
            tier.limits.max_running = sum(model.max_running for model in models)
        return routing.ListTiersResponse(tiers=[tier])

    async def Explain(
        self, request: routing.ExplainRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.ExplainResponse:
        """Reject the call: a batcher makes no routing decision."""
        raise errors.Unimplemented("a batcher has one tier and computes no score: call Explain on the router")

    async def Feedback(
        self, request: routing.FeedbackRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.FeedbackResponse:
        """Reject the call: a batcher makes no routing decision."""
        raise errors.Unimplemented("a batcher does not route requests: send feedback to the router")
