"""Join engine and streams: sequences of many batchers in, each batcher's part of every step out.

The engine runs on its thread and reports once a step; here, on the event loop, a report is split into
one frame per stream. A stream that reads slowly finds its frames merged, so the engine never waits and
what is kept is bounded by what its sequences may say.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from opentelemetry import metrics, propagate, trace

from headrace import attributes, errors
from headrace.runtime.rate import RateMeter
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.credit import capacity, share
from headrace.worker.engine.loop import EngineLoop, StepReport
from headrace.worker.engine.scheduler import Ending, LiveSequence, Update
from headrace.worker.engine.seam import Engine, ModelInfo, SamplingParams

BEAT_SECONDS = 0.25  # while prompts are computed and no token comes, an empty step is sent so often

# A sequence's name inside the engine: its stream and its handle there.
Key = tuple[int, int]

_FINISH = {
    Ending.STOP: pb.FINISH_REASON_STOP,
    Ending.LENGTH: pb.FINISH_REASON_LENGTH,
    Ending.CANCELLED: pb.FINISH_REASON_CANCELLED,
    Ending.DEADLINE: pb.FINISH_REASON_DEADLINE,
}

_tracer = trace.get_tracer("headrace.worker")
_meter = metrics.get_meter("headrace.worker")
_running = _meter.create_gauge(attributes.METRIC_RUNNING, description="sequences in the engine's steps")
_waiting = _meter.create_gauge(attributes.METRIC_WAITING, description="sequences that wait for room")
_kv_usage = _meter.create_gauge(attributes.METRIC_KV_USAGE, unit="1", description="share of KV memory held")
_cached = _meter.create_counter(
    attributes.METRIC_CACHED_TOKENS, unit="{token}", description="found in KV memory instead of computed"
)
_preempted = _meter.create_counter(
    attributes.METRIC_PREEMPTIONS, description="sequences that left KV memory for a while to make room"
)
_rate = _meter.create_gauge(attributes.METRIC_TOKEN_RATE, unit="{token}/s")
_ended = _meter.create_counter(attributes.METRIC_ENDED, description="sequences, by how they ended")
_step_rows = _meter.create_histogram(
    attributes.METRIC_STEP_ROWS,
    description="sequences per engine step",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_SIZE,
)
_step_seconds = _meter.create_histogram(
    attributes.METRIC_STEP_SECONDS, unit="s", explicit_bucket_boundaries_advisory=attributes.BUCKETS_TTFT
)


@dataclass(slots=True)
class Flight:
    """What the streams' side knows of a sequence under way."""

    sequence: LiveSequence[Key]
    request_id: str
    attempt: int
    parent: trace.SpanContext
    batch: trace.SpanContext
    submitted_ns: int
    cancelled_by: errors.HeadraceError | None = None
    first_token_ns: int = 0


@dataclass(slots=True)
class Session:
    """One batcher's stream.

    pending   deltas that wait for the writer, by handle: later steps merge into them
    window    most step frames that may be unacknowledged; 0 is no bound
    credit    sequences that it may have here
    """

    number: int
    batcher_id: str = ""
    epoch: int = 0
    window: int = 0
    credit: int = 0
    flights: dict[int, Flight] = field(default_factory=dict)
    pending: dict[int, wire.SequenceDelta] = field(default_factory=dict)
    others: list[wire.RunResponse] = field(default_factory=list)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    frames: int = 0
    acked: int = 0
    generation: int = 1
    sending: bool = False
    beating: bool = False
    framed: float = 0.0

    @property
    def hungry(self) -> bool:
        """Whether it has used all of its credit."""
        return len(self.flights) >= self.credit

    def welcome(self, response: wire.RunResponse) -> None:
        """Send the first message, before anything that was said meanwhile."""
        self.others.insert(0, response)
        self.has_news.set()

    def say(self, response: wire.RunResponse) -> None:
        """Send something that is not a step."""
        self.others.append(response)
        self.has_news.set()

    def beat(self, now: float) -> None:
        """A step was computed: say so now and then, if there is nothing else to say."""
        if self.flights and not self.pending and now - self.framed >= BEAT_SECONDS:
            self.beating = True
            self.has_news.set()

    def ack(self, frame: int) -> None:
        """The batcher has taken in all frames up to *frame*."""
        self.acked = max(self.acked, min(frame, self.frames))
        self.has_news.set()

    def news(self, now: float) -> list[wire.RunResponse]:
        """Everything that may be sent now, as few messages as it takes."""
        self.has_news.clear()
        responses, self.others = self.others, []
        full = self.window and self.frames - self.acked >= self.window
        if (self.pending or self.beating) and not full:
            self.frames += 1
            self.framed = now
            self.beating = False
            responses.append(
                wire.RunResponse(step=wire.Step(frame=self.frames, deltas=self.pending.values()))
            )
            self.pending = {}
        return responses


class Sessions:
    """All streams of one worker over one engine."""

    def __init__(self, engine: Engine, *, step_tokens: int, prefix_cache: bool) -> None:
        self.model: ModelInfo = engine.model
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._engine: EngineLoop[Key] = EngineLoop(
            engine, report=self._hear, step_tokens=step_tokens, prefix_cache=prefix_cache
        )
        self._sessions: dict[int, Session] = {}
        self._opened = 0
        self._rate = RateMeter()
        self._last: StepReport[Key] = StepReport(kv_tokens_free=self.model.kv_tokens)
        self._step_tokens = max(step_tokens, engine.model.max_running)
        self._step_mean = 0.0
        self._prefill_rate = 0.0
        self._mean_prompt = 0.0
        self._engine.start()

    @property
    def live(self) -> int:
        """Sequences under way, over all streams."""
        return sum(len(session.flights) for session in self._sessions.values())

    @property
    def unsent(self) -> bool:
        """Whether a stream's writer has news to send or is sending them."""
        return any(
            session.pending or session.others or session.sending for session in self._sessions.values()
        )

    def close(self) -> None:
        """Stop the engine's thread; blocks until its step is over."""
        self._engine.stop()

    def open(self, *, batcher_id: str = "", epoch: int = 0, window: int = 0) -> Session:
        """A new stream, with its first credit."""
        self._opened += 1
        session = Session(self._opened, batcher_id, epoch, window)
        self._sessions[session.number] = session
        self._share_credit()
        return session

    def shut(self, session: Session) -> None:
        """A stream is gone: so is everything of it."""
        del self._sessions[session.number]
        for handle in session.flights:
            self._engine.cancel((session.number, handle))
        self._share_credit()

    @property
    def streams(self) -> list[Session]:
        """The batchers' streams."""
        return list(self._sessions.values())

    def submit(self, session: Session, batch: wire.Submit) -> wire.RunResponse:
        """Take a batch in; returns the admission to send before anything else of these sequences."""
        now, now_ns = time.monotonic(), time.time_ns()
        batch_span = _span_context(batch.batch_trace)
        busy = self._last.waiting > 0 or self._last.running >= self.model.max_running
        verdicts = []
        for message in batch.sequences:
            verdict = wire.Verdict(handle=message.handle, attempt=message.attempt)
            verdicts.append(verdict)
            try:
                sequence = self._sequence(session, message, now)
            except errors.HeadraceError as error:
                verdict.state = wire.ADMISSION_STATE_REFUSED
                verdict.error.CopyFrom(errors.to_status(error))
                continue
            verdict.state = wire.ADMISSION_STATE_QUEUED if busy else wire.ADMISSION_STATE_ADMITTED
            session.flights[message.handle] = Flight(
                sequence,
                message.request_id,
                message.attempt,
                _span_context(message.trace),
                batch_span,
                now_ns,
            )
            length = len(sequence.ids)
            self._mean_prompt += 0.1 * (length - self._mean_prompt) if self._mean_prompt else length
            self._engine.submit(sequence)
        self._share_credit()
        return wire.RunResponse(admission=wire.Admission(verdicts=verdicts))

    def cancel(self, session: Session, handles: Iterable[int]) -> None:
        """Let sequences go; each is confirmed by its last delta."""
        for handle in handles:
            if handle in session.flights:
                self._engine.cancel((session.number, handle))

    def stop_admitting(self) -> None:
        """Refuse what comes from now on, and say that there is no credit."""
        self.draining = True
        self._share_credit()

    def hand_back(self) -> None:
        """End everything under way, so that batchers carry on elsewhere."""
        for session in self._sessions.values():
            for handle, flight in session.flights.items():
                flight.cancelled_by = errors.WorkerDraining("the worker is stopping; carry on elsewhere")
                self._engine.cancel((session.number, handle))

    def announce(self, response: wire.RunResponse) -> None:
        """Say something on every stream."""
        for session in self._sessions.values():
            session.say(response)

    def load(self) -> wire.Load:
        """How busy the engine is."""
        last, now = self._last, time.monotonic()
        load = wire.Load(
            running=last.running,
            waiting=last.waiting,
            kv_tokens_total=self.model.kv_tokens,
            kv_tokens_free=last.kv_tokens_free,
            uncomputed_prompt_tokens=last.uncomputed_prompt_tokens,
            tokens_per_second=self._rate.per_second(now),
            prefill_tokens_per_second=self._prefill_rate,
        )
        load.step_time.FromNanoseconds(int(self._step_mean * 1e9))
        load.oldest_wait.FromNanoseconds(int(last.oldest_wait * 1e9))
        _rate.set(load.tokens_per_second)
        return load

    def _sequence(self, session: Session, message: wire.Sequence, now: float) -> LiveSequence[Key]:
        if self.draining:
            raise errors.WorkerDraining("the worker is stopping; carry on elsewhere")
        if message.handle in session.flights:
            raise errors.InvalidRequest(f"handle {message.handle} is in use")
        prompt, resume, sampling = message.prompt_ids, message.resume_ids, message.sampling
        if not prompt:
            raise errors.EmptyInput("the sequence has no prompt ids")
        if len(prompt) + len(resume) >= self.model.context_length:
            raise errors.ContextTooLong(
                f"{len(prompt)} prompt and {len(resume)} resumed tokens leave no room in a context of "
                f"{self.model.context_length}"
            )
        if max(prompt) >= self.model.vocabulary_size or max(resume, default=0) >= self.model.vocabulary_size:
            raise errors.InvalidRequest(f"a token id is not below {self.model.vocabulary_size}")
        if not sampling.HasField("max_tokens") or sampling.max_tokens <= len(resume):
            raise errors.InvalidSampling("sampling.max_tokens must be set and above the resumed tokens")
        return LiveSequence(
            key=(session.number, message.handle),
            ids=[*prompt, *resume],
            prompt=len(prompt),
            params=_params(sampling),
            expires=now + message.ttl.ToNanoseconds() / 1e9 if message.HasField("ttl") else None,
            submitted=now,
            resumed=len(resume),
            priority=min(message.priority, 9),
        )

    def _hear(self, report: StepReport[Key]) -> None:
        """On the engine's thread: pass the step on, once."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(self._deliver, report)

    def _deliver(self, report: StepReport[Key]) -> None:
        last, self._last = self._last, report
        now = time.monotonic()
        _kv_usage.set(1 - report.kv_tokens_free / self.model.kv_tokens)
        if report.cached_tokens > last.cached_tokens:
            _cached.add(report.cached_tokens - last.cached_tokens)
        if report.preemptions > last.preemptions:
            _preempted.add(report.preemptions - last.preemptions)
        _running.set(report.running)
        _waiting.set(report.waiting)
        if report.rows:
            _step_rows.record(report.rows)
            _step_seconds.record(report.seconds)
            self._step_mean += 0.1 * (report.seconds - self._step_mean)
            self._measure_prefill(report)
        new_tokens = sum(len(update.token_ids) for update in report.updates)
        if new_tokens:
            self._rate.add(now, new_tokens)
        for update in report.updates:
            self._deliver_one(update, report)
        if report.rows:
            for session in self._sessions.values():
                session.beat(now)
        if any(update.ending is not None for update in report.updates):
            self._share_credit()

    def _measure_prefill(self, report: StepReport[Key]) -> None:
        """How fast prompts are computed: only full steps say it, others say how fast at least."""
        prompts = report.tokens - report.rows  # a decode is one token of one row
        if prompts <= 0 or report.seconds <= 0:
            return
        rate = prompts / report.seconds
        if report.tokens >= self._step_tokens:
            self._prefill_rate += (0.1 if self._prefill_rate else 1.0) * (rate - self._prefill_rate)
        else:
            self._prefill_rate = max(self._prefill_rate, rate)

    def _share_credit(self) -> None:
        """Tell each stream what it may have here, where that has changed."""
        streams = list(self._sessions.values())
        if not streams:
            return
        room = capacity(
            max_running=self.model.max_running,
            running=self._last.running,
            waiting=self._last.waiting,
            step_tokens=self._step_tokens,
            mean_prompt=self._mean_prompt,
        )
        credits_ = share(
            0 if self.draining else room,
            [len(session.flights) for session in streams],
            [session.hungry for session in streams],
        )
        for session, credit in zip(streams, credits_, strict=True):
            if credit != session.credit:
                session.credit = credit
                session.generation += 1
                message = wire.Credit(generation=session.generation, sequences=credit)
                session.say(wire.RunResponse(credit=message))

    def _deliver_one(self, update: Update[Key], report: StepReport[Key]) -> None:
        number, handle = update.sequence.key
        session = self._sessions.get(number)
        if update.ending is not None:
            _ended.add(1, {attributes.OUTCOME: update.ending.value})
        if session is None:
            return  # its stream is gone, and this is the confirmation that the sequence is, too
        flight = session.flights[handle]
        delta = session.pending.get(handle)
        if delta is None:
            delta = wire.SequenceDelta(handle=handle, attempt=flight.attempt, offset=update.offset)
            session.pending[handle] = delta
        delta.token_ids.extend(update.token_ids)
        delta.logprobs.extend(update.logprobs)
        if update.token_ids and not flight.first_token_ns:
            flight.first_token_ns = report.ended
        if update.ending is not None:
            del session.flights[handle]
            self._conclude(delta, update, flight, report.ended or time.time_ns())
        session.has_news.set()

    @staticmethod
    def _conclude(delta: wire.SequenceDelta, update: Update[Key], flight: Flight, ended_ns: int) -> None:
        """Fill in a sequence's last delta, and tell its story as spans."""
        sequence, ending = update.sequence, update.ending
        assert ending is not None
        if ending is Ending.FAULT:
            delta.error.CopyFrom(errors.to_status(errors.SequenceFault(update.fault)))
        elif ending is Ending.CANCELLED and flight.cancelled_by is not None:
            delta.error.CopyFrom(errors.to_status(flight.cancelled_by))
        else:
            delta.finish = _FINISH[ending]
        delta.usage.prompt_tokens = sequence.prompt
        delta.usage.cached_tokens = min(sequence.cached, sequence.prompt)
        delta.usage.completion_tokens = sequence.answered
        delta.usage.replayed_tokens = sequence.resumed
        queue = (sequence.started if sequence.started is not None else time.monotonic()) - sequence.submitted
        delta.timing.queue.FromNanoseconds(int(queue * 1e9))
        if sequence.started is not None and sequence.first_token is not None:
            delta.timing.prefill.FromNanoseconds(int((sequence.first_token - sequence.started) * 1e9))
        if sequence.first_token is not None and sequence.last_token is not None:
            delta.timing.decode.FromNanoseconds(int((sequence.last_token - sequence.first_token) * 1e9))
        _tell(flight, sequence, ending, int(queue * 1e9), ended_ns)


def _tell(flight: Flight, sequence: LiveSequence[Key], ending: Ending, queue_ns: int, ended_ns: int) -> None:
    """The sequence's prefill and decode as spans: children of the request, linked to the batch."""
    context = trace.set_span_in_context(trace.NonRecordingSpan(flight.parent))
    links = [trace.Link(flight.batch)] if flight.batch.is_valid else []
    began = flight.submitted_ns + queue_ns
    if sequence.started is None:
        return
    prefill = _tracer.start_span(attributes.SPAN_PREFILL, context=context, links=links, start_time=began)
    prefill.set_attribute(attributes.GEN_AI_INPUT_TOKENS, sequence.prompt + sequence.resumed)
    prefill.set_attribute(attributes.GEN_AI_CACHE_READ_TOKENS, sequence.cached)
    if not flight.first_token_ns:
        prefill.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: ending.value}, timestamp=ended_ns)
        prefill.end(ended_ns)
        return
    prefill.add_event(attributes.EVENT_FIRST_TOKEN, timestamp=flight.first_token_ns)
    prefill.end(flight.first_token_ns)
    decode = _tracer.start_span(
        attributes.SPAN_DECODE, context=context, links=links, start_time=flight.first_token_ns
    )
    decode.set_attribute(attributes.GEN_AI_OUTPUT_TOKENS, sequence.answered - sequence.resumed)
    decode.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: ending.value}, timestamp=ended_ns)
    decode.end(ended_ns)


def _params(sampling: pb.Sampling) -> SamplingParams:
    """The engine's own form; what the contract calls the default where a field is absent."""
    given = {
        name: getattr(sampling, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
            "ignore_eos",
            "logprobs",
        )
        if sampling.HasField(name)
    }
    return SamplingParams(
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        logit_bias=dict(sampling.logit_bias),
        stop_ids=frozenset(sampling.stop_token_ids),
        **given,
    )


def _span_context(carried: wire.TraceContext) -> trace.SpanContext:
    if not carried.traceparent:
        return trace.INVALID_SPAN_CONTEXT
    context = propagate.extract({"traceparent": carried.traceparent, "tracestate": carried.tracestate})
    return trace.get_current_span(context).get_span_context()
