"""Decide whether a worker lives, from when it was heard and when its engine made steps.

Dead is not the only failure: a process may be stopped with its connection open, or serve its connection
with an engine that hangs. Plain data; the caller brings the clock.
"""

from __future__ import annotations

import math
from collections import deque

PING_SECONDS = 1.0
SUSPECT_SECONDS = 2.0  # least time without a step that makes a worker with running sequences suspect
SUSPECT_STEPS = 5.0  # times the 99th percentile of its steps
# Until so many steps were seen nobody knows how slow this engine is; while it answers pings it has longer.
KNOWN_STEPS = 20
UNKNOWN_SECONDS = 10.0
LOST_SECONDS = 10.0  # of complete silence: the connection is given up
HUNG_SECONDS = 30.0  # least time without a step, though pings are answered: given up as well
_WINDOW = 512


class Liveness:
    """What is known of one stream's worker, from *now* on.

    pinged_at     when it was asked last whether it lives
    answered_at   when the last question was asked that it has answered: it lived after that
    """

    def __init__(self, now: float) -> None:
        self._heard = now
        self._stepped = now
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._slow: float | None = None
        self._pings = deque([(0, now)])  # that wait for an answer; the hello, which a welcome answers, is 0
        self._nonce = 0
        self.pinged_at = -math.inf
        self.answered_at = -math.inf

    @property
    def heard_at(self) -> float:
        """When anything was heard last."""
        return self._heard

    @property
    def p99(self) -> float:
        """99th percentile of the time between steps, in seconds; 0 while nothing is known."""
        if self._slow is None:
            ordered = sorted(self._steps)
            self._slow = ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0
        return self._slow

    def ping(self, now: float) -> int:
        """A ping goes out; returns its nonce."""
        self._nonce += 1
        self._pings.append((self._nonce, now))
        self.pinged_at = now
        return self._nonce

    def pong(self, nonce: int) -> None:
        """The ping of *nonce* was answered, and with it all before; 0 is the hello."""
        while self._pings and self._pings[0][0] <= nonce:
            _, self.answered_at = self._pings.popleft()

    def heard(self, now: float) -> None:
        """Something came in."""
        self._heard = now

    def stepped(self, now: float) -> None:
        """A step came in, while sequences were at the worker."""
        self._steps.append(now - self._stepped)
        self._slow = None
        self._stepped = now

    def busy(self, now: float) -> None:
        """Work goes to a worker that had none: its steps are counted from here."""
        self._stepped = now

    def excuse(self, seconds: float) -> None:
        """This process itself stood still for so long, and could not hear."""
        self._heard += seconds
        self._stepped += seconds

    def patience(self, now: float) -> float:
        """Seconds without a step after which a worker with running sequences is suspect."""
        known = max(SUSPECT_STEPS * self.p99, SUSPECT_SECONDS)
        answers = now - self._heard < SUSPECT_SECONDS
        return max(known, UNKNOWN_SECONDS) if answers and len(self._steps) < KNOWN_STEPS else known

    def suspect(self, now: float, *, running: int) -> bool:
        """Whether it should get no more work, and lose what it has to others.

        running   sequences of ours that it has
        """
        if now - self._heard >= SUSPECT_SECONDS:
            return True
        return running > 0 and now - self._stepped >= self.patience(now)

    def lost(self, now: float, *, running: int) -> str:
        """Why the connection should be given up; empty if it should not."""
        if now - self._heard >= LOST_SECONDS:
            return f"nothing heard for {LOST_SECONDS:g} s"
        limit = max(HUNG_SECONDS, 2 * self.patience(now))
        if running and now - self._stepped >= limit:
            return f"no step for {limit:g} s, though it answers"
        return ""
