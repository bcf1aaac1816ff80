"""Turn the arrivals of one answer into response events, and record its metrics at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from google.protobuf import duration_pb2

from headrace import attributes, errors
from headrace.batcher.inbox import Arrival, InboxEvent, SequenceEnd, WorkerChange
from headrace.batcher.job import Job
from headrace.batcher.text.detokenizer import Detokenizer, Piece, StopRules, TextStream, last_with_text
from headrace.batcher.text.token_texts import Spellings, TokenDescriber
from headrace.batcher.text.tokens import Tokenizer, stop_ids
from headrace.batcher.token_details import Score, TokenScores, tokens_per_event
from headrace.batcher.tools.parts import AnswerParts, has_content
from headrace.metrics import catalogue
from headrace.metrics.requests import End, Timing, finish_name, record
from headrace.metrics.words import Outcome
from headrace.v1 import generation_pb2 as pb

# Tokens per delta: the backlog of a slow reader is sent in several, so that other calls can proceed.
_MAX_IDS = 1024


# Why tokens that no caller received were wasted, by how the request ended.
_WASTE_CAUSES: dict[Outcome, str] = {"ok": "over_generation", "cancelled": "cancel", "deadline": "deadline"}


class AnswerEvents:
    """Produces the response events of one answer.

    spellings   those of *tokenizer*, if several answers share them

    Raises InvalidSampling for stop texts that it could not find.
    """

    def __init__(
        self,
        job: Job,
        request: pb.GenerateRequest,
        tokenizer: Tokenizer,
        *,
        tier: str,
        spellings: Spellings | None = None,
    ) -> None:
        self._job = job
        self._tier = tier
        self._chat = request.HasField("chat")
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
        self._detokenizer = Detokenizer(tokenizer, before)
        self._text = TextStream(self._detokenizer, stops, job.form.marker_texts)
        self._parts: AnswerParts | None = None
        if job.form.has_parts:
            self._parts = AnswerParts(job.form, sampling.seed, job.prompt_ids)
        spellings = spellings or Spellings(tokenizer)
        asked = request.sampling
        self._with_logprobs = asked.logprobs
        self._max_ids = _MAX_IDS
        self._describer: TokenDescriber | None = None
        if asked.HasField("top_logprobs"):
            self._max_ids = tokens_per_event(asked.top_logprobs)
            self._describer = TokenDescriber(spellings, before)
        self._prompt_describer = TokenDescriber(spellings, None)
        self._offset = len(job.resume_ids)
        self._timing = Timing(job.arrived)
        self._end: SequenceEnd | None = None
        self.done = False
        self.finish = ""
        self._replayed = Piece("", 0)

    def replay(self) -> None:
        """Decode the tokens that came with the request. Slow for many tokens: call it off the event loop."""
        self._replayed = self._text.feed(self._job.resume_ids)
        if self._parts is not None:
            self._parts.feed(self._replayed.text)
        if self._describer is not None:
            self._describer.after = self._detokenizer.after

    @property
    def already_complete(self) -> bool:
        """Whether the tokens that came with the request leave nothing to generate."""
        return self._replayed.stopped is not None or self._offset >= self._job.sampling.max_tokens

    def events_for(self, arrival: Arrival) -> Iterator[pb.GenerateResponse]:
        """Yield the events for an arrival."""
        ids, end = arrival.ids, arrival.end
        if arrival.event is not None:
            yield self._between_tokens(arrival.event)
        if ids:
            if self._timing.first is None and self._job.span.is_recording():
                self._job.span.add_event(attributes.EVENT_FIRST_TOKEN)
            self._timing.add(len(ids), time.monotonic())
        used, stopped = 0, None
        while used < len(ids) and stopped is None:
            text, count, stopped = self._text.feed(ids[used : used + self._max_ids])
            yield self._delta(arrival, used, used + count, text)
            used += count
        if stopped is not None or end is not None:
            self._end = end
            yield from self.final_events(stopped, wasted=len(ids) - used)

    def takes_now(self, ids: Sequence[int]) -> bool:
        """Whether `delta_for` may be called with *ids*: they are one event, and cannot end the answer."""
        return self._text.only_decodes and len(ids) <= self._max_ids

    def delta_for(self, ids: list[int], scores: Sequence[Score]) -> pb.GenerateResponse:
        """Return the event for tokens after the first."""
        self._timing.add(len(ids), time.monotonic())
        return self._delta(Arrival(ids, scores, None), 0, len(ids), self._text.feed(ids).text)

    def _between_tokens(self, event: InboxEvent) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        if isinstance(event, WorkerChange):
            response.route_change.CopyFrom(
                pb.RouteChange(
                    to=event.target, reason=event.reason, attempt=event.attempt, **{"from": event.origin}
                )
            )
            return response
        described, ids = response.prompt_tokens, self._job.prompt_ids
        describe, add = self._prompt_describer.describe, described.tokens.add
        described.offset = at = event.offset
        if at == 1:  # token 0 has no log-probability, and comes with the first part
            described.offset = 0
            describe(add(), ids[0], None, (), ())
        for place, logprob in enumerate(event.logprobs):
            if event.top:
                top = event.top[place]
                describe(add(), ids[at + place], logprob, top.ids, top.logprobs)
            else:
                describe(add(), ids[at + place], logprob, (), ())
        return response

    def final_events(self, stopped: str | None = None, *, wasted: int = 0) -> Iterator[pb.GenerateResponse]:
        """Yield the last events: the text that was held back, if any, and the finish.

        The held-back text comes in a delta without tokens. So the text of the deltas before depends on their
        tokens alone, and a caller that resumes after these tokens neither misses nor repeats text.
        """
        stopped = stopped if stopped is not None else self._replayed.stopped
        last = self._text.flush() if stopped is None else Piece("", 0)
        if last.text or (self._parts is not None and self._parts.holds_text):
            event = self._delta(Arrival([], [], None), 0, 0, last.text, final=True)
            if self._parts is None or has_content(event.delta):
                yield event
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
        if (first := self._timing.first) is not None and (last := self._timing.last) is not None:
            _set_seconds(timing.first_token, first - job.arrived)
            _set_seconds(timing.decode, last - first)
        _set_seconds(timing.total, now - job.arrived)
        self.finish = finish_name(finish.reason)
        return response

    def record(self, end: End) -> None:
        """Record the request in metrics and on its span, however it ended."""
        job, timing = self._job, self._timing
        # Tokens that came with the request were generated earlier, in an unknown time.
        timing.tokens = self._offset - len(job.resume_ids)
        record(
            end,
            timing,
            time.monotonic(),
            tier=self._tier,
            model=job.model,
            chat=self._chat,
            resumed=bool(job.resume_ids),
        )
        cause = _WASTE_CAUSES.get(end.outcome, "failover")
        job.history.waste_cause = "slow_reader" if end.error == errors.SlowReader.reason else cause
        if undelivered := len(job.generated) - timing.tokens:
            catalogue.WASTED_TOKENS.of(tier=self._tier, cause=job.history.waste_cause).add(undelivered)
        if job.span.is_recording():
            job.span.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: end.outcome})
            job.span.set_attribute(attributes.GEN_AI_OUTPUT_TOKENS, self._offset)
            if end.finish:
                job.span.set_attribute(attributes.GEN_AI_FINISH_REASONS, [end.finish])

    def _delta(
        self, arrival: Arrival, start: int, stop: int, text: str, *, final: bool = False
    ) -> pb.GenerateResponse:
        # Set field by field: a message that is passed to a constructor is copied.
        response = pb.GenerateResponse()
        delta = response.delta
        delta.offset = self._offset
        delta.token_count = stop - start
        if self._parts is None:
            delta.text = text
        else:
            self._parts.fill(delta, text, final=final)
        if arrival.scores:
            if self._describer is None:
                delta.logprobs.extend(arrival.scores[start:stop])  # type: ignore[arg-type] # floats then
            else:
                self._describe(delta, self._describer, arrival, start, stop)
        if self._with_ids:
            delta.token_ids.extend(arrival.ids[start:stop])
        self._offset += stop - start
        return response

    def _describe(
        self, delta: pb.Delta, describer: TokenDescriber, arrival: Arrival, start: int, stop: int
    ) -> None:
        ids, scores = arrival.ids[start:stop], arrival.scores[start:stop]
        logprobs = [score.logprob if isinstance(score, TokenScores) else score for score in scores]
        if self._with_logprobs:
            delta.logprobs.extend(logprobs)
        describe, add = describer.describe, delta.tokens.add
        for id, logprob, score in zip(ids, logprobs, scores, strict=True):
            if isinstance(score, TokenScores):
                describe(add(), id, logprob, score.top_ids, score.top_logprobs)
            else:
                describe(add(), id, logprob, (), ())


def _set_seconds(duration: duration_pb2.Duration, seconds: float) -> None:
    duration.seconds, duration.nanos = divmod(int(seconds * 1e9), 1_000_000_000)
