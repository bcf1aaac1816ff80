"""Limit the requests and the tokens of a minute: two levels that refill over time.

A level is full at first, and refills from empty to full in a minute. What a request takes is estimated before
it is sent, and corrected when it has ended: a level is below zero after a request that used more. Plain data:
the caller passes the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace import errors
from headrace.v1 import generation_pb2 as pb

MINUTE = 60.0
BYTES_PER_TOKEN = 4  # of ordinary text


class Level:
    """What is left of a limit per minute.

    limit   per minute; 0: there is no limit
    """

    def __init__(self, limit: int, now: float) -> None:
        self._limit = limit
        self._left = float(limit)
        self._then = now

    def left(self, now: float) -> float:
        """Return what may be taken at *now*, which is negative after too much was taken."""
        if now > self._then:
            self._left = min(self._left + (now - self._then) * self._limit / MINUTE, self._limit)
            self._then = now
        return self._left

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until *amount* may be taken. A larger one than the limit needs a full level."""
        if not self._limit:
            return 0.0
        missing = min(amount, self._limit) - self.left(now)
        return max(missing, 0.0) * MINUTE / self._limit

    def take(self, amount: float, now: float) -> None:
        """Take *amount*, which is negative to give some back."""
        if self._limit:
            self._left = min(self.left(now) - amount, self._limit)


@dataclass(slots=True)
class Taken:
    """What a request has taken.

    tokens   as estimated, then as used
    sent     whether it was sent to the upstream
    """

    tokens: int
    sent: bool = False


class PerMinute:
    """The limits of a minute.

    requests, tokens   per minute; 0: no limit
    """

    def __init__(self, requests: int, tokens: int, now: float) -> None:
        self._requests = Level(requests, now)
        self._tokens = Level(tokens, now)

    def admit(self, tokens: int, now: float) -> Taken:
        """Take a request of about *tokens* tokens. Raises Overloaded, with the time until it can be taken."""
        waits = {
            "requests": self._requests.wait(1, now),
            "tokens": self._tokens.wait(tokens, now),
        }
        limit, delay = max(waits.items(), key=lambda item: item[1])
        if delay > 0:
            raise errors.Overloaded(
                f"this tier has reached its limit of {limit} per minute at the upstream; retry after "
                f"{delay:.1f} s",
                retry_after=delay,
                limit=f"{limit}_per_minute",
            )
        self._requests.take(1, now)
        self._tokens.take(tokens, now)
        return Taken(tokens)

    def sent(self, taken: Taken, now: float) -> None:
        """Record that an admitted request is sent to the upstream: each repetition counts as a request."""
        if taken.sent:
            self._requests.take(1, now)
        taken.sent = True

    def correct(self, taken: Taken, used: int, now: float) -> None:
        """Replace the estimated tokens of a request that has ended by those that it *used*.

        A request that was never sent, because the queue was full for example, is given back.
        """
        self._tokens.take(used - taken.tokens, now)
        taken.tokens = used
        if not taken.sent:
            self._requests.take(-1, now)


def prompt_tokens(request: pb.GenerateRequest) -> int:
    """Return about how many tokens the prompt of *request* has."""
    return request.ByteSize() // BYTES_PER_TOKEN + 1
