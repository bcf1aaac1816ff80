"""Speak the contract for one tier: requests to jobs, arrivals to events.

Text becomes token ids on the way in and ids become text on the way out; who waits, with whom and for
which worker is the coalescer's.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from contextlib import aclosing

import grpc
from opentelemetry import trace

from headrace import attributes, errors
from headrace.batcher.answer import Answer
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.inbox import Flush, Inbox, flush_for
from headrace.batcher.job import Job
from headrace.batcher.prefixes import blocks
from headrace.batcher.tokens import Tokenizer
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer
from headrace.validation import check_request

SERVICES = (
    *generation_service_pb2.DESCRIPTOR.services_by_name.values(),
    *routing.DESCRIPTOR.services_by_name.values(),
)

_LONG_BYTES = 256 * 1024  # of a request whose tokenising takes a good part of a second

_tracer = trace.get_tracer("headrace.batcher")


class GenerationServicer(GenerationServiceServicer, RoutingServiceServicer):
    """One tier, as its callers see it.

    executor      where tokenising happens: never on the event loop
    long_executor where it happens for long prompts, which take seconds: nobody else waits for them
    max_tokens    most tokens of an answer
    unread_limit  most tokens kept for a caller that does not read them
    defaults      sampling fields that a request has unless it sets them
    """

    def __init__(
        self,
        coalescer: Coalescer,
        tokenizer: Tokenizer,
        *,
        tier: str,
        executor: Executor,
        long_executor: Executor,
        max_tokens: int,
        unread_limit: int,
        defaults: pb.Sampling | None = None,
    ) -> None:
        self._coalescer = coalescer
        self._tokenizer = tokenizer
        self._tier = tier
        self._executor = executor
        self._long_executor = long_executor
        self._max_tokens = max_tokens
        self._unread_limit = unread_limit
        self._defaults = defaults or pb.Sampling()

    async def Generate(  # type: ignore[override] # the stub knows generators only; a coroutine may write, too
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, pb.GenerateResponse]
    ) -> None:
        """Stream the answer to one prompt.

        Writes itself, so that it can be ended while a caller that does not read holds up a write.
        """
        arrived = time.monotonic()
        check_request(request)
        job = await self._job(request, arrived, context.time_remaining())
        answer = Answer(job, request, self._tokenizer, {attributes.TIER: self._tier})
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
            await asyncio.get_running_loop().run_in_executor(self._executor, answer.replay)
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
        tier = routing.Tier(
            name=self._tier,
            healthy=bool(workers),
            unhealthy_reason="" if workers else pool.problem,
            limits=routing.TierLimits(max_tokens=self._max_tokens, queue_limit=queue.limit),
            load=routing.TierLoad(
                queued=len(queue),
                running=sum(link.outstanding for link in pool),
                workers=len(workers),
                tokens_per_second=sum(link.rate.per_second(now) for link in workers),
            ),
        )
        tier.load.oldest_wait.FromNanoseconds(int(queue.oldest_wait(now) * 1e9))
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

    async def _job(self, request: pb.GenerateRequest, arrived: float, remaining: float | None) -> Job:
        """Check what needs the model, and bring the request into the batcher's own form."""
        pool = self._coalescer.pool
        workers = pool.ready()
        if not workers:
            raise errors.NoWorkers(
                f"no worker of tier {self._tier!r} is ready ({pool.problem}); try again shortly",
                retry_after=1.0,
            )
        models = [link.model for link in workers if link.model is not None]
        self._check_pins(request.routing, models[0].name)
        span = trace.get_current_span()
        with _tracer.start_as_current_span(attributes.SPAN_TOKENIZE):
            executor = self._executor if request.ByteSize() < _LONG_BYTES else self._long_executor
            prompt_ids = await asyncio.get_running_loop().run_in_executor(executor, self._encode, request)
        if not prompt_ids:
            raise errors.EmptyInput("the prompt has no tokens: give it text", field="input")
        context_length = min(model.context_length for model in models)
        room = context_length - len(prompt_ids)
        if room < 1:
            raise errors.ContextTooLong(
                f"the prompt has {len(prompt_ids)} tokens, tier {self._tier!r} takes {context_length} for "
                "prompt and answer: shorten it, or use a tier with a longer context",
                field="input",
                prompt_tokens=len(prompt_ids),
                context_length=context_length,
            )
        if (said := len(request.resume.token_ids)) > room:
            raise errors.ContextTooLong(
                f"the prompt has {len(prompt_ids)} tokens and resume.token_ids {said}, tier "
                f"{self._tier!r} takes {context_length} for both: resume with what this tier answered",
                field="resume.token_ids",
                prompt_tokens=len(prompt_ids),
                context_length=context_length,
            )
        vocabulary = min(model.vocabulary_size for model in models)
        given = {
            "sampling.logit_bias": request.sampling.logit_bias,
            "sampling.stop_token_ids": request.sampling.stop_token_ids,
            "resume.token_ids": request.resume.token_ids,
        }
        for field, tokens in given.items():
            for token in tokens:
                if token >= vocabulary:
                    raise errors.InvalidSampling(
                        f"token id {token} is not in the model's vocabulary of {vocabulary}", field=field
                    )
        sampling = pb.Sampling()
        sampling.CopyFrom(self._defaults)
        sampling.MergeFrom(request.sampling)
        wanted = sampling.max_tokens if sampling.HasField("max_tokens") else self._max_tokens
        sampling.max_tokens = min(wanted, self._max_tokens, room)
        if not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(64)
        routing = request.routing
        job = Job(
            request_id=request.request_id or str(uuid.uuid4()),
            prompt_ids=prompt_ids,
            resume_ids=list(request.resume.token_ids),
            sampling=sampling,
            arrived=arrived,
            expires=None if remaining is None else arrived + remaining,
            priority=routing.priority if routing.HasField("priority") else 5,
            attempt=request.resume.attempt,
            inbox=Inbox(self._flush(request.stream), limit=self._unread_limit),
            span=span,
            tenant=routing.tenant,
            blocks=blocks(prompt_ids),
            tells_moves=request.stream.include_route_changes,
        )
        span.set_attributes(
            {
                attributes.REQUEST_ID: job.request_id,
                attributes.TIER: self._tier,
                attributes.ATTEMPT: job.attempt,
                attributes.GEN_AI_OPERATION: "chat" if request.HasField("chat") else "text_completion",
                attributes.GEN_AI_PROVIDER: "headrace",
                attributes.GEN_AI_REQUEST_MODEL: models[0].name,
                attributes.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_tokens,
                attributes.GEN_AI_INPUT_TOKENS: len(prompt_ids),
            }
        )
        return job

    def _check_pins(self, hints: pb.Routing, model: str) -> None:
        if hints.tier and hints.tier != self._tier:
            raise errors.UnknownTier(
                f"this batcher serves tier {self._tier!r}, not {hints.tier!r}", field="routing.tier"
            )
        if hints.model and hints.model != model:
            raise errors.UnknownModel(
                f"tier {self._tier!r} serves {model!r}, not {hints.model!r}", field="routing.model"
            )

    def _encode(self, request: pb.GenerateRequest) -> list[int]:
        if request.HasField("chat"):
            chat = request.chat
            return self._tokenizer.encode_chat(
                [(turn.role, turn.content) for turn in chat.messages],
                continue_final=chat.continue_final_message,
            )
        return self._tokenizer.encode_text(request.prompt)

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

    def _flush(self, stream: pb.StreamOptions) -> Flush:
        now = time.monotonic()
        rate = sum(link.rate.per_second(now) for link in self._coalescer.pool)
        calm = flush_for(len(self._coalescer.live), rate)
        return Flush(
            stream.flush_tokens if stream.HasField("flush_tokens") else calm.tokens,
            stream.flush_interval.ToNanoseconds() / 1e9
            if stream.HasField("flush_interval")
            else calm.seconds,
        )
