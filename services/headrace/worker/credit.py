"""Decide how many sequences each batcher may have at this worker.

A worker wants just enough waiting to fill the next steps: what waits here cannot be reordered, shed or
given to another worker any more. So there is credit for what runs and for about one step's prompts more.
Plain functions.
"""

from __future__ import annotations

from collections.abc import Sequence


def capacity(*, max_running: int, running: int, waiting: int, step_tokens: int, mean_prompt: float) -> int:
    """How many sequences should be here, over all streams.

    running, waiting   as of the last step
    step_tokens        most tokens that a step computes
    mean_prompt        tokens of the usual prompt; 0 while unknown
    """
    # If some wait though there are slots, memory is what is short: what runs now is all that fits.
    slots = running if waiting and running else max_running
    prompts = step_tokens / mean_prompt if mean_prompt > 0 else max_running
    return slots + int(min(max(prompts, 1), max_running))


def share(capacity: int, held: Sequence[int], hungry: Sequence[bool]) -> list[int]:
    """Credit of each stream, in sequences: what it has, and its share of what is free.

    held     sequences that each stream has here
    hungry   whether it used all of its credit and would take more

    Streams that are not hungry keep a small reserve, so that they can begin at once and show that they
    are; the rest is filled in like water, so that those who have least come first. The reserves may add
    up to a quarter of the capacity beyond it.
    """
    if len(held) == 1:
        return [max(capacity, held[0])]
    reserve = max(1, capacity // (4 * max(len(held), 1)))
    credit = [have if want else have + reserve for have, want in zip(held, hungry, strict=True)]
    wanting = [number for number, want in enumerate(hungry) if want]
    free = capacity - sum(held)
    while free > 0 and wanting:
        poorest = min(wanting, key=lambda number: credit[number])
        credit[poorest] += 1
        free -= 1
    return credit
