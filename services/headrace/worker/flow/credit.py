"""Decide how many sequences each batcher may have at this worker.

A worker needs just enough waiting sequences to fill its next steps: a sequence that waits here can no longer
be reordered, shed or sent to another worker. So there is credit for the running sequences and for about one
step's prompts. All batchers together never have more sequences here than that, except for the one that each
idle batcher may send: credit of one batcher is given to another only after the first has acknowledged that it
was withdrawn. Plain functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IDLE_CREDIT = 1  # sequences that an idle stream may always send, which show that it is no longer idle


@dataclass(frozen=True, slots=True)
class CreditState:
    """The state of one stream, as credit is shared by it.

    held         sequences that it has here
    credit       how many it may have, as last granted
    committed    how many it may come to have, given the grants that it has not acknowledged; at least held
    backlogged   whether it lately used all of its credit, and would use more
    idle         whether it has no sequences and has submitted none lately. It keeps IDLE_CREDIT and no other
                 reserve: what is reserved for idle streams is withheld from those that work
    """

    held: int
    credit: int
    committed: int
    backlogged: bool
    idle: bool = False

    @property
    def counted(self) -> int:
        """The part of `committed` that counts against capacity: all but an idle stream's IDLE_CREDIT."""
        return max(self.committed - IDLE_CREDIT, 0) if self.idle else self.committed


def capacity(*, max_running: int, running: int, waiting: int, step_tokens: int, mean_prompt: float) -> int:
    """Return how many sequences should be here, over all streams.

    running       sequences that took part in the last step, or had KV memory during it
    waiting       sequences that waited after it
    step_tokens   most tokens that a step computes
    mean_prompt   mean tokens of a prompt; 0 if unknown
    """
    # If sequences wait although there are slots, memory is the limit: what runs now is all that fits.
    slots = min(running, max_running) if waiting and running else max_running
    prompts = step_tokens / mean_prompt if mean_prompt > 0 else max_running
    return slots + int(min(max(prompts, 1), max_running))


def share(capacity: int, streams: Sequence[CreditState]) -> list[int]:
    """Return the credit that each stream should be granted now.

    Credit is shared max-min fairly: backlogged streams get equal parts of what the others leave. The others
    keep what they have and a small reserve, so that they can start immediately and show that they are
    backlogged. Credit is withdrawn only if a backlogged stream lacks it, or if an idle stream lacks its start
    while none is backlogged. Commitments never grow beyond *capacity* (or one per working stream, if there
    are more of them than that) plus IDLE_CREDIT per idle stream; they exceed it only after capacity itself
    has shrunk, until sequences end. The time taken is proportional to the number of streams, not to capacity.
    """
    idle = sum(one.idle for one in streams)
    working = len(streams) - idle
    room = max(capacity, working)
    reserve = max(1, room // (4 * max(working, 1)))
    single = len(streams) == 1
    # While no stream is backlogged, the idle ones share a quarter, to start with more than IDLE_CREDIT.
    start = 0 if any(one.backlogged for one in streams) else room // (4 * max(idle, 1))
    wishes = [
        room if one.backlogged or single else start if one.idle else one.held + reserve for one in streams
    ]
    fair = _max_min(room, wishes)
    takes = [one.backlogged or single or one.idle for one in streams]
    free = room - sum(one.counted for one in streams)
    # A stream may use its commitment, up to its fair part.
    granted = [
        max(one.credit, min(one.committed, due)) if one.backlogged else one.credit
        for one, due in zip(streams, fair, strict=True)
    ]
    lacks = sum(max(due - now, 0) for take, due, now in zip(takes, fair, granted, strict=True) if take)
    if lacks > free:
        granted = [min(now, due) for now, due in zip(granted, fair, strict=True)]
    due = [max(part, now) if take else now for take, part, now in zip(takes, fair, granted, strict=True)]
    granted = fill(granted, due, min(free, lacks))
    return [max(now, IDLE_CREDIT) if one.idle else now for one, now in zip(streams, granted, strict=True)]


def fill(granted: Sequence[int], due: Sequence[int], extra: int) -> list[int]:
    """Distribute *extra* to the lowest of *granted* first, each at most up to what is *due* to it."""
    if extra <= 0:
        return list(granted)

    def raised(level: int) -> list[int]:
        return [max(now, min(most, level)) for now, most in zip(granted, due, strict=True)]

    low, high, base = min(granted), max(due), sum(granted)
    while low < high:  # find the highest level that needs no more than there is
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(raised(level)) - base <= extra else (low, level - 1)
    filled = raised(low)
    left = extra - (sum(filled) - base)
    for number, (now, most) in enumerate(zip(filled, due, strict=True)):
        if left and now == low < most:
            filled[number] += 1
            left -= 1
    return filled


def _max_min(room: int, wishes: Sequence[int]) -> list[int]:
    """Return max-min fair parts of *room*: small wishes in full, the rest in equal parts."""
    parts = [0] * len(wishes)
    left = room
    for place, number in enumerate(sorted(range(len(wishes)), key=wishes.__getitem__)):
        parts[number] = min(wishes[number], -(-left // (len(wishes) - place)))
        left -= parts[number]
    return parts
