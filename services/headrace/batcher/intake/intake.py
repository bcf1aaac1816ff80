"""Turn requests into jobs: check, tokenise and clamp them. Bounded, and in the order of the queue.

A request holds one of the batcher's `queue_limit` places from its arrival. It waits to be tokenised in the
lane for its size (`lanes`), and then for a worker (`coalescer`). One that the tokenizer encodes quickly is
tokenised immediately, on the event loop, unless others wait in its lane. If its answer has a grammar that was
not seen before, it also waits for the check of the grammar, in a lane of its own. Requests that wait here are
rejected, shed, timed out, cancelled and drained as those in the queue are. Prompts of `LONG_BYTES` and more
are also bounded in bytes. A prompt of token ids is ready at once. `encoding` tokenises, `grammars` checks
grammars, and `limits` decides what fits.
"""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from opentelemetry import trace

from headrace import attributes, errors
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.inbox import Inbox
from headrace.batcher.intake.encoding import Encoder
from headrace.batcher.intake.grammars import GrammarCheck, grammar_field
from headrace.batcher.intake.lanes import Lane, Pending, outcome_after
from headrace.batcher.intake.limits import RequestLimits
from headrace.batcher.job import Job
from headrace.batcher.tools.form import AnswerForm
from headrace.batcher.waiting.admission import TOLERANCE
from headrace.batcher.waiting.estimates import retry_after
from headrace.batcher.waiting.prefixes import block_names
from headrace.batcher.waiting.shedding import victims
from headrace.deadline import Deadline
from headrace.flushing import Flusher, chooses_flushing, chosen_flusher
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_request

LONG_BYTES = 64 * 1024  # tokenised in about 30 ms; a shorter prompt never waits for a longer one
# The smallest request of each lane, in bytes, and the lane's threads.
_LANES = ((0, 2), (LONG_BYTES, 1), (8 * LONG_BYTES, 1))

_tracer = trace.get_tracer("headrace.batcher")


class _Encoded(NamedTuple):
    """The prompt of a request, and the form of its answer, with a grammar that is checked or not."""

    prompt_ids: list[int]
    form: AnswerForm
    checked: bool


class Intake:
    """Turns requests into jobs. Use as a context manager: it owns threads.

    tier                the name of the tier
    grammars            makes and checks the forms of answers; the intake closes it
    max_tokens          most tokens of an answer
    max_unread_tokens   most unread tokens kept for a caller
    max_bytes           most bytes of requests of `LONG_BYTES` and more that wait to be tokenised; a single
                        one may have more
    ageing              as of `order.FairOrder`
    defaults            values of sampling fields that a request leaves out
    """

    def __init__(
        self,
        coalescer: Coalescer,
        encoder: Encoder,
        grammars: GrammarCheck,
        *,
        tier: str,
        max_tokens: int,
        max_unread_tokens: int,
        max_bytes: int,
        ageing: float,
        defaults: pb.Sampling | None = None,
    ) -> None:
        self._coalescer = coalescer
        self._admission = coalescer.admission
        self._encoder = encoder
        self._grammars = grammars
        self._tier = tier
        self._max_tokens = max_tokens
        self._max_unread_tokens = max_unread_tokens
        self._max_bytes = max_bytes
        self._defaults = defaults or pb.Sampling()
        self._lanes = [
            Lane(smallest=smallest, threads=threads, ageing=ageing, tier=tier) for smallest, threads in _LANES
        ]
        self._long = self._lanes[1:]
        # One thread: the process that checks grammars checks one at a time.
        self._checks = Lane(smallest=0, threads=1, ageing=ageing, tier=tier, stage="grammar")
        self._admission.places += [*self._lanes, self._checks]
        self._threads = ExitStack()

    def __enter__(self) -> Intake:
        for lane in (*self._lanes, self._checks):
            self._threads.enter_context(lane)
        self._threads.callback(self._grammars.close)  # first, which ends a check that is running
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    @property
    def waiting(self) -> int:
        """The number of requests that wait to be tokenised or checked, or are at it."""
        return sum(lane.waiting for lane in (*self._lanes, self._checks))

    @property
    def bytes(self) -> int:
        """Their bytes, and those of requests that left while they were being tokenised."""
        return sum(lane.bytes for lane in self._lanes)

    def oldest_wait(self, now: float) -> float:
        """Return how long the oldest request has waited to be tokenised or checked, in seconds."""
        return max(lane.order.oldest_wait(now) for lane in (*self._lanes, self._checks))

    async def job(
        self, request: pb.GenerateRequest, arrived: float, deadline: Deadline, *, framed: bool = False
    ) -> Job:
        """Return the request as a job, which holds its place: call its `release_place` however the job ends.

        arrived   time.monotonic()
        framed    as of `Answering.answer`

        Raises InvalidRequest, NoWorkers, Overloaded and TtftUnattainable immediately; Shed and
        DeadlineInQueue while the request waits.
        """
        check_request(request)
        limits = self.limits()
        limits.check(request)
        size, routing = request.ByteSize(), request.routing
        self._encoder.check(request, size, limits)
        pending: Pending[_Encoded] = Pending(
            partial(self._encoded, request, size, limits),
            size=size,
            tenant=routing.tenant,
            priority=routing.priority if routing.HasField("priority") else 5,
            arrived=arrived,
            deadline=deadline,
        )
        lane = next(lane for lane in reversed(self._lanes) if size >= lane.smallest)
        if self._is_ready(request) or (size <= self._quick_bytes(request) and lane.empty):
            return self._job_at_once(request, pending, limits, framed)
        self._enter(pending, lane, time.monotonic())
        held = lane, pending
        try:
            with _TokenizeSpan():
                encoded = await pending.wait(_deadline_passed())
            if not encoded.checked:
                held = self._enter_check(request, pending, encoded, lane)
                await held[1].wait(_deadline_passed("the grammar of the answer was checked"))
            job = self._job(request, pending, encoded, limits, framed)
        except BaseException as error:
            lane, pending = held
            lane.leave(pending, outcome_after(error))
            raise
        job.release_place = partial(held[0].leave, held[1], "ok")
        return job

    def _encoded(self, request: pb.GenerateRequest, size: int, limits: RequestLimits) -> _Encoded:
        """Return the prompt and the form of the answer. Raises InvalidRequest."""
        prompt_ids = self._encoder.prompt_ids(request, size, limits)
        form = self._grammars.form_of(request, prompt_ids)
        return _Encoded(prompt_ids, form, self._grammars.known(request, form))

    def _enter_check(
        self, request: pb.GenerateRequest, pending: Pending[_Encoded], encoded: _Encoded, lane: Lane
    ) -> tuple[Lane, Pending[_Encoded]]:
        """Move a request from the lane where it was tokenised to the one for grammars, with its place."""

        def work() -> _Encoded:
            self._grammars.check(request, encoded.form)
            return encoded

        check = replace(pending, work=work, size=len(encoded.form.grammar))
        lane.leave(pending, "ok")
        self._checks.put(check)
        return self._checks, check

    def _is_ready(self, request: pb.GenerateRequest) -> bool:
        """Whether there is nothing to tokenise, decode or check, see `_quick_bytes`."""
        if request.resume.token_ids or grammar_field(request):
            return False
        return request.HasField("token_ids")

    def _quick_bytes(self, request: pb.GenerateRequest) -> int:
        """Return the size up to which the request is tokenised on the event loop; 0: never."""
        # An answer that is resumed waits to be decoded, and must hold a place meanwhile.
        if request.resume.token_ids or grammar_field(request):
            return 0
        return self._encoder.quick_bytes(request)

    def _job_at_once(
        self, request: pb.GenerateRequest, pending: Pending[_Encoded], limits: RequestLimits, framed: bool
    ) -> Job:
        """Return a short request as a job. It enters the queue in this turn of the event loop."""
        now = time.monotonic()
        if pending.response_deadline.passed(now):
            raise _deadline_passed()
        self._admission.make_place(pending, now)  # before the work: an overloaded batcher rejects at low cost
        with _TokenizeSpan():
            encoded = pending.work()
        job = self._job(request, pending, encoded, limits, framed)
        job.release_place = _nothing_held
        return job

    def _enter(self, pending: Pending[_Encoded], lane: Lane, now: float) -> None:
        """Put the request into its lane, and shed others for it if need be."""
        if pending.deadline.exists:
            left = pending.response_deadline.left(now)
            if left <= 0:
                raise _deadline_passed()
            longest = TOLERANCE * left
            if lane.longest_wait_seconds > longest and (needed := lane.wait_seconds(pending)) > longest:
                raise errors.TtftUnattainable(
                    f"the deadline is in {left:.2f} s, but the prompt would be tokenised after {needed:.2f} s"
                    " at the earliest: allow more time or use another tier",
                    left=f"{left:.3f}",
                    needed=f"{needed:.3f}",
                )
        if lane in self._long:
            self._free_bytes(pending)
        self._admission.make_place(pending, now)
        lane.put(pending)

    def _free_bytes(self, pending: Pending[_Encoded]) -> None:
        """Make sure that the bytes of a long request fit, by shedding if need be. Raises Overloaded."""
        taken = sum(lane.bytes for lane in self._long)
        if not taken or taken + pending.size <= self._max_bytes:
            return
        excess = taken + pending.size - self._max_bytes
        waiting = sum(len(lane.order) for lane in self._long)
        delay = retry_after(waiting, self._admission.drained.per_second(time.monotonic()))
        chosen = victims(self._long, pending, excess, lambda prompt: prompt.size)
        if chosen is None:
            raise errors.Overloaded(
                f"{taken} bytes of long prompts wait to be tokenised, and {pending.size} more would exceed "
                f"{self._max_bytes}; retry after {delay:.1f} s",
                retry_after=delay,
                queued_bytes=taken,
                limit_bytes=self._max_bytes,
            )
        for victim in chosen:
            self._admission.shed(
                victim,
                errors.Shed(
                    f"{taken} bytes of long prompts wait to be tokenised, and this one was shed in favour of "
                    f"one of higher priority or of a tenant with fewer; retry after {delay:.1f} s",
                    retry_after=delay,
                    queued_bytes=taken,
                    limit_bytes=self._max_bytes,
                ),
            )

    def limits(self) -> RequestLimits:
        """Return the current limits of the tier. Raises NoWorkers."""
        pool = self._coalescer.pool
        models = [link.model for link in pool.ready() if link.model is not None]
        if not models:
            raise errors.NoWorkers(
                f"no worker of tier {self._tier!r} is ready ({pool.problem}); try again shortly",
                retry_after=1.0,
            )
        return RequestLimits.of(self._tier, models, self._max_tokens)

    def _job(
        self,
        request: pb.GenerateRequest,
        pending: Pending[_Encoded],
        encoded: _Encoded,
        limits: RequestLimits,
        framed: bool,
    ) -> Job:
        prompt_ids = encoded.prompt_ids
        limits.check_prompt(len(prompt_ids))
        resume, span = request.resume, trace.get_current_span()
        limits.check_resume(len(prompt_ids), len(resume.token_ids))
        job = Job(
            request_id=request.request_id or str(uuid.uuid4()),
            prompt_ids=prompt_ids,
            resume_ids=resume.token_ids[:],
            sampling=limits.sampling(request.sampling, len(prompt_ids), self._defaults),
            arrived=pending.arrived,
            deadline=pending.deadline,
            priority=pending.priority,
            attempt=resume.attempt,
            inbox=Inbox(self._flusher(request.stream, framed), limit=self._unread_limit(request.sampling)),
            span=span,
            tenant=pending.tenant,
            blocks=block_names(prompt_ids),
            wants_route_changes=request.stream.include_route_changes,
            each_step=chooses_flushing(request),
            model=limits.model,
            form=encoded.form,
        )
        job.request_prompt_details()
        if span.is_recording():
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

    def _unread_limit(self, sampling: pb.Sampling) -> int:
        """Return the most unread tokens; fewer if each has the most likely tokens at its place."""
        return max(self._max_unread_tokens // (1 + sampling.top_logprobs), 1)

    def _flusher(self, stream: pb.StreamOptions, framed: bool) -> Flusher:
        """Return the flusher that follows the load, or one of its own for a request with flush options."""
        live = self._coalescer.current_flushing(time.monotonic())
        return chosen_flusher(stream, live.framed if framed else live.messages)


class _TokenizeSpan:
    """The span of tokenising, if the request is traced; not the current one: nothing below starts a span."""

    def __enter__(self) -> None:
        current = trace.get_current_span()
        self._span = _tracer.start_span(attributes.SPAN_TOKENIZE) if current.is_recording() else None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._span is not None:
            if isinstance(error, Exception):
                self._span.record_exception(error)
                self._span.set_status(trace.StatusCode.ERROR, type(error).__qualname__)
            self._span.end()


def _nothing_held() -> None:
    """Do nothing: a request that enters the queue in this turn of the event loop holds no place before."""


def _deadline_passed(done: str = "the prompt was tokenised") -> errors.DeadlineInQueue:
    return errors.DeadlineInQueue(f"the deadline passed before {done}; nothing was generated")
