"""Gather the events of an answer: its text, its thoughts and its calls of tools."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass, field

from headrace.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer.

    reasoning   what the model thought before its text; empty unless its chat template marks that
    calls       of tools, in their order
    """

    accepted: pb.Accepted
    finish: pb.Finish
    text: str = ""
    reasoning: str = ""
    calls: tuple[pb.ToolCall, ...] = ()

    @property
    def message(self) -> pb.Message:
        """The answer as a message of the conversation, for the next request."""
        return pb.Message(
            role="assistant", content=self.text, reasoning=self.reasoning, tool_calls=self.calls
        )


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


async def gather(events: AsyncIterable[pb.GenerateResponse]) -> Reply:
    """Return the answer whose *events* these are, as of `Client.generate`."""
    accepted, finish = pb.Accepted(), pb.Finish()
    text: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, _Call] = {}
    async for response in events:
        kind = response.WhichOneof("event")
        if kind == "accepted":
            accepted = response.accepted
        elif kind == "finish":
            finish = response.finish
        elif kind == "delta":
            text.append(response.delta.text)
            reasoning.append(response.delta.reasoning)
            for part in response.delta.tool_calls:
                call = calls.setdefault(part.index, _Call(part.id, part.name))
                call.arguments.append(part.arguments)
    made = (
        pb.ToolCall(id=call.id, name=call.name, arguments="".join(call.arguments)) for call in calls.values()
    )
    return Reply(accepted, finish, "".join(text), "".join(reasoning), tuple(made))
