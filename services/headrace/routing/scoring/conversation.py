"""Define the turns of a conversation, which a scorer reads, and their form in rows of JSON.

A scorer reads a bounded window of a conversation: its last turns, and of long turns the beginning and the
end. `turns/reading.py` scores what is in the window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.quoting import quoted
from headrace.routing.scoring import normal
from headrace.routing.success.estimate import Estimate

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"developer": "system", "function": "tool"}  # of roles, in files that other programs wrote

CONTINUES = 0.5  # dependence on earlier turns, from which on a turn continues its conversation

TURNS = 16  # that are read of a conversation
CHARACTERS = 8_000  # that are read of all of them
_USER = (1_500, 500)  # of the beginning and the end of an earlier turn of the user
_OTHER = (300, 500)  # of other turns


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. A raw prompt is one turn of the user.

    role   one of `ROLES`; other roles are read like the user's
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Carried:
    """What the next turn of a conversation inherits if it continues this one.

    words       digests of the words of the last turn, which recognise the same question; at most 64
    estimates   by tier; empty unless the scorer was fitted to outcomes of tiers
    """

    score: float
    words: tuple[int, ...] = ()
    estimates: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Earlier:
    """What the router remembers of a conversation's last request.

    score   of its last turn
    tier    that answered it
    words, estimates   as in `Carried`
    """

    score: float
    tier: str
    words: tuple[int, ...] = ()
    estimates: Mapping[str, Estimate] = field(default_factory=dict)


def remembered(earlier: Earlier | None, score: float, carried: Carried | None, tier: str) -> Earlier:
    """Return what is remembered of a conversation after a turn of *score* that *tier* has answered.

    carried   by that turn; None: nothing changes, as after "thanks", or if it could not be scored
    """
    if carried is None and earlier is not None:
        return replace(earlier, tier=tier)
    carried = carried or Carried(score)
    return Earlier(carried.score, tier, carried.words, carried.estimates)


def window(newest_first: Iterable[Turn]) -> list[Turn]:
    """Return the turns that a scorer reads, oldest first, with the middle of long turns left out.

    These are at most the last `TURNS` without the system's, and the last one of the user even if it is older.
    Turns are taken from the iterable only as far as they are read.
    """
    found: list[Turn] = []
    asked = False  # the last turn of the user is in the window
    left, newest = CHARACTERS, None
    for turn in newest_first:
        newest = turn if newest is None else newest
        full = len(found) >= TURNS or left <= 0
        if full and asked:
            break
        if turn.role == "system" or (full and not _is_user(turn)):
            continue
        if _is_user(turn) and not asked:
            asked, text = True, normal.clip(turn.text)
        else:
            text = _ends(turn.text, *(_USER if _is_user(turn) else _OTHER), left)
        left -= len(text)
        found.append(turn if text is turn.text else Turn(turn.role, text))
    if not found and newest is not None:
        found.append(Turn(newest.role, normal.clip(newest.text)))
    return found[::-1]


def _is_user(turn: Turn) -> bool:
    return turn.role not in ("system", "assistant", "tool")


def _ends(text: str, head: int, tail: int, left: int) -> str:
    """Return at most *left* characters of the beginning and the end of *text*."""
    if len(text) <= min(head + tail, left):
        return text
    tail = min(tail, left)
    head = min(head, left - tail)
    return (text[:head] + "\n" if head else "") + text[-tail:]


def turns_of_row(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a row with either `messages` or `prompt`. Raises ValueError for other rows."""
    prompt, messages = row.get("prompt"), row.get("messages")
    if messages is None:
        if prompt is None:
            raise ValueError("a row needs field 'prompt', a string, or 'messages', a list")
        if not isinstance(prompt, str):
            raise ValueError("field 'prompt' must be a string")
        return [Turn("user", prompt)]
    if prompt is not None:
        raise ValueError("a row has either 'prompt' or 'messages', not both")
    if not isinstance(messages, list) or not messages:
        raise ValueError("field 'messages' must be a list of at least one object with 'role' and 'content'")
    turns = []
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"messages[{place}] must be an object with 'role' and 'content', both strings")
        role = _OTHER_NAMES.get(role, role)
        if role not in ROLES:
            raise ValueError(f"messages[{place}].role is {quoted(role)}, must be one of {', '.join(ROLES)}")
        turns.append(Turn(role, content))
    return turns


def row_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the fields of a row for *turns*: `prompt` for one turn of the user, else `messages`."""
    if len(turns) == 1 and turns[0].role == "user":
        return {"prompt": turns[0].text}
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
