"""Account for the blocks of KV memory: which are free, who shares one, and which prefixes are cached.

The engine owns the memory itself; here are only block numbers. A full block is cached under its contents:
its ids and all ids before them. A prompt that shares a prefix with an earlier one (a system prompt, a chat
so far) starts after that prefix (as in vLLM, Kwon et al., SOSP 2023). A cached block that no sequence uses
stays in the cache until its memory is needed; the least recently used one is evicted first. Plain data: no
clock, no thread, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct

# Identifies what precedes a block: the scope for a sequence's first block, and for later ones the number of
# the prefix that ends with the block before. A number is never reused.
Prefix = int | bytes

# A full block is cached under what precedes it and its own ids. Equal keys therefore mean equal scopes and
# equal ids from the first on: keys cannot collide, and no block is found from another scope.
BlockKey = tuple[Prefix, bytes]

_NO_PREFIX = 0


class BlockPool:
    """All blocks of one engine: reference-counted, and cached by their contents once full.

    blocks         number of blocks; they are numbered from 0
    block_tokens   tokens per block
    prefix_cache   whether full blocks are cached
    """

    def __init__(self, blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self._pack = Struct(f"{block_tokens}I").pack
        self._references = [0] * blocks
        self._keys: list[BlockKey | None] = [None] * blocks
        self._prefixes = [_NO_PREFIX] * blocks  # the number of the prefix that ends with the block
        self._cached: dict[BlockKey, int] = {}
        self._last_prefix = _NO_PREFIX
        # Lowest number first keeps the memory in use dense.
        self._free = list(range(blocks - 1, -1, -1))
        # Unreferenced but cached, least recently used first. A sequence that references a block references
        # those before it too, and releases the last one first: so no block is ahead of its continuations.
        self._evictable: dict[int, None] = {}
        self._versions = 0

    @property
    def available(self) -> int:
        """Number of unreferenced blocks, cached or not."""
        return len(self._free) + len(self._evictable)

    @property
    def cached(self) -> int:
        """Number of cached blocks, referenced or not."""
        return len(self._cached)

    def match(self, ids: Sequence[int], scope: bytes = b"", *, readable: int | None = None) -> list[int]:
        """Find the blocks of the longest prefix cached in *scope*, excluding the block of the last id.

        readable   most ids of the prefix; None for no limit

        The last id must be computed, because its logits give the next token.
        """
        found: list[int] = []
        if not self.prefix_cache:
            return found
        prefix: Prefix = scope
        most = len(ids) - 1 if readable is None else min(len(ids) - 1, readable)
        for index in range(most // self.block_tokens):
            block = self._cached.get(self.key(prefix, ids, index))
            if block is None:
                break
            found.append(block)
            prefix = self._prefixes[block]
        return found

    def need(self, tokens: int, found: Sequence[int]) -> int:
        """Return how many available blocks a sequence with this many ids uses up, given its cached blocks."""
        return -(-tokens // self.block_tokens) - sum(self._references[block] > 0 for block in found)

    def key(self, prefix: Prefix, ids: Sequence[int], index: int) -> BlockKey:
        """Return the cache key of block *index* of a sequence with these ids; *prefix* precedes it."""
        begin = index * self.block_tokens
        return prefix, self._pack(*ids[begin : begin + self.block_tokens])

    def find(self, key: BlockKey) -> int | None:
        """Return the cached block with these contents, if there is one."""
        return self._cached.get(key)

    def prefix(self, block: int) -> int:
        """Return the number of the prefix that ends with a cached block."""
        return self._prefixes[block]

    def allocate(self, count: int) -> list[int]:
        """Allocate blocks. Raises IndexError if fewer are available."""
        if count > self.available:
            raise IndexError(f"{count} blocks requested, {self.available} available")
        allocated = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._evictable))
                del self._evictable[block]
                self._uncache(block)
            self._references[block] = 1
            allocated.append(block)
        return allocated

    def share(self, block: int) -> None:
        """Add a reference to a cached block."""
        if not self._references[block]:
            del self._evictable[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of a sequence's blocks, given in the sequence's order."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def cache(self, block: int, key: BlockKey) -> int:
        """Add a full block to the cache. Returns the number of the prefix that ends with it."""
        self._last_prefix += 1
        self._keys[block] = key
        self._cached[key] = block
        self._prefixes[block] = self._last_prefix
        return self._last_prefix

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Remove referenced blocks from the cache. Their continuations can no longer be found either."""
        for block in blocks:
            self._uncache(block)

    def _uncache(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._cached[key]
            self._keys[block] = None
            self._prefixes[block] = _NO_PREFIX

    def next_version(self) -> int:
        """Return a number that identifies the contents of a block table, and no other's."""
        self._versions += 1
        return self._versions

    def check(self, used: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError if the accounting is wrong for sequences that use these blocks. For tests."""
        references = [0] * self.blocks
        for blocks in used:
            for block in blocks:
                references[block] += 1
        assert references == self._references, "the reference counts do not match the sequences"
        free, evictable = set(self._free), set(self._evictable)
        unused = {block for block in range(self.blocks) if not references[block]}
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(evictable)
        assert free | evictable == unused, "a block leaked"
        assert all(self._keys[block] is None for block in free), "a free block is cached"
        assert all(self._keys[block] is not None for block in evictable), "an evictable block is not cached"
        assert {block: key for key, block in self._cached.items()} == {
            block: key for block, key in enumerate(self._keys) if key is not None
        }


class BlockTable:
    """The blocks of one sequence, in order.

    found     cached blocks of its prefix, from `BlockPool.match`. The other ids get blocks of their own;
              `BlockPool.need` returns how many must be available
    scope     within which its blocks are cached
    blocks    their numbers
    end       position after the first block that is not cached
    version   see `Row`
    """

    __slots__ = ("_pool", "_prefix", "_published", "blocks", "end", "version")

    def __init__(self, pool: BlockPool, ids: Sequence[int], found: Sequence[int], scope: bytes = b"") -> None:
        self._pool = pool
        self.version = pool.next_version()
        for block in found:
            pool.share(block)
        own = -(-len(ids) // pool.block_tokens) - len(found)
        self.blocks = [*found, *pool.allocate(own)]
        self._published = len(found)  # how many of the blocks, from the first on, are cached
        self.end = (self._published + 1) * pool.block_tokens
        # Precedes the next block.
        self._prefix: Prefix = pool.prefix(found[-1]) if found else scope

    def grow(self) -> None:
        """Allocate one more block; one must be available."""
        self.blocks += self._pool.allocate(1)

    @property
    def published_tokens(self) -> int:
        """Number of ids in the cached blocks."""
        return self._published * self._pool.block_tokens

    def publish(self, ids: Sequence[int], confirmed: int, readable: int | None = None) -> int:
        """Add full blocks to the prefix cache, and adopt those that other sequences have cached since.

        confirmed   how many of the ids are in KV memory, written by steps that have returned without a fault
        readable    how many of the ids may be adopted instead of computed; None for all but the last

        A block whose contents are cached already is exchanged for the cached one. So equal contents are kept
        once, and a sequence that references a block references the cached ones before it. The exchanged block
        is free at once, even if a launched step still writes it: later steps are computed later.

        Returns how many ids are confirmed afterwards. The last id stays uncomputed if it was.
        """
        pool = self._pool
        if not pool.prefix_cache:
            return confirmed
        while True:
            end = self.end
            if end > confirmed and (end >= len(ids) or (readable is not None and end > readable)):
                return confirmed
            key = pool.key(self._prefix, ids, self._published)
            found = pool.find(key)
            if found is not None:
                pool.share(found)
                own, self.blocks[self._published] = self.blocks[self._published], found
                pool.release([own])
                self.version = pool.next_version()
                self._prefix = pool.prefix(found)
            elif end <= confirmed:
                self._prefix = pool.cache(self.blocks[self._published], key)
            else:
                return confirmed
            self._published += 1
            self.end += pool.block_tokens
            confirmed = max(confirmed, end)

    def next_key(self, ids: Sequence[int], readable: int | None = None) -> BlockKey | None:
        """Return the key of the first block that is not cached; None if it cannot be shared.

        readable   how many of the ids may be adopted, see `publish`
        """
        if not self._pool.prefix_cache or self.end >= len(ids):
            return None
        if readable is not None and self.end > readable:
            return None
        return self._pool.key(self._prefix, ids, self._published)

    def release(self) -> None:
        """Release all blocks; the table must not be used afterwards."""
        self._pool.release(self.blocks)
        self.blocks = []

    def invalidate(self) -> None:
        """Remove the blocks from the cache, because their contents may be wrong."""
        self._pool.invalidate(self.blocks)
