"""Translate between the gRPC contract and the batcher: requests to jobs, arrivals to response events.

The intake checks, tokenises and bounds requests. The coalescer queues, batches and runs them. `answer` turns
token ids back into text.
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
from headrace.batcher.text.answer import AnswerEvents, record_unanswered
from headrace.batcher.text.tokens import Tokenizer
from headrace.deadline import Deadline
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
    """Serves one tier to callers.

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

        It writes the responses itself, so that it can end while a caller that does not read blocks a write.
        """
        job = await self._job(request, context.time_remaining())
        try:
            await self._answer(job, request, context)
        finally:
            if job.release_place is not None:
                job.release_place()

    async def _job(self, request: pb.GenerateRequest, remaining: float | None) -> Job:
        arrived = time.monotonic()
        outcome = "cancelled"  # until it ends otherwise
        try:
            job = await self._intake.job(request, arrived, Deadline.after(remaining, arrived))
            outcome = ""
        except errors.HeadraceError as error:
            # A request that no tier can answer is not an outcome of this tier.
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
        answer = AnswerEvents(job, request, self._tokenizer, self._labels)
        outcome = "cancelled"  # until it ends otherwise
        try:
            async with asyncio.timeout(None) as job.reader_timeout:
                async with aclosing(self._responses(job, answer)) as responses:
                    async for response in responses:
                        await context.write(response)
            outcome = answer.outcome
        except TimeoutError:
            outcome = errors.SlowReader.reason.lower()
            raise errors.SlowReader(
                f"{job.inbox.unread} tokens have waited too long to be read, and no more are kept: read "
                "faster, or continue with `resume` after the tokens received",
                unread=job.inbox.unread,
            ) from None
        except errors.HeadraceError as error:
            outcome = error.reason.lower()
            raise
        finally:
            # On a busy server gRPC may cancel the call for its deadline before the batcher has noticed it.
            if outcome == "cancelled" and job.response_deadline.passed(time.monotonic()):
                outcome = job.deadline_error().reason.lower()
            answer.record(outcome)

    async def _responses(self, job: Job, answer: AnswerEvents) -> AsyncGenerator[pb.GenerateResponse, None]:
        if job.resume_ids:
            await asyncio.get_running_loop().run_in_executor(None, answer.replay)
        if answer.already_complete:
            yield self._accepted(job)
            for response in answer.final_events():
                yield response
            return
        async with aclosing(self._coalescer.arrivals(job)) as arrivals:
            await anext(arrivals)
            yield self._accepted(job)
            async for arrival in arrivals:
                for response in answer.events_for(arrival):
                    yield response
                if answer.done:
                    break  # after a stop text the worker is still generating: closing the arrivals cancels it

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
