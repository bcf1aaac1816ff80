"""Guess the next tokens of a sequence from what followed the same tokens before: prompt lookup.

Answers often repeat parts of their prompt, or of themselves: quotations, code that is edited, records with
the same keys. The source of the idea is Saxena, Prompt Lookup Decoding, 2023. Plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# With 1, drafts are more often wrong; with 3 there are fewer (simulated with answers of the default models).
LEAST_MATCH = 2
# Longer matches are not told apart.
MOST_MATCH = 16
# How many of the latest occurrences are compared: 2 give a tenth more tokens per step than 1, and 8 no more
# than 4 (simulated as well).
_COMPARED = 4


class Match(NamedTuple):
    """An earlier occurrence of the last tokens of a sequence.

    place    position of the token that followed it
    length   how many tokens agree, LEAST_MATCH to MOST_MATCH
    """

    place: int
    length: int


class Lookup:
    """Finds an earlier occurrence of a sequence's last tokens. Adding a token takes constant time."""

    __slots__ = ("_latest", "_previous")

    def __init__(self) -> None:
        # Where the latest run of these LEAST_MATCH tokens ends: the position after it. The last run of the
        # sequence is not in it, because it would be found instead of an earlier one.
        self._latest: dict[tuple[int, ...], int] = {}
        # By position: where the run before it with the same tokens ends; 0 if there is none.
        self._previous = [0] * LEAST_MATCH

    def find(self, ids: Sequence[int]) -> Match | None:
        """Return the longest match of the last tokens of *ids* among the latest ones.

        ids   begin with those of earlier calls
        """
        latest, previous, count = self._latest, self._previous, len(ids)
        for end in range(len(previous), count):
            run = tuple(ids[end - LEAST_MATCH : end])
            previous.append(latest.get(run, 0))
            latest[run] = end
        found, place = None, latest.get(tuple(ids[-LEAST_MATCH:]), 0)
        for _ in range(_COMPARED):
            if not place:
                break
            length = LEAST_MATCH
            while length < min(MOST_MATCH, place) and ids[place - 1 - length] == ids[count - 1 - length]:
                length += 1
            if found is None or length > found.length:
                found = Match(place, length)
            place = previous[place]
        return found


def draft(ids: Sequence[int], place: int, tokens: int) -> list[int]:
    """Return *tokens* ids that continue *ids* as they continued at *place*, over and over if they end."""
    period = len(ids) - place
    return [ids[place + i % period] for i in range(tokens)]
