"""Ask the upstream for an answer: try its URLs by preference, and again after a pause, until one begins.

A request is sent again only while its answer has not begun. Each round tries every usable URL once. Between
rounds there is a pause: one that doubles, with full jitter (Brooker, Exponential Backoff And Jitter, AWS,
2015), or the one that the upstream asks for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from headrace import errors
from headrace.deadline import Deadline
from headrace.metrics import upstream as metrics
from headrace.upstream.attempt import AttemptLimits, Begun, attempt
from headrace.upstream.call import Call
from headrace.upstream.http.session import Http
from headrace.upstream.urls import UpstreamUrl, Urls

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between rounds, before jitter
# A request does not wait longer than this for an upstream that is busy: its caller may use another tier.
LONGEST_WAIT = 10.0
NO_DELAY_KNOWN = 1.0  # seconds, advised for a retry where the upstream names no time


class Asking:
    """Asks the upstream.

    retries   rounds after the first one
    """

    def __init__(
        self,
        http: Http,
        urls: Urls,
        limits: AttemptLimits,
        *,
        tier: str,
        retries: int,
    ) -> None:
        self._http = http
        self._urls = urls
        self._limits = limits
        self._tier = tier
        self._retries = retries

    @asynccontextmanager
    async def begun(
        self, call: Call, deadline: Deadline, sent: Callable[[], None]
    ) -> AsyncGenerator[Begun, None]:
        """Hold an answer that has begun, while the block runs. The caller ends the wait at *deadline*.

        sent   called for each HTTP request, before it is sent

        Raises NoWorkers, Overloaded, and InvalidRequest for what the upstream does not accept.
        """
        async with AsyncExitStack() as stack:
            yield await self._first(call, deadline, sent, stack)

    async def _first(
        self, call: Call, deadline: Deadline, sent: Callable[[], None], stack: AsyncExitStack
    ) -> Begun:
        """Return the first answer that begins."""
        attempts = 0
        failure: errors.HeadraceError | None = None
        for number in range(self._retries + 1):
            failures: list[errors.HeadraceError] = []
            tried: list[UpstreamUrl] = []
            while url := self._urls.pick(time.monotonic(), tried, doubtful=number > 0):
                sent()
                if failure is not None:
                    metrics.RETRIES.of(tier=self._tier, error=failure.reason).add()
                tried.append(url)
                try:
                    return await stack.enter_async_context(
                        attempt(self._http, url, call, self._limits, attempts)
                    )
                except (errors.NoWorkers, errors.Overloaded) as error:
                    failure = error
                    failures.append(error)
                    log.info(
                        "the upstream failed before the first token",
                        extra={"url": url.url, "reason": error.reason, "problem": error.message},
                    )
                attempts += 1
            failure = self._round_failed(failures, failure)
            if failure.retry_after is None or number == self._retries:
                break
            now = time.monotonic()
            pause = self._pause(number, tried, now)
            if pause > min(LONGEST_WAIT, deadline.left(now)):
                failure.retry_after = max(failure.retry_after, self._urls.blocked_for(now))
                break
            await asyncio.sleep(pause)
        assert failure is not None, "there is at least one round"
        if failure.retry_after is not None:
            failure.retry_after = failure.retry_after or NO_DELAY_KNOWN
        raise failure

    def _round_failed(
        self, failures: list[errors.HeadraceError], before: errors.HeadraceError | None
    ) -> errors.HeadraceError:
        """Return the error of a round in which no URL answered.

        One that may pass is better advice than one that does not, and one with a delay is better still.

        Raises NoWorkers if no URL is usable in the first round.
        """
        for failure in failures:
            if isinstance(failure, errors.Overloaded):
                return failure
        for failure in failures:
            if failure.retry_after is not None:
                return failure
        if failures:
            return failures[0]
        now = time.monotonic()
        if wait := self._urls.blocked_for(now):
            return errors.Overloaded(
                f"the upstream accepts no requests for {wait:.1f} s; retry then", retry_after=wait
            )
        if before is not None:
            return before
        # Without a problem, a URL whose circuit breaker was open has its one probe in flight.
        problem = self._urls.problem(now) or "it failed several times, and one request tries it at the moment"
        raise errors.NoWorkers(
            f"the upstream of tier {self._tier!r} cannot be used ({problem})",
            retry_after=NO_DELAY_KNOWN,
        )

    def _pause(self, number: int, tried: list[UpstreamUrl], now: float) -> float:
        """Return the seconds until the next round."""
        longest = min(FIRST_PAUSE * 2.0**number, LONGEST_PAUSE)
        jitter = random.uniform(0, longest)
        # A URL that named no time can be tried again sooner than one that did.
        if any(url.blocked_until <= now for url in tried):
            return jitter
        wait = self._urls.blocked_for(now)
        return wait + jitter / 10 if wait else jitter
