"""One batcher's stream: what is under way on it, what it was promised, and what waits to be said.

A stream that reads slowly finds its frames merged, so the engine never waits and what is kept is bounded
by what its sequences may say. Plain data but for the event that wakes its writer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from opentelemetry import trace

from headrace import errors
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.credit import Standing
from headrace.worker.engine.scheduler import LiveSequence

BEAT_SECONDS = 0.25  # while prompts are computed and no token comes, an empty step is sent so often
# A batcher whose sequences end all at once is hungry still: the next ones are on their way.
HUNGRY_SECONDS = 1.0
# Batchers ping each second. What one may still send is kept free for it only while it is heard.
SILENT_SECONDS = 3.0

# A sequence's name inside the engine: its stream and its handle there.
Key = tuple[int, int]


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

    pending       deltas that wait for the writer, by handle: later steps merge into them
    window        most step frames that may be unacknowledged; 0 is no bound
    acks_credit   whether the batcher acknowledges credit
    credit        sequences that it may have here, as it was told last; generation counts what it was told
    heard         time.monotonic() when it said something last
    """

    number: int
    batcher_id: str = ""
    epoch: int = 0
    window: int = 0
    acks_credit: bool = False
    credit: int = 0
    generation: int = 0
    heard: float = field(default_factory=time.monotonic)
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
    # What it was told: the newest that it acknowledged, and all since, by generation.
    _told: deque[tuple[int, int]] = field(default_factory=lambda: deque([(0, 0)]))

    def stands(self, now: float) -> Standing:
        """How it stands, for credit to be shared."""
        held = len(self.flights)
        if held >= self.credit:
            self._hungry = now
        promised = max(credit for _, credit in self._told) if now - self.heard < SILENT_SECONDS else 0
        return Standing(held, self.credit, max(held, promised), now - self._hungry < HUNGRY_SECONDS)

    def grant(self, credit: int) -> None:
        """Tell it how much it may have, if that is news."""
        if credit == self.credit and self.generation:
            return
        self.credit = credit
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
