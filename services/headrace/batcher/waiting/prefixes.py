"""Track which worker has which prompt prefixes in its cache.

Workers cache the keys and values of prompts, block by block, and a prompt with a cached prefix costs less to
compute. The name of a block is a hash chained from the start of the prompt, so that it stands for all tokens
up to its end and for the scope in which it is shared. What a worker still has cached is an estimate. With the
first token of a sequence the worker reports how many prompt tokens it had cached. If that is less than
estimated, it has evicted blocks. Workers evict the least recently used blocks first, so all that were used
earlier are gone, too.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 32  # tokens
_MAX_BLOCKS = 256
_MAX_HOLDERS = 4
_EXPECTED = 0  # in place of a use's number: the prompt was sent there, but is not known to be computed yet


def block_names(ids: Sequence[int]) -> tuple[int, ...]:
    """Return the names of the full blocks at the start of *ids*, in order, without the last token's block."""
    names: list[int] = []
    name = 0
    for start in range(0, min((len(ids) - 1) // BLOCK, _MAX_BLOCKS) * BLOCK, BLOCK):
        name = hash((name, *ids[start : start + BLOCK]))
        names.append(name)
    return tuple(names)


def scope_of(tenant: str) -> bytes:
    """Return the scope within which a tenant's prefixes are shared. "" is the anonymous tenant.

    The scope is the same for all batchers of a worker, and does not reveal the tenant's name to workers.
    """
    return hashlib.blake2b(tenant.encode(), digest_size=16).digest() if tenant else b""


def scoped(names: Sequence[int], scope: bytes) -> tuple[int, ...]:
    """Return the names of blocks within a scope."""
    return tuple(hash((scope, name)) for name in names) if scope else tuple(names)


class PrefixIndex:
    """The workers that have each block cached; beyond *limit* blocks the least recently used are dropped."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        # By block: the workers that hold it, and the number of its latest known use there.
        self._holders: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._uses = _EXPECTED
        self._evicted: dict[str, int] = {}  # by worker: blocks whose latest use is up to this one are evicted

    def __len__(self) -> int:
        return len(self._holders)

    def expect(self, names: Sequence[int], worker: str) -> None:
        """Record that a prompt of these blocks is sent to *worker*."""
        for name in names:
            holders = self._holders.setdefault(name, {})
            use = holders.pop(worker, _EXPECTED)  # re-inserted as the newest
            holders[worker] = use if self._is_cached(use, worker) else _EXPECTED
            if len(holders) > _MAX_HOLDERS:
                del holders[next(iter(holders))]
            self._holders.move_to_end(name)
        while len(self._holders) > self._limit:
            self._holders.popitem(last=False)

    def record_prefill(self, names: Sequence[int], worker: str, cached: int, grain: int) -> None:
        """Record that *worker* has computed a prompt of these blocks.

        cached   the prompt tokens that the worker had cached before
        grain    the block size of the worker's cache, in tokens; 0 if it shares no blocks
        """
        known = 0
        for name in names:
            if self._use(name, worker) == _EXPECTED:
                break
            known += 1
        if grain and cached < known * BLOCK // grain * grain:
            lost = self._use(names[cached // BLOCK], worker)
            self._evicted[worker] = max(lost, self._evicted.get(worker, 0))
        self._uses += 1
        for name in names:
            if worker in (holders := self._holders.get(name, {})):
                holders[worker] = self._uses

    def cached_tokens(self, names: Sequence[int], worker: str) -> int:
        """Return an estimate of how many tokens of a prompt of these blocks *worker* has cached."""
        count = 0
        for name in names:
            use = self._holders.get(name, {}).get(worker)
            if use is None or not self._is_cached(use, worker):
                break
            count += 1
        return count * BLOCK

    def forget(self, worker: str) -> None:
        """Drop what is known of *worker*: it restarted or was removed."""
        self._evicted.pop(worker, None)
        for name, holders in list(self._holders.items()):
            if holders.pop(worker, None) is not None and not holders:
                del self._holders[name]

    def _use(self, name: int, worker: str) -> int:
        use = self._holders.get(name, {}).get(worker, _EXPECTED)
        return use if self._is_cached(use, worker) else _EXPECTED

    def _is_cached(self, use: int, worker: str) -> bool:
        return use == _EXPECTED or use > self._evicted.get(worker, _EXPECTED)
