"""Decide whether a worker is alive, from when it last sent a message and when its engine last made a step.

A dead process is not the only failure. A process may be stopped with its connection open, or answer pings
while its engine hangs. Plain data: the caller passes the current time.
"""

from __future__ import annotations

import math
from collections import deque

PING_SECONDS = 1.0
SUSPECT_SECONDS = 2.0  # shortest time without a step after which a worker with running sequences is suspect
SUSPECT_STEPS = 5.0  # times the 99th percentile of its step times
# Until this many steps have arrived the engine's speed is unknown; while it answers pings it has more time.
KNOWN_STEPS = 20
# Decodes tell nothing about a step that computes thousands of prompt tokens. It may take this many times what
# the worker's rate lets expect.
SUSPECT_PROMPTS = 2.0
ASSUMED_PREFILL_RATE = 200.0  # prompt tokens per second of a worker whose rate is unknown: a slow CPU
UNKNOWN_SECONDS = 10.0
LOST_SECONDS = 10.0  # without any message: the connection is closed
HUNG_SECONDS = 30.0  # shortest time without a step, despite answered pings, after which it is closed as well
_WINDOW = 512


class Liveness:
    """The liveness of the worker behind one stream that opened at *now*.

    pinged_at   when the latest ping was sent
    alive_at    when the latest ping that was answered was sent: the worker was alive after that
    """

    def __init__(self, now: float) -> None:
        self._received = now
        self._stepped = now
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._p99: float | None = None
        self._pings = deque([(0, now)])  # unanswered; 0 is the hello, which the welcome answers
        self._nonce = 0
        self.pinged_at = -math.inf
        self.alive_at = -math.inf

    @property
    def received_at(self) -> float:
        """When the latest message arrived."""
        return self._received

    @property
    def step_p99(self) -> float:
        """The 99th percentile of the time between steps, in seconds; 0 while unknown."""
        if self._p99 is None:
            ordered = sorted(self._steps)
            self._p99 = ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0
        return self._p99

    def ping(self, now: float) -> int:
        """Record a ping that is being sent. Returns its nonce."""
        self._nonce += 1
        self._pings.append((self._nonce, now))
        self.pinged_at = now
        return self._nonce

    def pong(self, nonce: int) -> None:
        """Record the answer to the ping of *nonce* and to all before it; 0 is the hello."""
        while self._pings and self._pings[0][0] <= nonce:
            _, self.alive_at = self._pings.popleft()

    def received(self, now: float) -> None:
        """Record that a message arrived."""
        self._received = now

    def stepped(self, now: float) -> None:
        """Record that a step frame arrived while sequences were at the worker."""
        self._steps.append(now - self._stepped)
        self._p99 = None
        self._stepped = now

    def became_busy(self, now: float) -> None:
        """Record that an idle worker gets work: the time to its next step starts now."""
        self._stepped = now

    def excuse(self, seconds: float) -> None:
        """Disregard a time in which this process itself was stalled and could not receive messages."""
        self._received += seconds
        self._stepped += seconds

    def step_timeout(self, now: float, prompt_seconds: float = 0.0) -> float:
        """Return the seconds without a step after which a worker with running sequences is suspect.

        prompt_seconds   that the step is expected to take for prompt tokens
        """
        known = max(SUSPECT_STEPS * self.step_p99, SUSPECT_PROMPTS * prompt_seconds, SUSPECT_SECONDS)
        responds = now - self._received < SUSPECT_SECONDS
        return max(known, UNKNOWN_SECONDS) if responds and len(self._steps) < KNOWN_STEPS else known

    def suspect(self, now: float, *, running: int, prompt_seconds: float = 0.0) -> bool:
        """Return whether the worker should get no more work, and its sequences should move to other workers.

        running          this batcher's sequences at the worker
        prompt_seconds   that its step is expected to take for prompt tokens
        """
        if now - self._received >= SUSPECT_SECONDS:
            return True
        return running > 0 and now - self._stepped >= self.step_timeout(now, prompt_seconds)

    def lost(self, now: float, *, running: int, prompt_seconds: float = 0.0) -> str:
        """Return why the connection should be closed; empty if it should not. Arguments as for `suspect`."""
        if now - self._received >= LOST_SECONDS:
            return f"no message for {LOST_SECONDS:g} s"
        limit = max(HUNG_SECONDS, 2 * self.step_timeout(now, prompt_seconds))
        if running and now - self._stepped >= limit:
            return f"no step for {limit:g} s, although it answers pings"
        return ""
