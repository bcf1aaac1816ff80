"""Join the batchers' streams with the runner: sequences of all streams in, each stream's part of a step out.

The runner reports each step from its own thread. Here, on the event loop, a report is split into one frame
per stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from headrace import errors, statuses
from headrace.quoting import clipped
from headrace.runtime.rate import RateMeter
from headrace.v1 import worker_service_pb2 as wire
from headrace.validation import MAX_REQUEST_ID
from headrace.worker.engine_metrics import EngineMetrics
from headrace.worker.flow.credit import capacity, share
from headrace.worker.flow.delivery import Delivery
from headrace.worker.flow.step_pace import StepPace
from headrace.worker.runner import ModelInfo, Runner, SequenceSpec, StepReport
from headrace.worker.sequences import (
    MAX_PRIORITY,
    InFlightSequence,
    SequenceKey,
    relative_priority,
    sequence_spec,
    span_context,
)
from headrace.worker.stream import BatcherStream

log = logging.getLogger(__name__)

# Most sequences of one message beyond the credit, all of which must be refused: a refused sequence takes no
# credit, but each gets a verdict.
MOST_REFUSED = 64


class BatcherStreams:
    """All batchers' streams of one worker, over one runner. Iterates over the open streams.

    max_streams        most streams that are open at a time
    tier               that it works for, for metrics
    delivery_seconds   for which tokens wait, at most, for those of further steps; see `Delivery`
    """

    def __init__(
        self,
        runner: Runner[SequenceKey],
        *,
        max_streams: int = 32,
        tier: str = "default",
        delivery_seconds: float = 0.0,
    ) -> None:
        self.max_streams = max_streams
        self.model: ModelInfo = runner.model
        self.shared_block_tokens = runner.shared_block_tokens
        self.draining = False
        self._runner = runner
        self._streams: dict[int, BatcherStream] = {}
        self._opened = 0
        self._rate = RateMeter()
        self._last: StepReport[SequenceKey] = StepReport(kv_tokens_free=self.model.kv_tokens)
        self._ran = 0  # sequences that had KV memory during the last step
        self._pace = StepPace(runner.step_tokens)
        self._metrics = EngineMetrics(self.model, tier)
        self._delivery = Delivery(delivery_seconds, self._deliver)
        runner.start(self._delivery.add)

    def __iter__(self) -> Iterator[BatcherStream]:
        return iter(self._streams.values())

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def in_flight(self) -> int:
        """Number of in-flight sequences, over all streams."""
        return sum(len(stream.in_flight) for stream in self)

    @property
    def capacity(self) -> int:
        """Number of sequences that this worker should have, over all streams."""
        return capacity(
            max_running=self.model.max_running,
            running=self._ran,
            waiting=self._last.waiting,
            step_tokens=self.step_tokens,
            mean_prompt=self._pace.prompt_tokens,
        )

    @property
    def step_tokens(self) -> int:
        """The most tokens that one step computes."""
        return self._pace.step_tokens

    @property
    def unsent(self) -> bool:
        """Whether any stream has messages that are unsent or being sent."""
        return any(stream.has_unfinished_output for stream in self)

    def stop(self) -> None:
        """Stop the runner; blocks until its step has ended."""
        self._runner.stop()

    def open(self, hello: wire.Hello) -> BatcherStream:
        """Open a stream and grant its first credit.

        If *max_streams* are open, the stream that has been idle the longest is closed. Raises Overloaded if
        none is idle.
        """
        if len(self._streams) >= self.max_streams:
            self._close_idle()
        self._opened += 1
        stream = BatcherStream(
            self._opened,
            clipped(hello.batcher_id, MAX_REQUEST_ID),
            hello.epoch,
            hello.frame_window,
            acks_credit=hello.acks_credit,
        )
        self._streams[stream.number] = stream
        self.share_credit()
        return stream

    def _close_idle(self) -> None:
        now = time.monotonic()
        idle = [stream for stream in self if stream.credit_state(now).idle and not stream.held]
        if not idle:
            raise errors.Overloaded(
                f"{len(self._streams)} streams are open, the most that are allowed (--max-batcher-streams)",
                retry_after=1.0,
            )
        longest = min(idle, key=lambda stream: stream.last_submitted)
        longest.fail(
            errors.Overloaded("this idle stream is closed in favor of another batcher's", retry_after=1.0)
        )
        self.close(longest)

    def close(self, stream: BatcherStream) -> None:
        """Remove a stream and cancel its sequences."""
        if self._streams.pop(stream.number, None) is None:
            return
        self._runner.cancel(*((stream.number, handle) for handle in stream.in_flight))
        self.share_credit()
        if not self._streams:
            self._metrics.rate.set(0)  # nobody is left to ask for it

    def submit(self, stream: BatcherStream, batch: wire.Submit) -> wire.RunResponse:
        """Submit a batch. Returns the admission, to be sent before anything else about its sequences.

        Raises InvalidRequest if the stream exceeds its credit.
        """
        now, now_ns, limit = time.monotonic(), time.time_ns(), stream.credit_limit
        # Checked before the sequences are read, because the batcher chooses how many there are.
        if len(batch.sequences) > limit + MOST_REFUSED:
            raise _credit_exceeded(stream, len(batch.sequences))
        stream.last_submitted = now
        batch_span = span_context(batch.batch_trace)
        relative = any(other.in_flight for other in self if other is not stream)
        busy = self._last.waiting > 0 or self._last.running >= self.model.max_running
        verdicts, specs = [], []
        for message in batch.sequences:
            verdict = wire.Verdict(handle=message.handle, attempt=message.attempt)
            verdicts.append(verdict)
            try:
                spec = self._spec(stream, message, now, relative=relative)
                stream.check_room(spec)
            except Exception as error:
                verdict.state = wire.ADMISSION_STATE_REFUSED
                verdict.error.CopyFrom(statuses.to_status(_public(error)))
                continue
            if stream.held >= limit:
                raise _credit_exceeded(stream, len(batch.sequences))
            verdict.state = wire.ADMISSION_STATE_QUEUED if busy else wire.ADMISSION_STATE_ADMITTED
            sequence = InFlightSequence(
                spec,
                request_id=clipped(message.request_id, MAX_REQUEST_ID),
                attempt=message.attempt,
                parent=span_context(message.trace),
                batch=batch_span,
                submitted_ns=now_ns,
                answered=spec.resumed,
                priority=min(message.priority, MAX_PRIORITY),
                each_step=message.each_step,
            )
            stream.add_sequence(message.handle, sequence)
            self._pace.record_submission(len(spec.ids))
            specs.append(spec)
        self._choose_delivery()
        self._runner.submit(*specs)
        self.share_credit()
        return wire.RunResponse(admission=wire.Admission(verdicts=verdicts))

    def cancel(self, stream: BatcherStream, handles: Iterable[int]) -> None:
        """Cancel sequences; the last delta of each confirms it."""
        self._runner.cancel(*((stream.number, handle) for handle in handles if handle in stream.in_flight))

    def acknowledge(self, stream: BatcherStream, ack: wire.Ack) -> None:
        """Record what a batcher has processed: frames, and grants of credit."""
        stream.acknowledge_frames(ack.frame)
        if stream.acknowledge_credit(ack.credit_generation):
            self.share_credit()

    def stop_admitting(self) -> None:
        """Refuse all new sequences, and withdraw all credit."""
        self.draining = True
        self.share_credit()

    def hand_off(self) -> None:
        """End all in-flight sequences, so that batchers resume them on other workers."""
        for stream in self:
            for sequence in stream.in_flight.values():
                sequence.cancelled_by = errors.WorkerDraining(
                    "the worker is stopping; resume on another worker"
                )
            self.cancel(stream, stream.in_flight)

    def broadcast(self, response: wire.RunResponse) -> None:
        """Send a message on every stream."""
        for stream in self:
            stream.send(response)

    def load(self) -> wire.Load:
        """Return the current load of the engine."""
        last, now = self._last, time.monotonic()
        load = wire.Load(
            running=last.running,
            waiting=last.waiting,
            kv_tokens_total=self.model.kv_tokens,
            kv_tokens_free=last.kv_tokens_free,
            uncomputed_prompt_tokens=last.uncomputed_prompt_tokens,
            tokens_per_second=self._rate.per_second(now),
            prefill_tokens_per_second=self._pace.prefill_rate,
        )
        load.step_time.FromNanoseconds(int(self._pace.seconds * 1e9))
        load.oldest_wait.FromNanoseconds(int(last.oldest_wait * 1e9))
        self._metrics.rate.set(load.tokens_per_second)
        return load

    def share_credit(self) -> None:
        """Share credit among the streams, and send it where it has changed."""
        now, streams = time.monotonic(), list(self)
        if self.draining:
            credits_ = [0] * len(streams)
        else:
            credits_ = share(self.capacity, [stream.credit_state(now) for stream in streams])
        for stream, credit in zip(streams, credits_, strict=True):
            stream.grant(credit)

    def _spec(
        self, stream: BatcherStream, message: wire.Sequence, now: float, *, relative: bool
    ) -> SequenceSpec[SequenceKey]:
        if self.draining:
            raise errors.WorkerDraining("the worker is stopping; use another worker")
        if stream.in_use(message.handle):
            raise errors.InvalidRequest(f"handle {message.handle} is in use")
        priority: float = min(message.priority, MAX_PRIORITY)
        if relative:
            priority = relative_priority(message.priority, len(stream.in_flight), stream.priorities)
        return sequence_spec((stream.number, message.handle), message, self.model, now, priority=priority)

    def _deliver(self, reports: Sequence[StepReport[SequenceKey]]) -> None:
        """Hand on reports: a sequence's tokens of several steps become one delta."""
        now, tokens, ended = time.monotonic(), 0, 0
        for report in reports:
            before = ended
            for update in report.updates:
                tokens += len(update.token_ids)
                if update.finish is not None:
                    ended += 1
                    self._metrics.record_end(update.finish)
                stream = self._streams.get(update.key[0])
                if stream is None:
                    continue  # it was closed, which cancelled the sequence
                try:
                    stream.add_update(update, report.ended)
                except Exception as error:
                    # A batcher that misses a delta would wait forever.
                    stream.fail(_public(error))
            self._ran = report.running + ended - before
        self._choose_delivery()
        stepped = any(report.rows for report in reports)
        for stream in self:
            stream.announce(now, stepped=stepped)
        self._measure(reports, tokens, now)
        if ended:
            self.share_credit()

    def _choose_delivery(self) -> None:
        """Let no report wait while a sequence is to be sent after each step."""
        self._delivery.waits = not any(stream.each_step for stream in self)

    def _measure(self, reports: Sequence[StepReport[SequenceKey]], tokens: int, now: float) -> None:
        """Record reports that have *tokens* new tokens together."""
        last, self._last = self._last, reports[-1]
        self._metrics.record(reports, last, tokens)
        for report in reports:
            if report.rows:
                self._pace.record_step(tokens=report.tokens, decodes=report.decodes, seconds=report.seconds)
        if tokens:
            self._rate.add(now, tokens)


def _credit_exceeded(stream: BatcherStream, submitted: int) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"{submitted} sequences were submitted while {stream.held} were here, beyond the credit of "
        f"{stream.credit_limit}",
        field="submit",
    )


def _public(error: Exception) -> errors.HeadraceError:
    """Return the error as a batcher may see it; an unexpected one is logged in full."""
    if isinstance(error, errors.HeadraceError):
        return error
    log.error("unexpected error", exc_info=error)
    return errors.InternalError("internal error; see the worker's log")
