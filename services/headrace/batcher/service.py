"""Speak the contract for one tier: requests to jobs, arrivals to events.

What comes in is checked, tokenised and bounded by the intake; who waits, with whom and for which worker is
the coalescer's; token ids become text again in `answer`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from headrace import attributes, errors
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.intake.intake import Intake
from headrace.batcher.job import Job
from headrace.batcher.text.answer import Answer, record_unanswered
from headrace.batcher.text.tokens import Tokenizer
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer

SERVICES = (
    *generation_service_pb2.DESCRIPTOR.services_by_name.values(),
    *routing.DESCRIPTOR.services_by_name.values(),
)


class GenerationServicer(GenerationServiceServicer, RoutingServiceServicer):
    """One tier, as its callers see it.

    max_tokens    most tokens of an answer
    """

    def __init__(
        self, coalescer: Coalescer, intake: Intake, tokenizer: Tokenizer, *, tier: str, max_tokens: int
    ) -> None:
        self._coalescer = coalescer
        self._intake = intake
        self._tokenizer = tokenizer
        self._tier = tier
        self._labels = {attributes.TIER: tier}
        self._max_tokens = max_tokens

    async def Generate(  # type: ignore[override] # the stub knows generators only; a coroutine may write, too
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, pb.GenerateResponse]
    ) -> None:
        """Stream the answer to one prompt.

        Writes itself, so that it can be ended while a caller that does not read holds up a write.
        """
        job = await self._job(request, context.time_remaining())
        try:
            await self._answer(job, request, context)
        finally:
            if job.leave_intake is not None:
                job.leave_intake()

    async def _job(self, request: pb.GenerateRequest, remaining: float | None) -> Job:
        arrived = time.monotonic()
        outcome = "cancelled"  # unless it ends some other way
        try:
            job = await self._intake.job(request, arrived, remaining)
            outcome = ""
        except errors.HeadraceError as error:
            # A request that cannot be answered by anybody is no outcome of this tier's.
            outcome = "" if isinstance(error, errors.InvalidRequest) else error.reason.lower()
            raise
        finally:
            if outcome:
                record_unanswered(self._labels, outcome, time.monotonic() - arrived)
        return job

    async def _answer(
        self,
        job: Job,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[object, pb.GenerateResponse],
    ) -> None:
        answer = Answer(job, request, self._tokenizer, self._labels)
        outcome = "cancelled"  # unless it ends some other way
        try:
            async with asyncio.timeout(None) as job.patience:
                async with aclosing(self._responses(job, answer)) as responses:
                    async for response in responses:
                        await context.write(response)
            outcome = answer.outcome
        except TimeoutError:
            outcome = errors.SlowReader.reason.lower()
            raise errors.SlowReader(
                f"{job.inbox.unread} tokens have waited too long to be read, and no more are kept: read "
                "faster, or carry on with `resume` from where you are",
                unread=job.inbox.unread,
            ) from None
        except errors.HeadraceError as error:
            outcome = error.reason.lower()
            raise
        finally:
            # A busy server may be told of the deadline by gRPC, as a cancel, before it has noticed itself.
            if outcome == "cancelled" and job.late(time.monotonic()):
                outcome = job.deadline_error().reason.lower()
            answer.record(outcome)

    async def _responses(self, job: Job, answer: Answer) -> AsyncGenerator[pb.GenerateResponse, None]:
        if job.resume_ids:
            await asyncio.get_running_loop().run_in_executor(None, answer.replay)
        if answer.complete_already:
            yield self._accepted(job)
            for response in answer.rest():
                yield response
            return
        async with aclosing(self._coalescer.arrivals(job)) as arrivals:
            await anext(arrivals)
            yield self._accepted(job)
            async for arrival in arrivals:
                for response in answer.take(arrival):
                    yield response
                if answer.done:
                    break  # at a stop text the worker is still at it: leaving cancels

    async def ListTiers(
        self, request: routing.ListTiersRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.ListTiersResponse:
        """The one tier that this batcher serves."""
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
        models = [link.model for link in workers if link.model is not None]
        if models:
            tier.model = models[0].name
            tier.limits.context_length = min(model.context_length for model in models)
            tier.limits.max_running = sum(model.max_running for model in models)
        return routing.ListTiersResponse(tiers=[tier])

    async def Explain(
        self, request: routing.ExplainRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.ExplainResponse:
        """Not here: one tier leaves nothing to explain."""
        raise errors.Unimplemented("a batcher has one tier and no score: ask the router to explain")

    async def Feedback(
        self, request: routing.FeedbackRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.FeedbackResponse:
        """Not here: the router knows where its requests went."""
        raise errors.Unimplemented("a batcher does not decide where requests go: tell the router")

    def _accepted(self, job: Job) -> pb.GenerateResponse:
        model = next((link.model.name for link in self._coalescer.pool.ready() if link.model), "")
        return pb.GenerateResponse(
            accepted=pb.Accepted(
                request_id=job.request_id,
                model=model,
                tier=self._tier,
                prompt_tokens=len(job.prompt_ids),
                seed=job.sampling.seed,
            )
        )
