"""Guess the next tokens of a sequence from what followed the same tokens before: prompt lookup.

Answers often repeat parts of their prompt, or of themselves: quotations, code that is edited, records with
the same keys. The source of the idea is Saxena, Prompt Lookup Decoding, 2023. Plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Fewer equal tokens are no evidence: in prose, pairs recur everywhere.
LEAST_MATCH = 3
# Longer matches are not told apart.
MOST_MATCH = 16


class Match(NamedTuple):
    """An earlier occurrence of the last tokens of a sequence.

    place    position of the token that followed it
    length   how many tokens agree, LEAST_MATCH to MOST_MATCH
    """

    place: int
    length: int


class Lookup:
    """Finds the latest earlier occurrence of a sequence's last tokens. Adding a token takes constant time."""

    __slots__ = ("_ends", "_indexed")

    def __init__(self) -> None:
        # Where each run of LEAST_MATCH tokens ended last: the position after it. The last run of the
        # sequence is not in it, because it would be found instead of an earlier one.
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = LEAST_MATCH  # the first end that is not in it

    def find(self, ids: Sequence[int]) -> Match | None:
        """Return the match of the last tokens of *ids*, which begin with those of earlier calls."""
        ends, count = self._ends, len(ids)
        if count > self._indexed:
            first = self._indexed - LEAST_MATCH
            shifted = (ids[first + i : count - LEAST_MATCH + i] for i in range(LEAST_MATCH))
            ends.update(zip(zip(*shifted, strict=True), range(self._indexed, count), strict=True))
            self._indexed = count
        place = ends.get(tuple(ids[-LEAST_MATCH:]))
        if place is None:
            return None
        length = LEAST_MATCH
        while length < min(MOST_MATCH, place) and ids[place - 1 - length] == ids[count - 1 - length]:
            length += 1
        return Match(place, length)


def draft(ids: Sequence[int], place: int, tokens: int) -> list[int]:
    """Return *tokens* ids that continue *ids* as they continued at *place*, over and over if they end."""
    period = len(ids) - place
    return [ids[place + i % period] for i in range(tokens)]
