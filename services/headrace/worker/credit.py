"""Decide how many sequences each batcher may have at this worker.

A worker wants just enough waiting to fill the next steps: what waits here cannot be reordered, shed or
given to another worker any more. So there is credit for what runs and for about one step's prompts more, and
all batchers together never have more than that: what one of them was promised is given to another only
once it has acknowledged that it is no longer its own. Plain functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """How one stream stands.

    held        sequences that it has here
    credit      how many it was told last that it may have
    committed   how many it may come to have by what it was told and has not acknowledged to be over; at least
                what it has
    hungry      whether it lately used all of its credit, and would take more
    """

    held: int
    credit: int
    committed: int
    hungry: bool


def capacity(*, max_running: int, running: int, waiting: int, step_tokens: int, mean_prompt: float) -> int:
    """How many sequences should be here, over all streams.

    running       that took part in the last step, or held memory while it was computed
    waiting       when it was over
    step_tokens   most tokens that a step computes
    mean_prompt   tokens of the usual prompt; 0 while unknown
    """
    # If some wait though there are slots, memory is what is short: what runs now is all that fits.
    slots = min(running, max_running) if waiting and running else max_running
    prompts = step_tokens / mean_prompt if mean_prompt > 0 else max_running
    return slots + int(min(max(prompts, 1), max_running))


def share(capacity: int, streams: Sequence[Standing]) -> list[int]:
    """What each stream should be told now that it may have.

    Fair is max-min: the hungry get equal parts of what the others leave, who keep what they have and a small
    reserve, so that they can begin at once and show that they are hungry. Credit is taken back only where
    somebody hungry lacks it. What is committed never grows beyond *capacity*, or one for each stream where
    there are more streams than that; only where capacity itself shrinks it is above, until it has run off.
    """
    room = max(capacity, len(streams))
    reserve = max(1, room // (4 * max(len(streams), 1)))
    alone = len(streams) == 1
    fair = _level(room, [room if one.hungry or alone else one.held + reserve for one in streams])
    free = room - sum(one.committed for one in streams)
    # Up to what is committed to it anyway a stream may have more at once.
    told = [
        max(one.credit, min(one.committed, due)) if one.hungry else one.credit
        for one, due in zip(streams, fair, strict=True)
    ]
    lacks = [
        max(due - now, 0) if one.hungry else 0 for one, due, now in zip(streams, fair, told, strict=True)
    ]
    if sum(lacks) > free:
        told = [min(now, due) for now, due in zip(told, fair, strict=True)]
    for _ in range(min(free, sum(lacks))):
        poorest = min((number for number, lack in enumerate(lacks) if lack), key=lambda number: told[number])
        told[poorest] += 1
        lacks[poorest] -= 1
    return told


def _level(room: int, wishes: Sequence[int]) -> list[int]:
    """Max-min fair parts of *room*: the small wishes whole, the rest alike, the first by one more."""
    parts = [0] * len(wishes)
    left = room
    for place, number in enumerate(sorted(range(len(wishes)), key=wishes.__getitem__)):
        parts[number] = min(wishes[number], -(-left // (len(wishes) - place)))
        left -= parts[number]
    return parts
