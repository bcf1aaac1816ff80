"""Guess the next tokens of a sequence from what followed the same tokens before: prompt lookup.

Answers often repeat parts of their prompt, of themselves, or of answers to similar requests: quotations, code
that is edited, records with the same keys. The sources of the ideas are Saxena, Prompt Lookup Decoding, 2023,
and Oliaro et al., SuffixDecoding, 2024. Plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Longer matches are not told apart.
MOST_MATCH = 16
# Tokens of the answers that are kept: this many, to twice as many. A token takes about 0.25 KiB.
KEPT_ANSWERS = 8192
# How many of the latest occurrences are compared: 2 give a tenth more tokens per step than 1, and 8 no more
# than 4 (simulated with answers of the default models).
_COMPARED = 4
# Ends each answer among those that are kept. No token has this id.
_END = -1


class Match(NamedTuple):
    """An earlier occurrence of the last tokens of a sequence.

    text     the ids that contain it: those of the sequence, or answers of others
    place    position of the token that followed it
    length   how many tokens agree, 1 to MOST_MATCH
    """

    text: Sequence[int]
    place: int
    length: int


class Lookup:
    """Finds the last tokens of a sequence in a text that grows. Adding a token takes constant time."""

    __slots__ = ("_latest", "_previous")

    def __init__(self) -> None:
        # Where the latest occurrence of a token, or of two, ends: the position after it. The end of the text
        # is not in it: no token follows.
        self._latest: dict[int | tuple[int, ...], int] = {}
        # By position: where the two tokens before it end earlier; 0 if they do not.
        self._previous = [0]

    def add(self, text: Sequence[int]) -> None:
        """Add the tokens of *text* that are new. It begins with those of earlier calls."""
        latest, previous = self._latest, self._previous
        for end in range(len(previous), len(text)):
            pair = tuple(text[max(end - 2, 0) : end])
            previous.append(latest.get(pair, 0))
            latest[pair] = latest[text[end - 1]] = end

    def find(self, text: Sequence[int], ids: Sequence[int]) -> Match | None:
        """Return the longest match of the last tokens of *ids* among the latest ones.

        text   that was added
        """
        latest, previous, count = self._latest, self._previous, len(ids)
        place = latest.get(tuple(ids[-2:]), 0) if count > 1 else 0
        if not place:
            place = latest.get(ids[-1], 0)
            return Match(text, place, 1) if place else None
        found = 0, 0
        for _ in range(_COMPARED):
            length, most = 2, min(MOST_MATCH, place, count)
            while length < most and text[place - 1 - length] == ids[count - 1 - length]:
                length += 1
            if length > found[0]:
                found = length, place
            place = previous[place]
            if not place:
                break
        return Match(text, found[1], found[0])


class Answers:
    """The latest answers of an engine. Sequences find only those of their scope, see `SequenceSpec`."""

    def __init__(self) -> None:
        # The answers of a scope, and their index. When there are enough, the older half is dropped.
        self._newer: dict[bytes, tuple[list[int], Lookup]] = {}
        self._older: dict[bytes, tuple[list[int], Lookup]] = {}
        self._tokens = 0  # of the newer ones

    def add(self, scope: bytes, answer: Sequence[int]) -> None:
        """Add an answer; of a long one, only the beginning."""
        if not answer:
            return
        if self._tokens >= KEPT_ANSWERS:
            self._newer, self._older, self._tokens = {}, self._newer, 0
        text, lookup = self._newer.setdefault(scope, ([], Lookup()))
        added = len(text)
        text += answer[: KEPT_ANSWERS - self._tokens]
        text.append(_END)
        lookup.add(text)
        self._tokens += len(text) - added

    def find(self, scope: bytes, ids: Sequence[int]) -> Match | None:
        """Return the longest match of the last tokens of *ids* in answers of a scope; the latest if equal."""
        found = None
        for kept in (self._newer, self._older):
            if scope in kept:
                text, lookup = kept[scope]
                match = lookup.find(text, ids)
                if match is not None and (found is None or match.length > found.length):
                    found = match
        return found


def draft(text: Sequence[int], place: int, tokens: int) -> list[int]:
    """Return up to *tokens* ids that continue a text as at *place*, over and over; those of one answer."""
    period = len(text) - place
    ids = [text[place + i % period] for i in range(tokens)]
    return ids[: ids.index(_END)] if _END in ids else ids
