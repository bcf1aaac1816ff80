"""Remember which worker has computed which beginnings of prompts, as far as we can know.

Workers keep the keys and values of prompts that they computed, block by block, for a while; a prompt that
begins the same is cheaper there. A prompt's blocks are named by hashes chained from the start, so a name
stands for all tokens up to its end, and for the scope in which it is shared. What a worker still has is a
guess, until it tells with a sequence's first token how much of it was there: less than was thought means that
it has forgotten, and as workers forget what was longest unused, all that it had used before is gone with it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 32  # tokens
_MOST_BLOCKS = 256
_MOST_HOLDERS = 4
_EXPECTED = 0  # in place of a use's number: sent there, and not known to be computed yet


def blocks(ids: Sequence[int]) -> tuple[int, ...]:
    """Names of the full blocks that *ids* begin with, in order; the last block is left to be computed."""
    names: list[int] = []
    name = 0
    for begin in range(0, min((len(ids) - 1) // BLOCK, _MOST_BLOCKS) * BLOCK, BLOCK):
        name = hash((name, *ids[begin : begin + BLOCK]))
        names.append(name)
    return tuple(names)


def scope_of(tenant: str) -> bytes:
    """The scope within which a tenant's prefixes are shared: its own requests. "" is the anonymous tenant.

    Equal for all batchers of a worker, and no name that a worker could read.
    """
    return hashlib.blake2b(tenant.encode(), digest_size=16).digest() if tenant else b""


def scoped(names: Sequence[int], scope: bytes) -> tuple[int, ...]:
    """The blocks' names within a scope."""
    return tuple(hash((scope, name)) for name in names) if scope else tuple(names)


class Prefixes:
    """Who holds which block; the least recently used are forgotten beyond *limit* blocks."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        # By block: its holders, and which use of the memory was the last that is known of it there.
        self._holders: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._uses = _EXPECTED
        self._gone: dict[str, int] = {}  # by worker: uses up to this one are forgotten there

    def __len__(self) -> int:
        return len(self._holders)

    def expect(self, names: Sequence[int], worker: str) -> None:
        """A prompt of these blocks goes to *worker*."""
        for name in names:
            holders = self._holders.setdefault(name, {})
            use = holders.pop(worker, _EXPECTED)  # and put last: the newest
            holders[worker] = use if self._counts(use, worker) else _EXPECTED
            if len(holders) > _MOST_HOLDERS:
                del holders[next(iter(holders))]
            self._holders.move_to_end(name)
        while len(self._holders) > self._limit:
            self._holders.popitem(last=False)

    def computed(self, names: Sequence[int], worker: str, found: int, grain: int) -> None:
        """*worker* has computed a prompt of these blocks, and of it found so many tokens there already.

        grain   tokens of the blocks that the worker shares
        """
        known = 0
        for name in names:
            if self._use(name, worker) == _EXPECTED:
                break
            known += 1
        if grain and found < known * BLOCK // grain * grain:
            self._gone[worker] = max(self._use(names[found // BLOCK], worker), self._gone.get(worker, 0))
        self._uses += 1
        for name in names:
            if worker in (holders := self._holders.get(name, {})):
                holders[worker] = self._uses

    def held(self, names: Sequence[int], worker: str) -> int:
        """How many tokens of a prompt of these blocks *worker* has probably computed."""
        count = 0
        for name in names:
            use = self._holders.get(name, {}).get(worker)
            if use is None or not self._counts(use, worker):
                break
            count += 1
        return count * BLOCK

    def forget(self, worker: str) -> None:
        """*worker* has lost its memory, or is gone."""
        self._gone.pop(worker, None)
        for name, holders in list(self._holders.items()):
            if holders.pop(worker, None) is not None and not holders:
                del self._holders[name]

    def _use(self, name: int, worker: str) -> int:
        use = self._holders.get(name, {}).get(worker, _EXPECTED)
        return use if self._counts(use, worker) else _EXPECTED

    def _counts(self, use: int, worker: str) -> bool:
        return use == _EXPECTED or use > self._gone.get(worker, _EXPECTED)
