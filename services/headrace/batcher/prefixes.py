"""Remember which worker has computed which beginnings of prompts, as far as we can know.

Workers keep the keys and values of prompts that they computed, block by block, for a while; a prompt that
begins the same is cheaper there. A prompt's blocks are named by hashes chained from the start, so a name
stands for all tokens up to its end. What a worker still has it does not tell: this is a good guess.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 32  # tokens
_MOST_BLOCKS = 256
_MOST_HOLDERS = 4


def blocks(ids: Sequence[int]) -> tuple[int, ...]:
    """Names of the full blocks that *ids* begin with, in order; the last block is left to be computed."""
    names: list[int] = []
    name = 0
    for begin in range(0, min((len(ids) - 1) // BLOCK, _MOST_BLOCKS) * BLOCK, BLOCK):
        name = hash((name, *ids[begin : begin + BLOCK]))
        names.append(name)
    return tuple(names)


class Prefixes:
    """Who holds which block; the least recently used are forgotten beyond *limit* blocks."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def served(self, names: Sequence[int], worker: str) -> None:
        """*worker* computes a prompt of these blocks."""
        for name in names:
            others = tuple(holder for holder in self._holders.get(name, ()) if holder != worker)
            self._holders[name] = (worker, *others[: _MOST_HOLDERS - 1])
            self._holders.move_to_end(name)
        while len(self._holders) > self._limit:
            self._holders.popitem(last=False)

    def held(self, names: Sequence[int], worker: str) -> int:
        """How many tokens of a prompt of these blocks *worker* has probably computed."""
        count = 0
        for name in names:
            if worker not in self._holders.get(name, ()):
                break
            count += 1
        return count * BLOCK

    def forget(self, worker: str) -> None:
        """*worker* has lost its memory, or is gone."""
        for name, holders in list(self._holders.items()):
            if worker in holders:
                left = tuple(holder for holder in holders if holder != worker)
                if left:
                    self._holders[name] = left
                else:
                    del self._holders[name]
