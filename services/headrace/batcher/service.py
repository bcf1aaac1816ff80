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
from opentelemetry import metrics, trace

from headrace import attributes, errors
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.detokenizer import Piece, TextStream
from headrace.batcher.job import Arrival, End, Flush, Inbox, Job, flush_for
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

_tracer = trace.get_tracer("headrace.batcher")
_meter = metrics.get_meter("headrace.batcher")
_requests = _meter.create_counter(attributes.METRIC_REQUESTS, description="requests, by how they ended")
_tokens = _meter.create_counter(
    attributes.METRIC_TOKENS, unit="{token}", description="tokens delivered to callers"
)
_ttft = _meter.create_histogram(
    attributes.METRIC_TTFT, unit="s", explicit_bucket_boundaries_advisory=attributes.BUCKETS_TTFT
)
_tpot = _meter.create_histogram(
    attributes.METRIC_TPOT, unit="s", explicit_bucket_boundaries_advisory=attributes.BUCKETS_TPOT
)
_duration = _meter.create_histogram(
    attributes.METRIC_REQUEST_DURATION, unit="s", explicit_bucket_boundaries_advisory=attributes.BUCKETS_CALL
)


class GenerationServicer(GenerationServiceServicer, RoutingServiceServicer):
    """One tier, as its callers see it.

    executor     where tokenising happens: never on the event loop
    max_tokens   most tokens of an answer
    """

    def __init__(
        self,
        coalescer: Coalescer,
        tokenizer: Tokenizer,
        *,
        tier: str,
        executor: Executor,
        max_tokens: int,
    ) -> None:
        self._coalescer = coalescer
        self._tokenizer = tokenizer
        self._tier = tier
        self._executor = executor
        self._max_tokens = max_tokens

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream the answer to one prompt."""
        arrived = time.monotonic()
        check_request(request)
        job = await self._job(request, arrived, context.time_remaining())
        answer = _Answer(job, request, self._tokenizer, {attributes.TIER: self._tier})
        outcome = "cancelled"  # unless it ends some other way
        try:
            if answer.complete_already:
                yield self._accepted(job)
                for response in answer.rest():
                    yield response
            else:
                async with aclosing(self._coalescer.arrivals(job)) as arrivals:
                    await anext(arrivals)
                    yield self._accepted(job)
                    async for arrival in arrivals:
                        for response in answer.take(arrival):
                            yield response
                        if answer.done:
                            break  # at a stop text the worker is still at it: leaving cancels
            outcome = answer.outcome
        except errors.HeadraceError as error:
            outcome = error.reason.lower()
            raise
        finally:
            # A busy server may be told of the deadline by gRPC, as a cancel, before it has noticed itself.
            if outcome == "cancelled" and job.late(time.monotonic()):
                outcome = job.deadline_error().reason.lower()
            answer.record(outcome)

    async def ListTiers(
        self, request: routing.ListTiersRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> routing.ListTiersResponse:
        """The one tier that this batcher serves."""
        now = time.monotonic()
        workers = self._coalescer.workers()
        queue = self._coalescer.queue
        tier = routing.Tier(
            name=self._tier,
            healthy=bool(workers),
            unhealthy_reason="" if workers else "; ".join(link.problem for link in self._coalescer.links),
            limits=routing.TierLimits(max_tokens=self._max_tokens, queue_limit=queue.limit),
            load=routing.TierLoad(
                queued=len(queue),
                running=sum(link.outstanding for link in self._coalescer.links),
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
        workers = self._coalescer.workers()
        if not workers:
            problems = "; ".join(link.problem for link in self._coalescer.links)
            raise errors.NoWorkers(
                f"no worker of tier {self._tier!r} is ready ({problems}); try again shortly", retry_after=1.0
            )
        models = [link.model for link in workers if link.model is not None]
        self._check_pins(request.routing, models[0].name)
        span = trace.get_current_span()
        with _tracer.start_as_current_span(attributes.SPAN_TOKENIZE):
            prompt_ids = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._encode, request
            )
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
        vocabulary = min(model.vocabulary_size for model in models)
        for token in (*request.sampling.logit_bias, *request.resume.token_ids):
            if token >= vocabulary:
                raise errors.InvalidSampling(
                    f"token id {token} is not in the model's vocabulary of {vocabulary}",
                    field="sampling.logit_bias"
                    if token in request.sampling.logit_bias
                    else "resume.token_ids",
                )
        sampling = pb.Sampling()
        sampling.CopyFrom(request.sampling)
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
            inbox=Inbox(_flush(request.stream, self._coalescer.live)),
            span=span,
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
            return self._tokenizer.encode_chat([(turn.role, turn.content) for turn in request.chat.messages])
        return self._tokenizer.encode_text(request.prompt)

    def _accepted(self, job: Job) -> pb.GenerateResponse:
        model = next((link.model.name for link in self._coalescer.workers() if link.model), "")
        return pb.GenerateResponse(
            accepted=pb.Accepted(
                request_id=job.request_id,
                model=model,
                tier=self._tier,
                prompt_tokens=len(job.prompt_ids),
                seed=job.sampling.seed,
            )
        )


def _flush(stream: pb.StreamOptions, live: int) -> Flush:
    calm = flush_for(live)
    return Flush(
        stream.flush_tokens if stream.HasField("flush_tokens") else calm.tokens,
        stream.flush_interval.ToNanoseconds() / 1e9 if stream.HasField("flush_interval") else calm.seconds,
    )


class _Answer:
    """What has been said so far, and the events that say it."""

    def __init__(
        self, job: Job, request: pb.GenerateRequest, tokenizer: Tokenizer, labels: dict[str, str]
    ) -> None:
        self._job = job
        self._labels = labels
        self._with_ids = request.stream.include_token_ids
        self._text = TextStream(tokenizer.decode, job.sampling.stop)
        self._offset = len(job.resume_ids)
        self._first: float | None = None
        self._last: float | None = None
        self._end: End | None = None
        self.done = False
        self.outcome = "unfinished"
        # What a caller has already may hold all there is to say.
        self._replayed = self._text.feed(job.resume_ids)

    @property
    def complete_already(self) -> bool:
        """Whether the tokens that came with the request leave nothing to generate."""
        return self._replayed.stopped is not None or self._offset >= self._job.sampling.max_tokens

    def take(self, arrival: Arrival) -> list[pb.GenerateResponse]:
        """The events for what arrived."""
        responses = []
        now = time.monotonic()
        piece = self._text.feed(arrival.ids)
        if arrival.ids:
            if self._first is None:
                self._first = now
                self._job.span.add_event(attributes.EVENT_FIRST_TOKEN)
            self._last = now
        if arrival.ids:
            responses.append(self._delta(arrival, piece.used, piece.text))
        if piece.stopped is not None or arrival.end is not None:
            self._end = arrival.end
            responses += self.rest(piece.stopped, wasted=len(arrival.ids) - piece.used)
        return responses

    def rest(self, stopped: str | None = None, *, wasted: int = 0) -> list[pb.GenerateResponse]:
        """The last events: what text was kept back, if any, and the finish.

        The text comes in a delta of its own, without tokens: what the deltas before said is then a function
        of their tokens alone, and one who carries on from these misses nothing and hears nothing twice.
        """
        stopped = stopped if stopped is not None else self._replayed.stopped
        last = self._text.flush() if stopped is None else Piece("", 0)
        kept_back = [self._delta(Arrival([], [], None), 0, last.text)] if last.text else []
        return [*kept_back, self._finish(stopped if stopped is not None else last.stopped, wasted)]

    def _finish(self, stopped: str | None, wasted: int) -> pb.GenerateResponse:
        self.done = True
        finish = pb.Finish(
            reason=pb.FINISH_REASON_STOP_SEQUENCE
            if stopped is not None
            else self._end.reason
            if self._end is not None
            else pb.FINISH_REASON_LENGTH,
            stop_sequence=stopped or "",
            usage=pb.Usage(
                prompt_tokens=len(self._job.prompt_ids),
                cached_tokens=self._end.usage.cached_tokens if self._end is not None else 0,
                completion_tokens=self._offset,
                replayed_tokens=len(self._job.resume_ids),
                wasted_tokens=wasted,
            ),
        )
        timing = finish.timing
        now = time.monotonic()
        job = self._job
        if self._end is not None:
            timing.prefill.CopyFrom(self._end.timing.prefill)
        if job.submitted is not None:
            timing.queue.FromNanoseconds(_nanoseconds(job.submitted - job.arrived))
        if self._first is not None and self._last is not None:
            timing.first_token.FromNanoseconds(_nanoseconds(self._first - job.arrived))
            timing.decode.FromNanoseconds(_nanoseconds(self._last - self._first))
        timing.total.FromNanoseconds(_nanoseconds(now - job.arrived))
        self.outcome = pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
        return pb.GenerateResponse(finish=finish)

    def record(self, outcome: str) -> None:
        """Book the request in metrics and on its span, however it ended."""
        job, now = self._job, time.monotonic()
        new_tokens = self._offset - len(job.resume_ids)
        _requests.add(1, {**self._labels, attributes.OUTCOME: outcome})
        _tokens.add(new_tokens, self._labels)
        _duration.record(now - job.arrived, {**self._labels, attributes.OUTCOME: outcome})
        if self._first is not None and self._last is not None:
            _ttft.record(self._first - job.arrived, self._labels)
            if new_tokens > 1:
                _tpot.record((self._last - self._first) / (new_tokens - 1), self._labels)
        job.span.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: outcome})
        job.span.set_attributes(
            {attributes.GEN_AI_OUTPUT_TOKENS: self._offset, attributes.GEN_AI_FINISH_REASONS: [outcome]}
        )

    def _delta(self, arrival: Arrival, used: int, text: str) -> pb.GenerateResponse:
        delta = pb.Delta(offset=self._offset, token_count=used, text=text, logprobs=arrival.logprobs[:used])
        if self._with_ids:
            delta.token_ids.extend(arrival.ids[:used])
        self._offset += used
        return pb.GenerateResponse(delta=delta)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
