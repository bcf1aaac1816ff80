"""Join engine and streams: sequences of many batchers in, each batcher's part of every step out.

The engine runs on its thread and reports once a step; here, on the event loop, a report is split into
one frame per stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable

from opentelemetry import metrics

from headrace import attributes, errors
from headrace.runtime.rate import RateMeter
from headrace.v1 import worker_service_pb2 as wire
from headrace.validation import MAX_REQUEST_ID
from headrace.worker.credit import capacity, share
from headrace.worker.engine.interface import Engine, ModelInfo
from headrace.worker.engine.plan.loop import EngineLoop, StepReport
from headrace.worker.engine.plan.scheduler import LiveSequence, Update
from headrace.worker.sequences import MAX_PRIORITY, conclude, live_sequence, relative_priority, span_context
from headrace.worker.step_pace import StepPace
from headrace.worker.stream import Flight, Key, Session

log = logging.getLogger(__name__)

# Sequences of one message that may be refused: they take no credit, and each of them an answer.
MOST_REFUSED = 64

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


class Sessions:
    """All streams of one worker over one engine.

    step_tokens, prefix_cache   as for `EngineLoop`
    max_streams                 most that are open at a time
    """

    def __init__(
        self, engine: Engine, *, step_tokens: int, prefix_cache: bool, max_streams: int = 32
    ) -> None:
        self.max_streams = max_streams
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
        self._ran = 0  # sequences that held memory while the last step was computed
        self._pace = StepPace(max(step_tokens, engine.model.max_running))
        self.shared_block_tokens = engine.model.block_tokens if prefix_cache else 0
        self._engine.start()

    @property
    def live(self) -> int:
        """Sequences under way, over all streams."""
        return sum(len(session.flights) for session in self._sessions.values())

    @property
    def capacity(self) -> int:
        """Sequences that should be here, over all streams."""
        return capacity(
            max_running=self.model.max_running,
            running=self._ran,
            waiting=self._last.waiting,
            step_tokens=self._pace.step_tokens,
            mean_prompt=self._pace.prompt_tokens,
        )

    @property
    def unsent(self) -> bool:
        """Whether a stream's writer has news to send or is sending them."""
        return any(
            session.pending or session.others or session.sending for session in self._sessions.values()
        )

    def close(self) -> None:
        """Stop the engine's thread; blocks until its step is over."""
        self._engine.stop()

    def open(self, hello: wire.Hello) -> Session:
        """A new stream, with its first credit.

        Where there are *max_streams* already, it takes the place of the one that has been idle the longest.
        Raises Overloaded where none is idle.
        """
        if len(self._sessions) >= self.max_streams:
            self._make_place()
        self._opened += 1
        session = Session(
            self._opened,
            clipped(hello.batcher_id),
            hello.epoch,
            hello.frame_window,
            acks_credit=hello.acks_credit,
        )
        self._sessions[session.number] = session
        self.share_credit()
        return session

    def _make_place(self) -> None:
        now = time.monotonic()
        idle = [
            session for session in self._sessions.values() if session.stands(now).idle and not session.held
        ]
        if not idle:
            raise errors.Overloaded(
                f"{len(self._sessions)} streams are open, and no more than {self.max_streams} are taken "
                "(--max-streams)",
                retry_after=1.0,
            )
        longest = min(idle, key=lambda session: session.submitted)
        longest.fail(
            errors.Overloaded("another batcher takes the place of this idle stream", retry_after=1.0)
        )
        self.shut(longest)

    def shut(self, session: Session) -> None:
        """A stream is gone: so is everything of it."""
        if self._sessions.pop(session.number, None) is None:
            return
        for handle in session.flights:
            self._engine.cancel((session.number, handle))
        self.share_credit()

    @property
    def streams(self) -> list[Session]:
        """The batchers' streams."""
        return list(self._sessions.values())

    def submit(self, session: Session, batch: wire.Submit) -> wire.RunResponse:
        """Take a batch in; returns the admission to send before anything else of these sequences.

        Raises InvalidRequest where the stream goes beyond its credit.
        """
        now, now_ns = time.monotonic(), time.time_ns()
        # Before anything is looked at: how much that would be is the batcher's choice.
        if len(batch.sequences) > session.allowance + MOST_REFUSED:
            raise _beyond(session, len(batch.sequences))
        session.submitted = now
        batch_span = span_context(batch.batch_trace)
        busy = self._last.waiting > 0 or self._last.running >= self.model.max_running
        verdicts = []
        for message in batch.sequences:
            verdict = wire.Verdict(handle=message.handle, attempt=message.attempt)
            verdicts.append(verdict)
            try:
                sequence = self._sequence(session, message, now)
            except Exception as error:
                verdict.state = wire.ADMISSION_STATE_REFUSED
                verdict.error.CopyFrom(errors.to_status(_ours(error)))
                continue
            if session.held >= session.allowance:
                raise _beyond(session, len(batch.sequences))
            verdict.state = wire.ADMISSION_STATE_QUEUED if busy else wire.ADMISSION_STATE_ADMITTED
            session.flights[message.handle] = Flight(
                sequence,
                clipped(message.request_id),
                message.attempt,
                span_context(message.trace),
                batch_span,
                now_ns,
                message.priority,
            )
            self._pace.submitted(len(sequence.ids))
            self._engine.submit(sequence)
        self.share_credit()
        return wire.RunResponse(admission=wire.Admission(verdicts=verdicts))

    def cancel(self, session: Session, handles: Iterable[int]) -> None:
        """Let sequences go; each is confirmed by its last delta."""
        for handle in handles:
            if handle in session.flights:
                self._engine.cancel((session.number, handle))

    def acknowledge(self, session: Session, ack: wire.Ack) -> None:
        """Book what a batcher has taken in: frames, and what it may have here."""
        session.ack(ack.frame)
        if session.saw_credit(ack.credit_generation):
            self.share_credit()

    def stop_admitting(self) -> None:
        """Refuse what comes from now on, and say that there is no credit."""
        self.draining = True
        self.share_credit()

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
            prefill_tokens_per_second=self._pace.prefill,
        )
        load.step_time.FromNanoseconds(int(self._pace.seconds * 1e9))
        load.oldest_wait.FromNanoseconds(int(last.oldest_wait * 1e9))
        _rate.set(load.tokens_per_second)
        return load

    def _sequence(self, session: Session, message: wire.Sequence, now: float) -> LiveSequence[Key]:
        if self.draining:
            raise errors.WorkerDraining("the worker is stopping; carry on elsewhere")
        if session.knows(message.handle):
            raise errors.InvalidRequest(f"handle {message.handle} is in use")
        priority: float = min(message.priority, MAX_PRIORITY)
        if any(other.flights for other in self._sessions.values() if other is not session):
            priority = relative_priority(
                message.priority, [flight.priority for flight in session.flights.values()]
            )
        return live_sequence((session.number, message.handle), message, self.model, now, priority=priority)

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
            self._pace.stepped(
                tokens=report.tokens,
                # Whose first token it is computed a prompt for it.
                decodes=sum(update.offset > update.sequence.resumed for update in report.updates),
                seconds=report.seconds,
            )
        new_tokens = sum(len(update.token_ids) for update in report.updates)
        if new_tokens:
            self._rate.add(now, new_tokens)
        for update in report.updates:
            self._deliver_one(update, report)
        if report.rows:
            for session in self._sessions.values():
                session.beat(now)
        ended = sum(update.ending is not None for update in report.updates)
        self._ran = report.running + ended
        if ended:
            self.share_credit()

    def share_credit(self) -> None:
        """Tell each stream what it may have here, where that has changed."""
        now, streams = time.monotonic(), self.streams
        if self.draining:
            credits_ = [0] * len(streams)
        else:
            credits_ = share(self.capacity, [session.stands(now) for session in streams])
        for session, credit in zip(streams, credits_, strict=True):
            session.grant(credit)

    def _deliver_one(self, update: Update[Key], report: StepReport[Key]) -> None:
        number, handle = update.sequence.key
        session = self._sessions.get(number)
        if update.ending is not None:
            _ended.add(1, {attributes.OUTCOME: update.ending.value})
        if session is None:
            return  # its stream is gone, and this is the confirmation that the sequence is, too
        try:
            session.tell(self._delta(session, handle, update, report))
        except Exception as error:
            # A stream that misses a delta would wait for ever.
            session.fail(_ours(error))

    def _delta(
        self, session: Session, handle: int, update: Update[Key], report: StepReport[Key]
    ) -> wire.SequenceDelta:
        flight = session.flights[handle]
        delta = wire.SequenceDelta(
            handle=handle,
            attempt=flight.attempt,
            offset=update.offset,
            token_ids=update.token_ids,
            logprobs=update.logprobs,
        )
        if update.token_ids and not flight.first_token_ns:
            flight.first_token_ns = report.ended
            delta.cached_tokens = update.sequence.cached
        if update.ending is not None:
            del session.flights[handle]
            conclude(delta, update, flight, report.ended or time.time_ns())
        return delta


def _beyond(session: Session, submitted: int) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"{submitted} sequences were submitted while {session.held} were here, beyond the credit of "
        f"{session.allowance}",
        field="submit",
    )


def clipped(text: str) -> str:
    """A name that a batcher chose, as long as names are."""
    return text[:MAX_REQUEST_ID]


def _ours(error: Exception) -> errors.HeadraceError:
    """The error as a batcher may see it; anything unexpected goes to the log in full."""
    if isinstance(error, errors.HeadraceError):
        return error
    log.error("unexpected error", exc_info=error)
    return errors.InternalError("internal error; the worker's log has it in full")
