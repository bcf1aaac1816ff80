"""Report requests that have ended, and ratings of their answers, to those that watch the routing.

The decision log, shadow answers and the canary are watchers. None of them can fail a request or delay it:
they are called when the caller has its answer, must not wait, and what they raise is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.router.optional import optional
from headrace.router.state.bills import Bill
from headrace.routing.policy import Decision
from headrace.routing.request import RoutingRequest
from headrace.routing.scoring.conversation import Turn
from headrace.routing.scoring.score import Score
from headrace.v1 import generation_pb2 as pb

MAX_TEXT = 65_536  # characters of an answer that are kept for a watcher


class Beginning:
    """The first `MAX_TEXT` characters of an answer, whose parts are added as they arrive."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._left = MAX_TEXT

    @property
    def text(self) -> str:
        """The beginning so far."""
        return "".join(self._parts)

    def add(self, text: str) -> None:
        """Add the next part."""
        if self._left > 0:
            self._parts.append(text[: self._left])
            self._left -= len(text)


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that has ended, with or without an answer.

    request    as it was sent to batchers, with its id and seed
    turns      that were scored
    facts      what the decision read, tenant included
    decision   the first one; None if no tier could be chosen
    tier       that answered, or where the request was last; empty without a decision
    finish     why its answer is complete, such as "stop"; empty if it is not
    outcome    "ok", or the class of the error, as the metrics name it
    text       `Beginning` of the answer; empty unless a watcher wanted it
    seconds    from its arrival to its end
    answer_id  made by the router; empty if no tier accepted the request
    scorer     fingerprint of the scorer that scored it
    """

    request: pb.GenerateRequest
    turns: Sequence[Turn]
    score: Score
    facts: RoutingRequest
    decision: Decision | None
    tier: str
    finish: str
    outcome: str
    text: str
    bill: Bill
    seconds: float
    answer_id: str = ""
    scorer: str = ""


@dataclass(frozen=True, slots=True)
class Rating:
    """The outcome of an answer.

    request_id  as the caller chose it: other answers may have the same
    quality     0 to 1
    source      who rated it: "caller", "judge"
    answer_id   made by the router
    shadow      tier and outcome of the shadow answer that a judge has compared it with; None: there is none
    """

    tenant: str
    request_id: str
    tier: str
    quality: float
    source: str = "caller"
    answer_id: str = ""
    shadow: tuple[str, float] | None = None


class Watcher(Protocol):
    """Watches the requests of a router. Its methods must return at once."""

    def wants_text(self, request: pb.GenerateRequest, facts: RoutingRequest) -> bool:
        """Whether `Answered.text` of this request is needed."""
        ...

    def answered(self, answered: Answered) -> None:
        """Receive a request that has ended."""
        ...

    def rated(self, rating: Rating) -> None:
        """Receive the outcome of an answer, of this process or of a sibling."""
        ...


class Watchers:
    """Several watchers as one. What one of them raises is logged, and the others are still called."""

    def __init__(self, watchers: Sequence[Watcher] = ()) -> None:
        self._watchers = list(watchers)

    def add(self, watcher: Watcher) -> None:
        """Add a watcher."""
        self._watchers.append(watcher)

    def wants_text(self, request: pb.GenerateRequest, facts: RoutingRequest) -> bool:
        """See `Watcher`."""
        wanted = False
        for watcher in self._watchers:
            with optional("watching decisions"):
                wanted = watcher.wants_text(request, facts) or wanted
        return wanted

    def answered(self, answered: Answered) -> None:
        """See `Watcher`."""
        for watcher in self._watchers:
            with optional("watching decisions"):
                watcher.answered(answered)

    def rated(self, rating: Rating) -> None:
        """See `Watcher`."""
        for watcher in self._watchers:
            with optional("watching decisions"):
                watcher.rated(rating)
