"""Answer one request by the upstream, from its check to its last event, and record its outcome.

`limits` decides when it may be sent, `asking` sends it, and this module passes the answer on as it arrives.
Nothing is read from the upstream while the caller does not read: the connections then hold the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field

from opentelemetry import trace

from headrace import attributes, errors
from headrace.deadline import Deadline, response_deadline
from headrace.flushing import Flusher, LiveFlushing, chosen_flusher
from headrace.metrics import upstream as metrics
from headrace.metrics.requests import CANCELLED, End, Timing, finish_name, record
from headrace.multiplex.serving import Incoming, Write
from headrace.runtime.rate import RateMeter
from headrace.upstream.api.requests import most_tokens
from headrace.upstream.api.terms import Terms
from headrace.upstream.asking import Asking
from headrace.upstream.attempt import Begun
from headrace.upstream.call import Call, call_for
from headrace.upstream.gathering import Gathering
from headrace.upstream.limits.per_minute import PerMinute, Taken, prompt_tokens
from headrace.upstream.limits.slots import Slots
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

LONG_BYTES = 64 * 1024  # a longer request is translated on a thread


@dataclass(slots=True, eq=False)
class LiveAnswer:
    """A request in flight.

    url      that answers; empty while none does
    tokens   that were received, as an estimate
    sent     when it got its slot, time.monotonic(); None: it waits
    used     tokens that the upstream has counted for prompt and answer; None: unknown
    """

    request: pb.GenerateRequest
    timing: Timing
    url: str = ""
    tokens: int = 0
    sent: float | None = None
    accepted: bool = False
    finish: pb.Finish | None = None
    used: int | None = None
    span: trace.Span = field(default_factory=trace.get_current_span)


class Answering:
    """Answers the requests of one tier.

    live                  requests in flight
    rate                  tokens that arrive from the upstream
    max_unread_seconds    how long the caller may leave an event unread
    """

    def __init__(
        self,
        asking: Asking,
        slots: Slots,
        per_minute: PerMinute,
        terms: Terms,
        *,
        max_unread_seconds: float,
    ) -> None:
        self.live: dict[LiveAnswer, None] = {}  # oldest first
        self.rate = RateMeter()
        self._asking = asking
        self._slots = slots
        self._per_minute = per_minute
        self._terms = terms
        self._max_unread_seconds = max_unread_seconds
        self._flushing = LiveFlushing()

    async def answer(self, incoming: Incoming, write: Write) -> None:
        """Answer a request through *write*, which may block while the caller does not read.

        Raises the error that ends the call.
        """
        now = time.monotonic()
        deadline = response_deadline(Deadline.after(incoming.time_remaining, now))
        live = LiveAnswer(_completed(incoming.request), Timing(now))
        end = CANCELLED  # until it ends otherwise
        try:
            async with asyncio.timeout_at(deadline.timeout_at) as timer:
                call = await self._call(live.request)
                taken = self._take(call)
                self.live[live] = None
                try:
                    await self._answer(live, call, taken, deadline, incoming.framed, write)
                finally:
                    del self.live[live]
                    self._correct(taken, live)
            assert live.finish is not None
            end = End.complete(finish_name(live.finish.reason))
        except TimeoutError:
            if not timer.expired():
                raise
            failure = _deadline_error(live)
            end = End.by(failure)
            raise failure from None
        except Exception as error:
            end = End.by(error)
            raise
        finally:
            # On a busy server gRPC may cancel the call for its deadline before this has noticed it.
            if end is CANCELLED and deadline.passed(time.monotonic()):
                end = End.by(_deadline_error(live))
            self._record(live, end)

    async def _call(self, request: pb.GenerateRequest) -> Call:
        if request.ByteSize() < LONG_BYTES:
            return call_for(request, self._terms)
        return await asyncio.to_thread(call_for, request, self._terms)

    def _take(self, call: Call) -> Taken:
        """Take the request, with its estimated tokens, from the limits of the minute. Raises Overloaded."""
        tokens = prompt_tokens(call.request) + most_tokens(call.request, self._terms)
        return self._per_minute.admit(tokens, time.monotonic())

    def _correct(self, taken: Taken, live: LiveAnswer) -> None:
        """Replace the estimate by what was used, or give it back."""
        used = live.used
        if used is None:
            used = prompt_tokens(live.request) + live.tokens if live.accepted else 0
        self._per_minute.correct(taken, used, time.monotonic())

    async def _answer(
        self, live: LiveAnswer, call: Call, taken: Taken, deadline: Deadline, framed: bool, write: Write
    ) -> None:
        def sent() -> None:
            self._per_minute.sent(taken, time.monotonic())

        self._describe(live, call)
        async with self._slots.held(deadline):
            live.sent = time.monotonic()
            async with self._asking.begun(call, deadline, sent) as begun:
                live.url, live.accepted = begun.url.url, True
                await self._write(live, write, self._accepted(live))
                await self._pass_on(live, begun, framed, write)
                finish = begun.finish()
                self._complete(live, begun, finish)
                await self._write(live, write, pb.GenerateResponse(finish=finish))
                live.finish = finish

    async def _pass_on(self, live: LiveAnswer, begun: Begun, framed: bool, write: Write) -> None:
        """Write the deltas as they arrive, or several as one."""
        clock = asyncio.get_running_loop().time
        gathering = Gathering(self._flusher(live.request, framed))
        arrived, stream = begun.deltas, begun.stream
        failure: errors.UpstreamLost | None = None
        while True:
            now = clock()
            due = [] if arrived or now < gathering.flush_at else gathering.flush()
            for delta in arrived:
                self._count(live, delta)
                due += gathering.add(delta, now)
            if stream.ended or failure is not None:
                due += gathering.flush()
            for delta in due:
                await self._write(live, write, pb.GenerateResponse(delta=delta))
            if failure is not None:
                raise failure
            if stream.ended:
                return
            try:
                arrived = await begun.read(gathering.flush_at)
            except errors.UpstreamLost as lost:
                arrived, failure = [], lost  # what was gathered is written first

    def _count(self, live: LiveAnswer, delta: pb.Delta) -> None:
        if delta.token_count:
            now = time.monotonic()
            live.timing.add(delta.token_count, now)
            live.tokens += delta.token_count
            self.rate.add(now, delta.token_count)

    def _flusher(self, request: pb.GenerateRequest, framed: bool) -> Flusher:
        now = time.monotonic()
        if self._flushing.is_due(now):
            self._flushing.update(now, streams=len(self.live), tokens_per_second=self.rate.per_second(now))
        default = self._flushing.framed if framed else self._flushing.messages
        return chosen_flusher(request.stream, default)

    async def _write(self, live: LiveAnswer, write: Write, response: pb.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._max_unread_seconds) as timer:
                await write(response)
        except TimeoutError:
            if not timer.expired():
                raise
            raise errors.SlowReader(
                f"the answer has waited {self._max_unread_seconds:g} s to be read: read faster; an answer of "
                "this tier cannot be resumed"
            ) from None

    def _accepted(self, live: LiveAnswer) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        accepted = response.accepted
        accepted.request_id = live.request.request_id
        accepted.model = self._terms.model
        accepted.tier = self._terms.tier
        accepted.seed = live.request.sampling.seed
        accepted.text_only = True
        return response

    def _complete(self, live: LiveAnswer, begun: Begun, finish: pb.Finish) -> None:
        """Add the times to the end of an answer, and note what it used."""
        usage, timing, now = finish.usage, live.timing, time.monotonic()
        if begun.stream.reader.usage_known:
            live.used = usage.prompt_tokens + usage.completion_tokens
        else:
            metrics.NO_USAGE.of(tier=self._terms.tier).add()
            log.warning(
                "the upstream reported no usage",
                extra={"url": live.url, "estimated_tokens": usage.completion_tokens},
            )
        assert live.sent is not None
        first = timing.first if timing.first is not None else now
        last = timing.last if timing.last is not None else now
        for duration, seconds in (
            (finish.timing.queue, live.sent - timing.arrived),
            (finish.timing.first_token, first - timing.arrived),
            (finish.timing.decode, last - first),
            (finish.timing.total, now - timing.arrived),
        ):
            duration.FromNanoseconds(int(max(seconds, 0.0) * 1e9))
        if live.span.is_recording():
            live.span.set_attribute(attributes.GEN_AI_INPUT_TOKENS, usage.prompt_tokens)
            live.span.set_attribute(attributes.GEN_AI_CACHE_READ_TOKENS, usage.cached_tokens)

    def _describe(self, live: LiveAnswer, call: Call) -> None:
        """Describe the request in its server span."""
        if live.span.is_recording():
            live.span.set_attributes(
                {
                    attributes.REQUEST_ID: call.request.request_id,
                    attributes.TIER: self._terms.tier,
                    attributes.ATTEMPT: call.request.resume.attempt,
                    attributes.GEN_AI_OPERATION: call.operation,
                    attributes.GEN_AI_PROVIDER: "headrace",
                    attributes.GEN_AI_REQUEST_MODEL: self._terms.model,
                    attributes.GEN_AI_REQUEST_MAX_TOKENS: most_tokens(call.request, self._terms),
                }
            )

    def _record(self, live: LiveAnswer, end: End) -> None:
        record(
            end,
            live.timing,
            time.monotonic(),
            tier=self._terms.tier,
            model=self._terms.model if live.accepted else "",
            chat=live.request.HasField("chat"),
        )
        if live.span.is_recording():
            live.span.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: end.outcome})
            live.span.set_attribute(attributes.GEN_AI_OUTPUT_TOKENS, live.tokens)
            if end.finish:
                live.span.set_attribute(attributes.GEN_AI_FINISH_REASONS, [end.finish])


def _completed(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """Return the request with an id."""
    if request.request_id:
        return request
    completed = pb.GenerateRequest()
    completed.CopyFrom(request)
    completed.request_id = str(uuid.uuid4())
    return completed


def _deadline_error(live: LiveAnswer) -> errors.DeadlineExceeded:
    if live.accepted:
        return errors.DeadlineInDecode("the deadline passed before the answer was complete")
    return errors.DeadlineInQueue("the deadline passed before the first token; nothing was delivered")
