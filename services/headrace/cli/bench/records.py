"""A request and when its tokens arrived. The backends fill in records; `figures` summarizes them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from headrace.cli.bench.latencies import gaps, time_per_output_token

# Kinds of failures that are no reason of Headrace and no HTTP status.
TIMEOUT = "timeout"
DISCONNECTED = "disconnected"
ENDED_EARLY = "stream ended early"
MALFORMED = "malformed event"
NOT_STREAMED = "not a stream of events"
EMPTY = "empty answer"
ERROR_EVENT = "error event"

MAX_MESSAGE = 300  # characters that are kept of an error


class Failed(Exception):
    """A request failed. *kind* groups failures; the message describes this one."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Record:
    """One request. Times are of `time.perf_counter`, in seconds.

    planned         when it was to be sent: all latencies count from there
    sent            when it was sent; 0 if it was not
    times           arrivals of the messages with tokens
    counts          tokens of each of these messages, where the backend knows them; else empty
    input_tokens    of the prompt, as the server reported them; None if it did not
    output_tokens   of the answer, likewise
    cached_tokens   of the prompt, likewise
    cost            what a Headrace router charged for it, if the tiers have prices
    largest_cost    its estimate for the largest tier alone
    moves           reasons for which the answer moved to another worker, batcher or router
    finish          why the answer ended: "stop", "length", ...; empty if unknown
    complete        whether the whole answer has arrived
    error, message  kind and description of a failure
    parts           texts or raw events, if texts are kept
    """

    planned: float = 0.0
    sent: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("l"))
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    model: str = ""
    tier: str = ""
    cost: float | None = None
    largest_cost: float | None = None
    moves: list[str] = field(default_factory=list)
    finish: str = ""
    complete: bool = False
    error: str = ""
    message: str = ""
    parts: list[str] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the answer: as the server reported, else as counted; a message counts one if unknown."""
        if self.output_tokens is not None:
            return self.output_tokens
        return sum(self.counts) if self.counts else len(self.times)

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.planned

    @property
    def e2el(self) -> float:
        """Time to the last token."""
        return self.times[-1] - self.planned

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        return time_per_output_token(self.ttft, self.e2el, self.tokens)

    @property
    def gaps(self) -> list[float]:
        """Times between messages with tokens."""
        return gaps(self.times)

    @property
    def queue_time(self) -> float:
        """Time that the request waited in this process: for its turn, or because the process was busy."""
        return self.sent - self.planned

    def succeed(self) -> None:
        """Mark it as complete. Raises Failed if it has no token, so that it has no latency."""
        if not self.times:
            raise Failed(EMPTY, "the answer has no tokens")
        self.complete = True

    def fail(self, failure: Failed) -> None:
        """Mark it as failed."""
        self.error, self.message = failure.kind, str(failure)[:MAX_MESSAGE]
