"""One batcher's stream: what is under way on it, what it was promised, and what waits to be said.

A stream that reads slowly finds its frames merged, so the engine never waits. What is kept for it is bounded
in bytes; a stream beyond the bound fails. Plain data but for the events that wake its writer and end it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field

from opentelemetry import trace

from headrace import errors
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.credit import Standing
from headrace.worker.engine.plan.scheduler import LiveSequence

BEAT_SECONDS = 0.25  # while prompts are computed and no token comes, an empty step is sent so often
# A batcher whose sequences end all at once is hungry still: the next ones are on their way.
HUNGRY_SECONDS = 1.0
# Batchers ping each second. What one may still send is kept free for it only while it is heard.
SILENT_SECONDS = 3.0
# A stream that has nothing here and has submitted nothing for so long gets no reserve of credit.
IDLE_SECONDS = 10.0
# Most bytes that are kept for a batcher that does not read. More than any batcher that still answers pings
# leaves unread: 100,000 tokens and more.
UNREAD_BYTES = 1 << 20
_DELTA_BYTES = 128  # of a delta, besides its tokens
# Of these messages the newest one replaces the ones before: an unread one is not worth keeping.
_REPLACED = frozenset({"credit", "load", "pong"})

# A sequence's name inside the engine: its stream and its handle there.
Key = tuple[int, int]


@dataclass(slots=True)
class Flight:
    """What the streams' side knows of a sequence under way.

    priority   as the batcher gave it
    """

    sequence: LiveSequence[Key]
    request_id: str
    attempt: int
    parent: trace.SpanContext
    batch: trace.SpanContext
    submitted_ns: int
    priority: int = 5
    cancelled_by: errors.HeadraceError | None = None
    first_token_ns: int = 0


@dataclass(slots=True)
class Session:
    """One batcher's stream.

    pending       deltas that wait for the writer, by handle: later steps merge into them
    window        most step frames that may be unacknowledged; 0 is no bound
    acks_credit   whether the batcher acknowledges credit
    credit        sequences that it may have here, as it was told last; generation counts what it was told
    heard         time.monotonic() when it said something last
    submitted     time.monotonic() when it submitted last
    done          no more submits will come: it has quiesced or half-closed
    half_closed   nothing more will come at all
    error         why the stream has to end; set once, by `fail`
    """

    number: int
    batcher_id: str = ""
    epoch: int = 0
    window: int = 0
    acks_credit: bool = False
    credit: int = 0
    generation: int = 0
    heard: float = field(default_factory=time.monotonic)
    submitted: float = -math.inf
    done: bool = False
    half_closed: bool = False
    error: errors.HeadraceError | None = None
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    flights: dict[int, Flight] = field(default_factory=dict)
    pending: dict[int, wire.SequenceDelta] = field(default_factory=dict)
    others: list[wire.RunResponse] = field(default_factory=list)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    frames: int = 0
    acked: int = 0
    sending: bool = False
    beating: bool = False
    framed: float = 0.0
    _hungry: float = 0.0
    _most: int = 0
    _ended: set[int] = field(default_factory=set)  # handles whose last delta waits for the writer
    _places: dict[str, int] = field(default_factory=dict)  # in `others`, of messages that may be replaced
    _others_bytes: int = 0
    _pending_bytes: int = 0
    # What it was told: the newest that it acknowledged, and all since, by generation.
    _told: deque[tuple[int, int]] = field(default_factory=lambda: deque([(0, 0)]))

    @property
    def held(self) -> int:
        """Sequences that are here as the batcher sees it: until their last deltas are sent."""
        return len(self.flights) + len(self._ended)

    @property
    def allowance(self) -> int:
        """Most sequences that it may have here, by what it was told and has not acknowledged to be over.

        What a batcher has seen that acknowledges no credit is not known: the most that it was ever told.
        """
        return self._promised if self.acks_credit else self._most

    @property
    def _promised(self) -> int:
        return max(credit for _, credit in self._told)

    @property
    def unread_bytes(self) -> int:
        """About how much waits for the writer."""
        return self._others_bytes + self._pending_bytes

    def knows(self, handle: int) -> bool:
        """Whether a handle is in use, as the batcher sees it."""
        return handle in self.flights or handle in self._ended

    def stands(self, now: float) -> Standing:
        """How it stands, for credit to be shared."""
        held = len(self.flights)
        if self.done:
            return Standing(held, self.credit, held, hungry=False, idle=True)
        if held >= self.credit:
            self._hungry = now
        promised = self._promised if now - self.heard < SILENT_SECONDS else 0
        idle = not held and now - self.submitted >= IDLE_SECONDS
        hungry = not idle and now - self._hungry < HUNGRY_SECONDS
        return Standing(held, self.credit, max(held, promised), hungry, idle)

    def fail(self, error: errors.HeadraceError) -> None:
        """End the stream with *error*, unless it ends already."""
        if self.error is None:
            self.error = error
            self.failed.set()

    def grant(self, credit: int) -> None:
        """Tell it how much it may have, if that is news."""
        if credit == self.credit and self.generation:
            return
        self.credit = credit
        self._most = max(self._most, credit)
        self.generation += 1
        if not self.acks_credit:
            self._told.clear()
        self._told.append((self.generation, credit))
        self.say(wire.RunResponse(credit=wire.Credit(generation=self.generation, sequences=credit)))

    def saw_credit(self, generation: int) -> bool:
        """The batcher acknowledges credit; returns whether that is news."""
        before = len(self._told)
        while len(self._told) > 1 and self._told[1][0] <= generation:
            self._told.popleft()
        return len(self._told) < before

    def welcome(self, response: wire.RunResponse) -> None:
        """Send the first message, before anything that was said meanwhile."""
        self.others.insert(0, response)
        self.has_news.set()

    def say(self, response: wire.RunResponse) -> None:
        """Send something that is not a step; of credit, load and pong only the newest."""
        kind = response.WhichOneof("message") or ""
        place = self._places.get(kind, len(self.others)) if kind in _REPLACED else len(self.others)
        if place < len(self.others) and self.others[place].WhichOneof("message") == kind:
            self.others[place] = response
        else:
            self._places[kind] = len(self.others)
            self.others.append(response)
            self._others_bytes += response.ByteSize()
            self._check_unread()
        self.has_news.set()

    def tell(self, delta: wire.SequenceDelta) -> None:
        """Send a delta with the next step, merged with what waits of its sequence."""
        self._pending_bytes += 4 * (len(delta.token_ids) + len(delta.logprobs))
        waiting = self.pending.get(delta.handle)
        if waiting is None:
            self.pending[delta.handle] = delta
            self._pending_bytes += _DELTA_BYTES
        else:
            delta.offset = waiting.offset
            waiting.MergeFrom(delta)
        if delta.finish or delta.HasField("error"):
            self._pending_bytes += delta.error.ByteSize()
            self._ended.add(delta.handle)
        self._check_unread()
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

    def finish(self) -> None:
        """The batcher has half-closed: no submit and no `ack` will come, so no window holds anything back."""
        self.done = self.half_closed = True
        self.window = 0
        self.has_news.set()

    @property
    def complete(self) -> bool:
        """Whether the batcher has half-closed, and the writer has all that there was to say."""
        return self.half_closed and not (self.flights or self.pending or self.others)

    def _check_unread(self) -> None:
        if self.unread_bytes > UNREAD_BYTES:
            self.fail(
                errors.SlowReader(
                    f"more than {UNREAD_BYTES} bytes wait to be read on this stream: read faster"
                )
            )

    def news(self, now: float) -> list[wire.RunResponse]:
        """Everything that may be sent now, as few messages as it takes."""
        self.has_news.clear()
        responses, self.others = self.others, []
        self._others_bytes = 0
        self._places.clear()
        full = self.window and self.frames - self.acked >= self.window
        if (self.pending or self.beating) and not full:
            self.frames += 1
            self.framed = now
            self.beating = False
            responses.append(
                wire.RunResponse(step=wire.Step(frame=self.frames, deltas=self.pending.values()))
            )
            self.pending = {}
            self._pending_bytes = 0
            self._ended.clear()
        return responses
