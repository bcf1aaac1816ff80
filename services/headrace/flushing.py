"""Decide when the gathered tokens of answers are sent: each at once, or several as one event.

A `Flusher` holds one rule. Inboxes that share one read its current value at every token, so that answers
that started together change with the load. It needs one timer for all of them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from typing import Protocol

from headrace.v1 import generation_pb2 as pb

FLUSH_SECONDS = 0.1
# A comfortable rate of messages: each takes about 0.2 ms of CPU here, and as much at each further hop.
MESSAGES_PER_SECOND = 1000.0
# A comfortable rate of events that travel in frames shared by many answers: 20 us each, over all hops.
FRAMED_EVENTS_PER_SECOND = 20_000.0
# A comfortable rate of chunks over HTTP: each takes about 85 us on a slow machine, a system call among it.
CHUNKS_PER_SECOND = 4000.0
MAX_TOKENS_PER_EVENT = 32
UPDATE_SECONDS = 0.05


def message_tokens(streams: int, tokens_per_second: float) -> int:
    """Return the tokens per event under the current load where each event is a message of its own.

    streams             answers in flight
    tokens_per_second   of all of them together

    One event loop sends about a thousand messages per second. A handful of readers get each token at once,
    hundreds get 8 per message, and more if even that would exceed the rate.
    """
    shared = 1 if streams <= 16 else 2 if streams <= 32 else 4 if streams <= 64 else 8
    tokens = max(shared, math.ceil(tokens_per_second / MESSAGES_PER_SECOND))
    return min(tokens, MAX_TOKENS_PER_EVENT)


def framed_tokens(tokens_per_second: float) -> int:
    """Return the tokens per event under the current load where one frame carries events of many answers."""
    return _tokens_for(tokens_per_second, FRAMED_EVENTS_PER_SECOND)


def chunk_tokens(tokens_per_second: float) -> int:
    """Return the tokens per event under the current load where each event is a chunk of an HTTP response."""
    return _tokens_for(tokens_per_second, CHUNKS_PER_SECOND)


def _tokens_for(tokens_per_second: float, events_per_second: float) -> int:
    return min(max(math.ceil(tokens_per_second / events_per_second), 1), MAX_TOKENS_PER_EVENT)


def chooses_flushing(request: pb.GenerateRequest) -> bool:
    """Return whether a request says itself how its answer is split into events."""
    options = request.stream
    return options.HasField("flush_tokens") or options.HasField("flush_interval")


class Gatherer(Protocol):
    """Gathers tokens until they are flushed: an inbox.

    gathered_at   when the first of its gathered tokens arrived, time.monotonic()
    """

    gathered_at: float

    def flush(self) -> None:
        """Hand over what was gathered."""
        ...


class Flusher:
    """When gathered tokens are handed over, for one inbox or for many.

    tokens    as soon as there are this many; may change at any time, or
    seconds   as soon as the first of them has waited this long
    """

    def __init__(self, tokens: int = 1, seconds: float = FLUSH_SECONDS) -> None:
        self.tokens = tokens
        self.seconds = seconds
        self._waiting: deque[tuple[float, Gatherer]] = deque()  # by when each started to gather
        self._armed = False

    def watch(self, gatherer: Gatherer) -> None:
        """Flush *gatherer*, which starts to gather, after `seconds` unless it was flushed before."""
        waiting = self._waiting
        while waiting and waiting[0][1].gathered_at != waiting[0][0]:  # flushed since
            waiting.popleft()
        gatherer.gathered_at = now = time.monotonic()
        waiting.append((now, gatherer))
        if not self._armed:
            self._arm(self.seconds)

    def _arm(self, seconds: float) -> None:
        self._armed = True
        asyncio.get_running_loop().call_later(seconds, self._flush_due)

    def _flush_due(self) -> None:
        self._armed = False
        now = time.monotonic()
        while self._waiting:
            since, gatherer = self._waiting[0]
            if gatherer.gathered_at == since:  # otherwise it was flushed since
                if since + self.seconds > now:
                    self._arm(since + self.seconds - now)
                    return
                gatherer.flush()
            self._waiting.popleft()


def chosen_flusher(options: pb.StreamOptions, default: Flusher) -> Flusher:
    """Return *default*, or a flusher of its own for a request with flush options, which were checked."""
    own_tokens, own_interval = options.HasField("flush_tokens"), options.HasField("flush_interval")
    if not (own_tokens or own_interval):
        return default
    return Flusher(
        options.flush_tokens if own_tokens else default.tokens,
        options.flush_interval.ToNanoseconds() / 1e9 if own_interval else default.seconds,
    )


class LiveFlushing:
    """The flushers of requests without flush options of their own, which follow the load.

    messages   for answers of which each event is a message
    framed     for answers whose events travel in shared frames
    """

    def __init__(self) -> None:
        self.messages = Flusher()
        self.framed = Flusher()
        self._updated = -math.inf

    def is_due(self, now: float) -> bool:
        """Return whether the load should be measured again."""
        return now - self._updated >= UPDATE_SECONDS

    def update(self, now: float, *, streams: int, tokens_per_second: float) -> None:
        """Adapt to the current load."""
        self._updated = now
        self.messages.tokens = message_tokens(streams, tokens_per_second)
        self.framed.tokens = framed_tokens(tokens_per_second)
