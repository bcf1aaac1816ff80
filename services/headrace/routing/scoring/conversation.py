"""Define the turns of a conversation, which a scorer reads, and their form in rows of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. A raw prompt is one turn of the user.

    role   one of `ROLES`; other roles are read like the user's
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Earlier:
    """What the router remembers of a conversation's last request.

    score   of its last turn
    tier    that answered it
    """

    score: float
    tier: str


def turns_of_row(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a row with `messages`, or with `prompt`. Raises ValueError for other rows."""
    if "messages" not in row:
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError("a row needs a 'prompt', a string, or 'messages', a list")
        return [Turn("user", prompt)]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("field 'messages' must be a list of at least one object with 'role' and 'content'")
    turns = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("each of 'messages' must be an object with 'role' and 'content', both strings")
        turns.append(Turn(role, content))
    return turns


def row_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the fields of a row for *turns*: `prompt` for one turn of the user, else `messages`."""
    if len(turns) == 1 and turns[0].role == "user":
        return {"prompt": turns[0].text}
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
