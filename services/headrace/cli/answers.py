"""Collect the events of an answer: its text, its tier and model, and its speed.

Plain data: no calls, no output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

# A model can generate any text, and a terminal executes escape sequences, so they are removed.
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)])
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]


def printable(text: str) -> str:
    """Return *text* without the control characters that a terminal would execute."""
    return text.translate(_CONTROLS)


@dataclass
class Answer:
    """The part of an answer that has arrived. Times are seconds since the request was sent."""

    request_id: str = ""
    answer_id: str = ""  # empty if no router answered
    text: str = ""
    reasoning: str = ""
    calls: dict[int, pb.ToolCall] = field(default_factory=dict)  # by index
    tier: str = ""
    model: str = ""
    score: float | None = None  # None if it was not scored, or no event has arrived
    prompt_tokens: int = 0
    tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    moves: list[pb.RouteChange] = field(default_factory=list)
    finish: str = ""  # "stop", "length" and so on; empty until it is complete

    def add(self, response: pb.GenerateResponse, seconds: float) -> str:
        """Add an event that arrived after *seconds*, and return its text."""
        match response.WhichOneof("event"):
            case "accepted":
                accepted = response.accepted
                self.request_id, self.answer_id = accepted.request_id, accepted.answer_id
                self.tier, self.model = accepted.tier, accepted.model
                self.score = accepted.score if accepted.HasField("score") else None
                self.prompt_tokens = accepted.prompt_tokens
            case "delta":
                if self.first_token is None:
                    self.first_token = seconds
                self.last_token = seconds
                self.tokens += response.delta.token_count
                self.text += response.delta.text
                self.reasoning += response.delta.reasoning
                for part in response.delta.tool_calls:
                    call = self.calls.setdefault(part.index, pb.ToolCall(id=part.id, name=part.name))
                    call.arguments += part.arguments
                return response.delta.text
            case "route_change":
                self.moves.append(response.route_change)
            case "finish":
                self.finish = finish_name(response.finish.reason)
                self.tokens = response.finish.usage.completion_tokens or self.tokens
        return ""

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of tokens after the first one; None for answers of one token."""
        if self.first_token is None or self.last_token is None or self.tokens < 2:
            return None
        elapsed = self.last_token - self.first_token
        return (self.tokens - 1) / elapsed if elapsed > 0 else None

    @property
    def lines_of_calls(self) -> list[str]:
        """Its calls of tools, one line each, such as `weather({"city": "Rome"})`."""
        # Line breaks between the values of JSON; those within have escapes.
        return [f"{call.name}({' '.join(call.arguments.split(chr(10)))})" for call in self.calls.values()]

    @property
    def ids(self) -> str:
        """Its ids in one line: that of the request, for logs and traces, and its own, for feedback."""
        named = (("request", self.request_id), ("answer", self.answer_id))
        return " · ".join(f"{what} {printable(name)}" for what, name in named if name)

    def figures(self) -> str:
        """Return everything except the text, in one line."""
        return " · ".join(self._figures())

    def _figures(self) -> Iterable[str]:
        yield f"tier {self.tier or '?'}"
        if self.model:
            yield self.model
        if self.score is not None:
            yield f"score {self.score:.2f}"
        if self.first_token is not None:
            yield f"first token {seconds(self.first_token)}"
        yield f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        if self.calls:
            yield f"{len(self.calls)} call{'' if len(self.calls) == 1 else 's'}"
        if (rate := self.tokens_per_second) is not None:
            yield f"{rate:.1f} tokens/s"
        for move in self.moves:
            yield f"moved from {getattr(move, 'from')} to {move.to} ({move.reason})"
        yield self.finish or "not finished"


def finish_name(reason: pb.FinishReason.ValueType) -> str:
    """Return "stop" for FINISH_REASON_STOP, and so on; an unknown reason by its number."""
    if reason not in pb.FinishReason.values():
        return f"reason {reason}"
    return pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower().replace("_", " ")


def seconds(value: float) -> str:
    """Format a duration: "350 µs", "12 ms", "1.25 s"."""
    if value < 0.001:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s"
