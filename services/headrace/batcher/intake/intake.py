"""Bring requests into the batcher's own form: check, tokenise, clamp. Bounded, and in the queue's order.

A request has a place among the batcher's `queue_limit` from its arrival on. It waits to be tokenised in the
lane of its size (`lanes`) and then for a worker (`coalescer`). What waits here is refused, shed, timed out,
cancelled and drained as in the queue. What cannot fit the context by its bytes alone is refused before it is
tokenised. Of what is many times as long as the context only the head is tokenised. Prompts of `LONG_BYTES`
and more are bounded in bytes, too. What fits is decided by `limits`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import ExitStack
from functools import partial

from opentelemetry import trace

from headrace import attributes, errors
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.inbox import Flush, Inbox, flush_for
from headrace.batcher.intake.lanes import Entry, Lane
from headrace.batcher.intake.limits import Limits
from headrace.batcher.job import Job
from headrace.batcher.text.tokens import Bounded, Tokenizer
from headrace.batcher.waiting.admission import DOUBT
from headrace.batcher.waiting.estimates import retry_after
from headrace.batcher.waiting.prefixes import blocks
from headrace.batcher.waiting.queue import victims
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_request, seconds_of

LONG_BYTES = 64 * 1024  # tokenised in some 30 ms; what is shorter never waits for what is longer
# Bytes of the smallest request of each lane, and its threads.
_LANES = ((0, 2), (LONG_BYTES, 1), (8 * LONG_BYTES, 1))
# Characters per token of the context, of which ordinary text has 3 to 5: of a text that has more than
# `_LONG`, `_HEAD` are tokenised first.
_HEAD, _LONG = 6, 12
# Tokens at the end of a head that what follows may change. Tokenizing is local: a word or a run of blanks.
_UNSETTLED = 64

_tracer = trace.get_tracer("headrace.batcher")


class Intake:
    """Makes jobs of requests. Use as a context manager: it owns threads.

    tier          the name of the tier
    max_tokens    most tokens of an answer
    unread_limit  most tokens kept for a caller that does not read them
    most_bytes    most bytes of requests of `LONG_BYTES` and more that wait to be tokenised; a single one may
                  have more
    ageing        as of `queue`
    defaults      sampling fields that a request has unless it sets them
    """

    def __init__(
        self,
        coalescer: Coalescer,
        tokenizer: Tokenizer,
        *,
        tier: str,
        max_tokens: int,
        unread_limit: int,
        most_bytes: int,
        ageing: float,
        defaults: pb.Sampling | None = None,
    ) -> None:
        self._coalescer = coalescer
        self._admission = coalescer.admission
        self._tokenizer = tokenizer
        self._bound = tokenizer.bound if isinstance(tokenizer, Bounded) else None
        # Bytes per token of the context from which on a chat is laid out to be judged before it is tokenised.
        self._doubtful = min(_LONG, self._bound.longest if self._bound else _LONG)
        self._tier = tier
        self._max_tokens = max_tokens
        self._unread_limit = unread_limit
        self._most_bytes = most_bytes
        self._defaults = defaults or pb.Sampling()
        self._lanes = [
            Lane(
                smallest=smallest,
                threads=threads,
                limit=coalescer.queue.limit,
                ageing=ageing,
                labels={attributes.TIER: tier},
            )
            for smallest, threads in _LANES
        ]
        self._long = self._lanes[1:]
        self._admission.places += self._lanes
        self._threads = ExitStack()

    def __enter__(self) -> Intake:
        for lane in self._lanes:
            self._threads.enter_context(lane)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    @property
    def waiting(self) -> int:
        """Requests that wait to be tokenised, or are being tokenised."""
        return sum(lane.waiting for lane in self._lanes)

    @property
    def bytes(self) -> int:
        """Their bytes, and those of requests that left while they were being tokenised."""
        return sum(lane.bytes for lane in self._lanes)

    def oldest_wait(self, now: float) -> float:
        """How long the first to come has waited for its turn, in seconds."""
        return max(lane.queue.oldest_wait(now) for lane in self._lanes)

    async def job(self, request: pb.GenerateRequest, arrived: float, remaining: float | None) -> Job:
        """The request as a job. Its place is the job's: call `leave_intake` however the job ends.

        arrived     time.monotonic()
        remaining   seconds left for it, None for no deadline

        Raises InvalidRequest, NoWorkers, Overloaded and Unattainable; while it waits, Shed and
        DeadlineInQueue.
        """
        check_request(request)
        limits = self._limits()
        limits.check(request)
        size, routing, bound = request.ByteSize(), request.routing, self._bound
        # The bytes of a shorter prompt prove nothing, so the event loop does not go over them.
        most = bound.longest * (limits.context_length - 1) if bound is not None else size
        if request.HasField("prompt") and size > most:
            self._check_fewest(request.prompt, limits)
        entry = Entry(
            partial(self._encode, request, size, limits),
            size=size,
            tenant=routing.tenant,
            priority=routing.priority if routing.HasField("priority") else 5,
            arrived=arrived,
            expires=None if remaining is None else arrived + remaining,
        )
        lane = next(lane for lane in reversed(self._lanes) if size >= lane.smallest)
        self._enter(entry, lane, time.monotonic())
        try:
            with _tracer.start_as_current_span(attributes.SPAN_TOKENIZE):
                prompt_ids = await self._ids(entry)
            job = self._job(request, entry, prompt_ids, limits)
        except BaseException:
            lane.leave(entry, "left")
            raise
        job.leave_intake = partial(lane.leave, entry, "tokenized")
        return job

    def _enter(self, entry: Entry, lane: Lane, now: float) -> None:
        """Give the request a place in its lane, at the cost of others that are to give way."""
        if entry.answer_by is not None:
            left, needed = entry.answer_by - now, lane.wait_seconds(entry)
            if left <= 0:
                raise _too_late()
            if needed > DOUBT * left:
                raise errors.Unattainable(
                    f"the deadline is in {left:.2f} s and the prompt cannot be tokenised before "
                    f"{needed:.2f} s: give it more time, or another tier",
                    left=f"{left:.3f}",
                    needed=f"{needed:.3f}",
                )
        if lane in self._long:
            self._make_room(entry)
        self._admission.make_place(entry, now)
        lane.put(entry)

    def _make_room(self, entry: Entry) -> None:
        """See to it that the bytes of a long request find room. Raises Overloaded."""
        taken = sum(lane.bytes for lane in self._long)
        if not taken or taken + entry.size <= self._most_bytes:
            return
        excess = taken + entry.size - self._most_bytes
        queues = [lane.queue for lane in self._long]
        delay = retry_after(sum(map(len, queues)), self._admission.drained.per_second(time.monotonic()))
        given = victims(queues, entry, excess, lambda waiting: waiting.size)
        if given is None:
            raise errors.Overloaded(
                f"{taken} bytes of long prompts wait to be tokenised, and {entry.size} more would be over "
                f"{self._most_bytes}; retry after {delay:.1f} s",
                retry_after=delay,
                queued_bytes=taken,
                limit_bytes=self._most_bytes,
            )
        for victim in given:
            self._admission.shed(
                victim,
                errors.Shed(
                    f"{taken} bytes of long prompts wait to be tokenised, and this one gave its place to one "
                    f"of higher priority, or of a tenant that has fewer; retry after {delay:.1f} s",
                    retry_after=delay,
                    queued_bytes=taken,
                    limit_bytes=self._most_bytes,
                ),
            )

    async def _ids(self, entry: Entry) -> list[int]:
        """Wait for the request's tokens, until its deadline at most."""
        try:
            async with asyncio.timeout_at(entry.answer_by) as patience:
                return await entry.ids
        except TimeoutError:
            if not patience.expired():
                raise
            raise _too_late() from None

    def _encode(self, request: pb.GenerateRequest, size: int, limits: Limits) -> list[int]:
        """The prompt's tokens. Called on a lane's thread."""
        if not request.HasField("chat"):
            self._check_head(request.prompt, limits)
            return self._tokenizer.encode_text(request.prompt)
        turns = [(turn.role, turn.content) for turn in request.chat.messages]
        continue_final = request.chat.continue_final_message
        # A template may drop some of the messages: what a chat's bytes prove is known once it is laid out.
        if size > self._doubtful * limits.context_length and isinstance(self._tokenizer, Bounded):
            text = self._tokenizer.lay_out(turns, continue_final=continue_final)
            self._check_fewest(text, limits)
            self._check_head(text, limits)
        return self._tokenizer.encode_chat(turns, continue_final=continue_final)

    def _check_head(self, text: str, limits: Limits) -> None:
        """Check the first tokens of a text that is many times as long as the context, instead of all."""
        characters = _HEAD * limits.context_length
        if len(text) > _LONG * limits.context_length:
            limits.check_fewest(len(self._tokenizer.encode_text(text[:characters])) - _UNSETTLED)

    def _check_fewest(self, text: str, limits: Limits) -> None:
        if self._bound is not None:
            limits.check_fewest(self._bound.fewest_tokens(text))

    def _limits(self) -> Limits:
        """What the tier takes now. Raises NoWorkers."""
        pool = self._coalescer.pool
        models = [link.model for link in pool.ready() if link.model is not None]
        if not models:
            raise errors.NoWorkers(
                f"no worker of tier {self._tier!r} is ready ({pool.problem}); try again shortly",
                retry_after=1.0,
            )
        return Limits.of(self._tier, models, self._max_tokens)

    def _job(self, request: pb.GenerateRequest, entry: Entry, prompt_ids: list[int], limits: Limits) -> Job:
        limits.check_prompt(len(prompt_ids))
        limits.check_resume(len(prompt_ids), len(request.resume.token_ids))
        span = trace.get_current_span()
        job = Job(
            request_id=request.request_id or str(uuid.uuid4()),
            prompt_ids=prompt_ids,
            resume_ids=list(request.resume.token_ids),
            sampling=limits.sampling(request.sampling, len(prompt_ids), self._defaults),
            arrived=entry.arrived,
            expires=entry.expires,
            priority=entry.priority,
            attempt=request.resume.attempt,
            inbox=Inbox(self._flush(request.stream), limit=self._unread_limit),
            span=span,
            tenant=entry.tenant,
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
                attributes.GEN_AI_REQUEST_MODEL: limits.model,
                attributes.GEN_AI_REQUEST_MAX_TOKENS: job.sampling.max_tokens,
                attributes.GEN_AI_INPUT_TOKENS: len(prompt_ids),
            }
        )
        return job

    def _flush(self, stream: pb.StreamOptions) -> Flush:
        now = time.monotonic()
        rate = sum(link.rate.per_second(now) for link in self._coalescer.pool)
        calm = flush_for(len(self._coalescer.live), rate)
        return Flush(
            stream.flush_tokens if stream.HasField("flush_tokens") else calm.tokens,
            seconds_of(stream.flush_interval, "stream.flush_interval")
            if stream.HasField("flush_interval")
            else calm.seconds,
        )


def _too_late() -> errors.DeadlineInQueue:
    return errors.DeadlineInQueue(
        "the deadline passed before the prompt was tokenised; nothing was generated"
    )
