"""Decide how many sequences each batcher may have at this worker.

A worker wants just enough waiting to fill the next steps: what waits here cannot be reordered, shed or
given to another worker any more. So there is credit for what runs and for about one step's prompts more, and
all batchers together never have more than that, but for the one sequence that each idle batcher may send:
what one of them was promised is given to another only once it has acknowledged that it is no longer its own.
Plain functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KNOCK = 1  # sequences that an idle stream may always send: they show that it is not idle any more


@dataclass(frozen=True, slots=True)
class Standing:
    """How one stream stands.

    held        sequences that it has here
    credit      how many it was told last that it may have
    committed   how many it may come to have by what it was told and has not acknowledged to be over; at least
                what it has
    hungry      whether it lately used all of its credit, and would take more
    idle        whether it holds nothing and has submitted nothing lately. It may knock, with one sequence,
                and has no other reserve: what is kept for idle streams is kept from those that work
    """

    held: int
    credit: int
    committed: int
    hungry: bool
    idle: bool = False

    @property
    def counted(self) -> int:
        """What of `committed` takes room: an idle stream's knock does not."""
        return max(self.committed - KNOCK, 0) if self.idle else self.committed


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
    somebody hungry lacks it, or somebody idle a start while nobody is hungry. What is committed never grows
    beyond *capacity*, or one for each stream that is not idle where there are more of them than that, plus
    the knocks of the idle; only where capacity itself shrinks it is above, until it has run off. Takes time
    in proportion to the streams, whatever the capacity.
    """
    idle = sum(one.idle for one in streams)
    working = len(streams) - idle
    room = max(capacity, working)
    reserve = max(1, room // (4 * max(working, 1)))
    alone = len(streams) == 1
    # While nobody is hungry the idle together get a quarter, to begin with more than a knock.
    start = 0 if any(one.hungry for one in streams) else room // (4 * max(idle, 1))
    wishes = [room if one.hungry or alone else start if one.idle else one.held + reserve for one in streams]
    fair = _level(room, wishes)
    takes = [one.hungry or alone or one.idle for one in streams]
    free = room - sum(one.counted for one in streams)
    # Up to what is committed to it anyway a stream may have more at once.
    told = [
        max(one.credit, min(one.committed, due)) if one.hungry else one.credit
        for one, due in zip(streams, fair, strict=True)
    ]
    lacks = sum(max(due - now, 0) for take, due, now in zip(takes, fair, told, strict=True) if take)
    if lacks > free:
        told = [min(now, due) for now, due in zip(told, fair, strict=True)]
    due = [max(part, now) if take else now for take, part, now in zip(takes, fair, told, strict=True)]
    told = fill(told, due, min(free, lacks))
    return [max(now, KNOCK) if one.idle else now for one, now in zip(streams, told, strict=True)]


def fill(told: Sequence[int], due: Sequence[int], extra: int) -> list[int]:
    """Raise the lowest of *told* first, each at most to what is *due* to it, by *extra* in all."""
    if extra <= 0:
        return list(told)

    def raised(level: int) -> list[int]:
        return [max(now, min(most, level)) for now, most in zip(told, due, strict=True)]

    low, high, base = min(told), max(due), sum(told)
    while low < high:  # the highest level that takes no more than there is
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(raised(level)) - base <= extra else (low, level - 1)
    filled = raised(low)
    left = extra - (sum(filled) - base)
    for number, (now, most) in enumerate(zip(filled, due, strict=True)):
        if left and now == low < most:
            filled[number] += 1
            left -= 1
    return filled


def _level(room: int, wishes: Sequence[int]) -> list[int]:
    """Max-min fair parts of *room*: the small wishes whole, the rest alike, the first by one more."""
    parts = [0] * len(wishes)
    left = room
    for place, number in enumerate(sorted(range(len(wishes)), key=wishes.__getitem__)):
        parts[number] = min(wishes[number], -(-left // (len(wishes) - place)))
        left -= parts[number]
    return parts
