"""Turn the arrivals of one answer into response events, and record its metrics at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator

from google.protobuf import duration_pb2
from opentelemetry import metrics

from headrace import attributes
from headrace.batcher.inbox import Arrival, SequenceEnd
from headrace.batcher.job import Job
from headrace.batcher.text.detokenizer import Detokenizer, Piece, StopRules, TextStream, last_with_text
from headrace.batcher.text.tokens import Tokenizer, stop_ids
from headrace.v1 import generation_pb2 as pb

_meter = metrics.get_meter("headrace.batcher")
_requests = _meter.create_counter(attributes.METRIC_REQUESTS, description="requests, by outcome")
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

_MAX_IDS = 1024  # per delta: the backlog of a slow reader is sent in several, so that other calls can proceed


def record_unanswered(labels: dict[str, str], outcome: str, seconds: float) -> None:
    """Record a request that ended without an answer after *seconds*."""
    labels = {**labels, attributes.OUTCOME: outcome}
    _requests.add(1, labels)
    _duration.record(seconds, labels)


class AnswerEvents:
    """Produces the response events of one answer.

    Raises InvalidSampling for stop texts that it could not find.
    """

    def __init__(
        self, job: Job, request: pb.GenerateRequest, tokenizer: Tokenizer, labels: dict[str, str]
    ) -> None:
        self._job = job
        self._labels = labels
        self._with_ids = request.stream.include_token_ids
        sampling = job.sampling
        stops = StopRules(
            tuple(sampling.stop),
            stop_ids(tokenizer, sampling.stop),
            min(sampling.min_tokens, sampling.max_tokens),
        )
        # The answer follows the prompt's last token: at the start of a text, some tokenizers leave out a
        # space.
        before = last_with_text(tokenizer, job.prompt_ids)
        self._text = TextStream(Detokenizer(tokenizer, before), stops)
        self._offset = len(job.resume_ids)
        self._first: float | None = None
        self._first_tokens = 0  # that arrived together with the first
        self._last: float | None = None
        self._end: SequenceEnd | None = None
        self.done = False
        self.outcome = "unfinished"
        self._replayed = Piece("", 0)

    def replay(self) -> None:
        """Decode the tokens that came with the request. Slow for many tokens: call it off the event loop."""
        self._replayed = self._text.feed(self._job.resume_ids)

    @property
    def already_complete(self) -> bool:
        """Whether the tokens that came with the request leave nothing to generate."""
        return self._replayed.stopped is not None or self._offset >= self._job.sampling.max_tokens

    def events_for(self, arrival: Arrival) -> Iterator[pb.GenerateResponse]:
        """Yield the events for an arrival."""
        ids, end = arrival.ids, arrival.end
        if (change := arrival.change) is not None:
            route = pb.RouteChange(
                to=change.target, reason=change.reason, attempt=change.attempt, **{"from": change.origin}
            )
            yield pb.GenerateResponse(route_change=route)
        if ids:
            self._last = time.monotonic()
            if self._first is None:
                self._first = self._last
                self._first_tokens = len(ids)
                if self._job.span.is_recording():
                    self._job.span.add_event(attributes.EVENT_FIRST_TOKEN)
        used, stopped = 0, None
        while used < len(ids) and stopped is None:
            text, count, stopped = self._text.feed(ids[used : used + _MAX_IDS])
            yield self._delta(arrival, used, used + count, text)
            used += count
        if stopped is not None or end is not None:
            self._end = end
            yield from self.final_events(stopped, wasted=len(ids) - used)

    def final_events(self, stopped: str | None = None, *, wasted: int = 0) -> Iterator[pb.GenerateResponse]:
        """Yield the last events: the text that was held back, if any, and the finish.

        The held-back text comes in a delta without tokens. So the text of the deltas before depends on their
        tokens alone, and a caller that resumes after these tokens neither misses nor repeats text.
        """
        stopped = stopped if stopped is not None else self._replayed.stopped
        last = self._text.flush() if stopped is None else Piece("", 0)
        if last.text:
            yield self._delta(Arrival([], [], None), 0, 0, last.text)
        yield self._finish(stopped if stopped is not None else last.stopped, wasted)

    def _finish(self, stopped: str | None, wasted: int) -> pb.GenerateResponse:
        self.done = True
        job, now = self._job, time.monotonic()
        response = pb.GenerateResponse()
        finish = response.finish
        if stopped is not None:
            finish.reason = pb.FINISH_REASON_STOP_SEQUENCE
            finish.stop_sequence = stopped
        else:
            finish.reason = self._end.reason if self._end is not None else pb.FINISH_REASON_LENGTH
        usage, history = finish.usage, job.history
        usage.prompt_tokens = len(job.prompt_ids)
        usage.cached_tokens = history.cached
        usage.completion_tokens = self._offset
        usage.replayed_tokens = history.replayed or len(job.resume_ids)
        usage.wasted_tokens = history.wasted + wasted
        timing = finish.timing
        if self._end is not None:
            timing.prefill.CopyFrom(self._end.timing.prefill)
        if job.submitted is not None:
            _set_seconds(timing.queue, job.submitted - job.arrived)
        if self._first is not None and self._last is not None:
            _set_seconds(timing.first_token, self._first - job.arrived)
            _set_seconds(timing.decode, self._last - self._first)
        _set_seconds(timing.total, now - job.arrived)
        self.outcome = _OUTCOMES[finish.reason]
        return response

    def record(self, outcome: str) -> None:
        """Record the request in metrics and on its span, however it ended."""
        job, now = self._job, time.monotonic()
        labels = {**self._labels, attributes.OUTCOME: outcome}
        # Tokens that came with the request were generated earlier, in an unknown time.
        new_tokens = self._offset - len(job.resume_ids)
        _requests.add(1, labels)
        _tokens.add(new_tokens, self._labels)
        _duration.record(now - job.arrived, labels)
        if self._first is not None and self._last is not None:
            if not job.resume_ids:
                _ttft.record(self._first - job.arrived, self._labels)
            if (later := new_tokens - self._first_tokens) > 0:
                _tpot.record((self._last - self._first) / later, self._labels)
        if job.span.is_recording():
            job.span.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: outcome})
            job.span.set_attribute(attributes.GEN_AI_OUTPUT_TOKENS, self._offset)
            if self.done:
                job.span.set_attribute(attributes.GEN_AI_FINISH_REASONS, [self.outcome])

    def _delta(self, arrival: Arrival, start: int, stop: int, text: str) -> pb.GenerateResponse:
        # Set field by field: a message that is passed to a constructor is copied.
        response = pb.GenerateResponse()
        delta = response.delta
        delta.offset = self._offset
        delta.token_count = stop - start
        delta.text = text
        if arrival.logprobs:
            delta.logprobs.extend(arrival.logprobs[start:stop])
        if self._with_ids:
            delta.token_ids.extend(arrival.ids[start:stop])
        self._offset += stop - start
        return response


# Such as "length".
_OUTCOMES = {reason: name.removeprefix("FINISH_REASON_").lower() for name, reason in pb.FinishReason.items()}


def _set_seconds(duration: duration_pb2.Duration, seconds: float) -> None:
    duration.seconds, duration.nanos = divmod(int(seconds * 1e9), 1_000_000_000)
