"""Decide whether and when the client repeats a call that failed.

A request without an answer so far is retried if no server took it. An answer that has begun is resumed on the
next server. Both draw from a budget, so that a server in trouble does not receive every request twice.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from headrace import errors
from headrace.deadline import Deadline

BACKOFF_DOUBLINGS = 5  # of the delay before the next try, which starts at 50 to 100 ms
CONNECT_SECONDS = 2.0  # the longest time that a request whose connection was lost waits for a new one


class RetryBudget:
    """Limits retries in proportion to successful calls (gRPC proposal A6, retry throttling).

    Each retry takes one token, each success returns *refund*, and at half of *tokens* retries stop.
    """

    def __init__(self, tokens: float = 10, refund: float = 0.1) -> None:
        self._most = tokens
        self._tokens = tokens
        self._refund = refund

    def take(self) -> bool:
        """Take the token of one retry; return False if there is none left."""
        if self._tokens <= self._most / 2:
            return False
        self._tokens -= 1
        return True

    def succeed(self) -> None:
        """Count a successful call."""
        self._tokens = min(self._most, self._tokens + self._refund)


class Retries:
    """The retries of all calls of one client.

    reconnected   waits until a call whose connection was lost can be made again
    most          most retries of a request without an answer
    patience      seconds for which an answer that has begun waits for a server to resume it
    """

    def __init__(self, reconnected: Callable[[], Awaitable[None]], *, most: int, patience: float) -> None:
        self._reconnected = reconnected
        self._most = most
        self._patience = patience
        self._budget = RetryBudget()

    def succeed(self) -> None:
        """Count a successful call."""
        self._budget.succeed()

    async def retry(self, error: errors.HeadraceError, failures: int, *, deadline: Deadline) -> bool:
        """Wait until a request without an answer can be sent again; return False if it is not to be.

        failures   consecutive ones, this one included

        The first retry after a lost connection is free: all calls that lost it wait together for one new
        connection. The others draw from the budget.
        """
        lost = is_lost_connection(error)
        free = lost and failures == 1
        if not (lost or isinstance(error, errors.Unavailable)) or failures > self._most:
            return False
        if not free and not self._budget.take():
            return False
        seconds = min(CONNECT_SECONDS, deadline.left(time.monotonic()))
        return await self._wait(error, failures, pause=not free, seconds=seconds)

    async def resume(
        self,
        error: errors.HeadraceError,
        failures: int,
        *,
        accepted: bool,
        since: float,
        deadline: Deadline,
    ) -> bool:
        """Wait until the rest of an answer can be requested; return False if it is not to be.

        failures   consecutive streams that brought nothing, this one included
        accepted   whether the server had accepted the stream that failed
        since      time.monotonic() of the first of these failures

        The first attempt after a stream that brought something is free. So are attempts that no server
        accepted: other answers wait for the same server, and `patience` limits the wait. An attempt that was
        accepted and brought nothing may be what crashes the servers: the next one draws from the budget.
        """
        if not _is_resumable(error, again=failures > 1):
            return False
        if failures > 1 and accepted and not self._budget.take():
            return False
        now = time.monotonic()
        seconds = min(self._patience - (now - since), deadline.left(now))
        return await self._wait(error, failures, pause=failures > 1, seconds=seconds)

    async def _wait(self, error: errors.HeadraceError, failures: int, *, pause: bool, seconds: float) -> bool:
        """Wait for backoff and connection; return False if that takes longer than *seconds*."""
        # A server that cancelled the call is still connected, and probably busy.
        pause = pause or isinstance(error, errors.RequestCancelled) or error.retry_after is not None
        delay = _backoff(failures - 1, error) if pause else 0.0
        if delay >= seconds:
            return False
        try:
            async with asyncio.timeout(seconds):
                await asyncio.sleep(delay)
                if is_lost_connection(error):
                    await self._reconnected()
        except TimeoutError:
            return False
        return True


def _is_resumable(error: errors.HeadraceError, *, again: bool) -> bool:
    """Return whether an answer may be resumed after *error*.

    It may if the server is lost or stopping, or names a delay, or discarded the answer of a slow reader. Not
    after WORKER_LOST: the batcher has already tried, and a request that crashes its workers must end. Nor
    after UPSTREAM_LOST: there are no tokens to continue from.
    *again*: an earlier attempt to resume failed, so the server may be busy for a while.
    """
    ended = isinstance(error, errors.WorkerLost | errors.UpstreamLost)
    if isinstance(error, errors.Unavailable) and not ended:
        return type(error) is errors.Unavailable or error.retry_after is not None
    if isinstance(error, errors.RequestCancelled | errors.SlowReader):
        return True
    return again and isinstance(error, errors.Overloaded)


def is_lost_connection(error: errors.HeadraceError) -> bool:
    """Return whether the connection was lost, or a server or proxy cancelled the call.

    If the caller cancels, CancelledError is raised instead.
    """
    return isinstance(error, errors.RequestCancelled) or type(error) is errors.Unavailable


def _backoff(attempt: int, error: errors.HeadraceError) -> float:
    """Return the seconds until the next attempt: the server's delay, or 50 ms to 3 s, with jitter."""
    if error.retry_after is not None:
        return error.retry_after
    return random.uniform(0.5, 1) * 0.1 * 2.0 ** min(attempt, BACKOFF_DOUBLINGS)
