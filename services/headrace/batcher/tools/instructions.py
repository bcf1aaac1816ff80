"""Put tools and calls into ordinary messages, for models whose chat template knows no tools.

The tools are listed in the system message, with the form of a call: `Family.JSON`. Earlier calls become text
of that form, and results become messages of the user. The texts are short, because the smallest models
follow them best.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.batcher.turns import Call, Tools, Turn, Turns, dumped

HEAD = "You can call these tools. Each line describes one, with the JSON schema of its parameters:"
FORM = (
    "To call a tool, answer with only a JSON object of its name and its arguments, such as "
    '{"name": "TOOL", "arguments": {"PARAMETER": "VALUE"}}. The next message then has its result. '
    "If no tool helps, answer in plain text."
)
TOOLS_PLACE = -1  # of a message that the tools alone have added

Placed = tuple[int, Turn]  # a turn, and the place of the message that it is made of


def instructions(tools: Tools) -> str:
    """Return the text that tells a model of its tools."""
    described = [{name: value for name, value in tool.function.items() if value} for tool in tools]
    return "\n".join([HEAD, *map(dumped, described), "", FORM])


def as_text(turns: Turns, tools: Tools, *, system: bool) -> list[Placed]:
    """Return the turns without calls, results and tools: these are in the contents.

    system   whether the template accepts a system message; otherwise the tools are in the first message of
             the user
    """
    placed = _plain(turns)
    if not tools:
        return placed
    text, host = instructions(tools), "system" if system else "user"
    at = next((at for at, (_, turn) in enumerate(placed) if turn.role == host), None)
    # A system message further down belongs to its place: ours comes first.
    if at is None or (system and at > 0):
        return [(TOOLS_PLACE, Turn(host, text)), *placed]
    place, turn = placed[at]
    placed[at] = place, replace(turn, content=f"{text}\n\n{turn.content}")
    return placed


def _plain(turns: Turns) -> list[Placed]:
    calls: dict[str, Call] = {}
    placed: list[Placed] = []
    joins = False  # whether the last of `placed` is a result, so that the next of the user continues it
    for place, turn in enumerate(turns):
        calls.update((call.id, call) for call in turn.tool_calls if call.id)
        result = turn.role == "tool"
        if result:
            turn = Turn("user", f"{_heading(turn, calls)}\n{turn.content}")
        elif turn.tool_calls:
            lines = [turn.content, *(call.as_json() for call in turn.tool_calls)]
            turn = replace(turn, content="\n".join(filter(None, lines)), tool_calls=())
        # Many templates require that user and assistant alternate.
        if placed and turn.role == placed[-1][1].role == "user" and (joins or result):
            first, before = placed[-1]
            placed[-1] = first, replace(before, content=f"{before.content}\n\n{turn.content}")
        else:
            placed.append((place, turn))
        joins = result or (joins and turn.role == "user")
    return placed


def _heading(result: Turn, calls: dict[str, Call]) -> str:
    if (call := calls.get(result.tool_call_id)) is not None:
        return f"Result of {call.as_json()}:"
    return f"Result of {result.name}:" if result.name else "Result of the call:"
