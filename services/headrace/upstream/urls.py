"""Keep what is known about each URL of the upstream, and choose the one for the next request.

`probing` checks the URLs, and requests report how they went. Plain data: the caller passes the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from urllib.parse import urlsplit

from headrace import errors
from headrace.runtime.breaker import BreakerState, CircuitBreaker

LONGEST_PAUSE = 60.0  # seconds that a circuit breaker stays open at most


class UpstreamUrl:
    """One base URL.

    host, port      of it, for metrics and spans
    breaker         opened by requests that failed one after the other
    problem         why it does not serve, by the last check; empty if it does
    last_error      of the last request that failed there
    blocked_until   when it accepts requests again, as it said itself: time.monotonic()
    in_flight       requests that it is answering
    context_length  as its list of models says; 0: unknown
    check_now       set to have it checked at once
    """

    def __init__(self, url: str, *, failures: int, pause: float) -> None:
        self.url = url
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.breaker = CircuitBreaker(threshold=failures, pause=pause, longest=LONGEST_PAUSE)
        self.problem = "it was not checked so far"
        self.last_error = ""
        self.blocked_until = 0.0
        self.in_flight = 0
        self.context_length = 0
        self.check_now = asyncio.Event()
        self._succeeded = False  # a request, since the last check

    def __repr__(self) -> str:
        return f"UpstreamUrl({self.url!r})"

    def usable(self, now: float) -> bool:
        """Whether requests may be sent there, as far as is known."""
        return not self.problem and self.breaker.state(now) is not BreakerState.OPEN

    def why_not(self, now: float) -> str:
        """Return why it is not usable, for people; empty if it is."""
        if self.problem:
            return f"{self.url}: {self.problem}"
        if self.breaker.state(now) is BreakerState.OPEN:
            return f"{self.url}: several requests failed, the last one: {self.last_error}"
        return ""

    def checked(self, problem: str, *, certain: bool = True) -> bool:
        """Record a check: *problem* is empty if it serves. Returns whether that changed.

        certain   whether requests would fail as well; if not, one that succeeded since the last check counts
                  more
        """
        if problem and not certain and self._succeeded:
            problem = ""
        self._succeeded = False
        changed, self.problem = problem != self.problem, problem
        return changed

    def answering(self, now: float) -> None:
        """Record that an answer has begun: a probe of the breaker has succeeded."""
        if self.breaker.state(now) is not BreakerState.CLOSED:
            self.breaker.record_success()
        self.problem = ""
        self._succeeded = True

    def succeeded(self) -> None:
        """Record that a request was answered to its end, or rejected for a reason of its own."""
        self.breaker.record_success()
        self.problem = ""
        self._succeeded = True

    def block(self, seconds: float, now: float) -> None:
        """Send no request there for *seconds*, as it has asked for."""
        self.blocked_until = max(self.blocked_until, now + seconds)

    def failed(self, error: errors.HeadraceError, now: float, request: str | None) -> None:
        """Record that a request failed by a fault of the URL, and have it checked.

        request   identifies the request if it may be the cause, so that its repetitions count once
        """
        self.breaker.record_fault(now, () if request is None else (request,))
        self.last_error = error.message
        self.check_now.set()


class Urls:
    """All URLs, by preference."""

    def __init__(self, urls: Sequence[UpstreamUrl]) -> None:
        self._urls = tuple(urls)

    def __iter__(self) -> Iterator[UpstreamUrl]:
        return iter(self._urls)

    def usable(self, now: float) -> list[UpstreamUrl]:
        """Return those that requests may be sent to."""
        return [url for url in self._urls if url.usable(now)]

    def pick(self, now: float, tried: Collection[UpstreamUrl], *, doubtful: bool) -> UpstreamUrl | None:
        """Return the URL for a request: the first that is usable and not in *tried*; None if there is none.

        doubtful   whether one that failed its last check may be tried as well
        """
        allowed = [
            url
            for url in self._urls
            if url not in tried and url.blocked_until <= now and url.breaker.allowed(now)
        ]
        usable = [url for url in allowed if url.usable(now)]
        return next(iter(usable or (allowed if doubtful else ())), None)

    def blocked_for(self, now: float) -> float:
        """Return the seconds until a URL accepts requests again that now accepts none; 0 without one."""
        waits = [
            url.blocked_until - now
            for url in self._urls
            if url.blocked_until > now and url.breaker.allowed(now)
        ]
        return min(waits, default=0.0)

    def problem(self, now: float) -> str:
        """Return why none is usable, for people."""
        return "; ".join(filter(None, (url.why_not(now) for url in self._urls)))

    @property
    def context_length(self) -> int:
        """The smallest context length of those that state one; 0: unknown."""
        return min((url.context_length for url in self._urls if url.context_length), default=0)
