"""A chat as chat templates receive it: turns with their calls of tools, and the tools.

Every text in it comes from the caller, so that `specials` can put marks into all of them. This module does
not know where the texts come from, nor which form a template expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.template_arguments import texts_in, with_texts

Change = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool.

    arguments   as JSON has them, in the caller's order
    id          empty: the template receives none
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""

    def as_json(self) -> str:
        """Return its name and its arguments as one line."""
        return dumped({"name": self.name, "arguments": self.arguments})


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat.

    name           the author's, or the tool's
    tool_call_id   the call that it is the result of
    tool_calls     the calls that follow its content
    reasoning      what its author thought before its content
    """

    role: str
    content: str = ""
    name: str = ""
    tool_call_id: str = ""
    tool_calls: tuple[Call, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call.

    parameters   the JSON schema of its arguments
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def function(self) -> dict[str, Any]:
        """The tool as templates expect a function."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


Turns = Sequence[Turn]  # oldest first
Tools = Sequence[Tool]


def dumped(value: Any) -> str:
    """Return *value* as JSON, as templates write it: with spaces, and characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def texts_of(turns: Turns, tools: Tools) -> Iterator[str]:
    """Yield each text that came from the caller, except roles."""
    for turn in turns:
        yield turn.content
        yield from filter(None, (turn.name, turn.tool_call_id, turn.reasoning))
        for call in turn.tool_calls:
            yield from (call.name, call.id)
            yield from texts_in({"": call.arguments})
    for tool in tools:
        yield from (tool.name, tool.description)
        yield from texts_in({"": tool.parameters})


def named_results(turns: Turns) -> Turns:
    """Return the turns with the name of its tool in each result: some templates require it.

    A result that refers to no call keeps the name that it has.
    """
    names: dict[str, str] = {}
    named = []
    for turn in turns:
        names.update((call.id, call.name) for call in turn.tool_calls)
        if turn.tool_call_id and not turn.name:
            turn = replace(turn, name=names.get(turn.tool_call_id, ""))
        named.append(turn)
    return named


def changed_turn(turn: Turn, change: Change) -> Turn:
    """Return the turn with each of its `texts_of` changed."""
    return replace(
        turn,
        content=change(turn.content),
        name=change(turn.name),
        tool_call_id=change(turn.tool_call_id),
        reasoning=change(turn.reasoning),
        tool_calls=tuple(
            Call(change(call.name), _changed_object(call.arguments, change), change(call.id))
            for call in turn.tool_calls
        ),
    )


def changed_tool(tool: Tool, change: Change) -> Tool:
    """Return the tool with each of its `texts_of` changed."""
    return Tool(change(tool.name), change(tool.description), _changed_object(tool.parameters, change))


def _changed_object(value: Mapping[str, Any], change: Change) -> Mapping[str, Any]:
    changed: Mapping[str, Any] = with_texts({"": dict(value)}, change)[""]
    return changed
