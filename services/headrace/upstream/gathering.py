"""Gather the deltas of an answer, so that several are sent as one where that saves messages."""

from __future__ import annotations

import math

from headrace.flushing import Flusher
from headrace.v1 import generation_pb2 as pb

# Where the parts of a delta are joined, their order is lost, so only deltas of one kind are.
_KINDS = ("text", "reasoning", "tool_calls")
# Deltas are not joined beyond this size: a message of 4 MiB would be rejected.
MAX_BYTES = 256 * 1024


class Gathering:
    """The deltas of one answer that were not sent so far, joined.

    flusher    when they are due
    flush_at   the time by which the gathered ones are due, on the clock of `add`; infinite if there are none
    """

    def __init__(self, flusher: Flusher) -> None:
        self.flush_at = math.inf
        self._flusher = flusher
        self._delta: pb.Delta | None = None
        self._size = 0  # of the gathered delta, about, in bytes
        self._first = True

    def add(self, delta: pb.Delta, now: float) -> list[pb.Delta]:
        """Add a delta; return those that are due."""
        due = []
        size = delta.ByteSize()
        if self._delta is not None and self._size + size <= MAX_BYTES and _joinable(self._delta, delta):
            _join(self._delta, delta)
            self._size += size
        else:
            due = self.flush()
            self._delta, self._size = delta, size
            self.flush_at = now + self._flusher.seconds
        if self._first or self._delta.token_count >= self._flusher.tokens:
            self._first = False
            due += self.flush()
        return due

    def flush(self) -> list[pb.Delta]:
        """Return what was gathered, as one delta or none."""
        delta, self._delta = self._delta, None
        self.flush_at = math.inf
        return [] if delta is None else [delta]


def _joinable(first: pb.Delta, second: pb.Delta) -> bool:
    kinds = {kind for kind in _KINDS for delta in (first, second) if getattr(delta, kind)}
    return len(kinds) <= 1


def _join(first: pb.Delta, second: pb.Delta) -> None:
    """Add *second*, which follows *first*, to it."""
    first.token_count += second.token_count
    first.text += second.text
    first.reasoning += second.reasoning
    first.logprobs.extend(second.logprobs)
    first.tokens.extend(second.tokens)
    for part in second.tool_calls:
        if first.tool_calls and not part.id and first.tool_calls[-1].index == part.index:
            first.tool_calls[-1].arguments += part.arguments
        else:
            first.tool_calls.append(part)
