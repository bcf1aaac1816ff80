"""Keep the books of KV memory: which blocks are free, who shares one, and which prefixes are computed.

The engine holds the memory itself; here are only block numbers. A block that is full may be found again
by what was computed in it: its ids and all ids before them, so that a prompt that begins like an
earlier one (a system prompt, a chat so far) starts behind what they share (as in vLLM, Kwon et al., SOSP
2023). Blocks that nobody holds stay findable until their room is needed; the longest unused goes first.
Plain data: no clock, no thread, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct

# What stands before a block: for a sequence's first block its scope, for later ones the number of the prefix
# that ends with the block before. Numbers are drawn once and never again.
Prefix = int | bytes

# What a full block is found by: what stands before it, and its own ids. So equal keys mean equal scopes, and
# equal ids from the first on: nothing can collide, and nothing is found across scopes.
Key = tuple[Prefix, bytes]

_NO_PREFIX = 0


class BlockPool:
    """All blocks of one engine: reference-counted, and findable by their contents once full.

    blocks         how many there are; they are numbered from 0
    block_tokens   tokens in each
    prefix_cache   whether full blocks are found again
    """

    def __init__(self, blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self._pack = Struct(f"{block_tokens}I").pack
        self._holders = [0] * blocks
        self._keys: list[Key | None] = [None] * blocks
        self._prefixes = [_NO_PREFIX] * blocks  # the number of the prefix that ends with the block
        self._found: dict[Key, int] = {}
        self._drawn = _NO_PREFIX
        # Lowest number first keeps the memory in use dense.
        self._free = list(range(blocks - 1, -1, -1))
        # Held by nobody, but findable; the longest unused first. Whoever holds a block holds those before it
        # too, and gives back the last one first: so no block comes before one that continues it.
        self._idle: dict[int, None] = {}

    @property
    def available(self) -> int:
        """Blocks that nobody holds, whether findable or not."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by their contents, held or not."""
        return len(self._found)

    def match(self, ids: Sequence[int], scope: bytes = b"") -> list[int]:
        """Find the blocks of the longest prefix computed in *scope*, the block of the last id excluded.

        For whoever draws the token behind the last id needs that one computed.
        """
        found: list[int] = []
        if not self.prefix_cache:
            return found
        prefix: Prefix = scope
        for index in range((len(ids) - 1) // self.block_tokens):
            block = self._found.get(self.key(prefix, ids, index))
            if block is None:
                break
            found.append(block)
            prefix = self._prefixes[block]
        return found

    def need(self, tokens: int, found: Sequence[int]) -> int:
        """How many of the available blocks a sequence of so many ids uses up that shares what was found."""
        return -(-tokens // self.block_tokens) - sum(self._holders[block] > 0 for block in found)

    def key(self, prefix: Prefix, ids: Sequence[int], index: int) -> Key:
        """What block *index* of a sequence with these ids is found by; *prefix* stands before it."""
        begin = index * self.block_tokens
        return prefix, self._pack(*ids[begin : begin + self.block_tokens])

    def find(self, key: Key) -> int | None:
        """The block with these contents."""
        return self._found.get(key)

    def prefix(self, block: int) -> int:
        """The number of the prefix that ends with a findable block."""
        return self._prefixes[block]

    def take(self, count: int) -> list[int]:
        """Hand out blocks; raises IndexError when fewer are available."""
        if count > self.available:
            raise IndexError(f"{count} blocks asked for, {self.available} available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._idle))
                del self._idle[block]
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        """Hold a findable block together with whoever holds it already."""
        if not self._holders[block]:
            del self._idle[block]
        self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Hold a sequence's blocks no longer; they come in the sequence's order."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def register(self, block: int, key: Key) -> int:
        """Make a full block findable; returns the number of the prefix that ends with it."""
        self._drawn += 1
        self._keys[block] = key
        self._found[key] = block
        self._prefixes[block] = self._drawn
        return self._drawn

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find these blocks any more; they must be held. What continues them is lost with them."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._found[key]
            self._keys[block] = None
            self._prefixes[block] = _NO_PREFIX

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books are right for sequences that hold these blocks. For tests."""
        holders = [0] * self.blocks
        for blocks in held:
            for block in blocks:
                holders[block] += 1
        assert holders == self._holders, "the blocks' holders are not the sequences"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(idle)
        assert free | idle == {block for block in range(self.blocks) if not holders[block]}, "a block leaked"
        assert all(self._keys[block] is None for block in free), "a free block can be found"
        assert all(self._keys[block] is not None for block in idle), "an idle block cannot be found"
        assert {block: key for key, block in self._found.items()} == {
            block: key for block, key in enumerate(self._keys) if key is not None
        }


class BlockTable:
    """The blocks of one sequence, in order.

    found    blocks of its beginning, from `BlockPool.match`: shared. The other ids get blocks of their own,
             and `BlockPool.need` says how many must be available
    scope    within which its blocks are found again
    blocks   their numbers
    """

    __slots__ = ("_pool", "_prefix", "_settled", "blocks")

    def __init__(self, pool: BlockPool, ids: Sequence[int], found: Sequence[int], scope: bytes = b"") -> None:
        self._pool = pool
        for block in found:
            pool.share(block)
        own = -(-len(ids) // pool.block_tokens) - len(found)
        self.blocks = [*found, *pool.take(own)]
        self._settled = len(found)  # how many of the blocks, from the first on, are findable
        # What stands before the next one.
        self._prefix: Prefix = pool.prefix(found[-1]) if found else scope

    def grow(self) -> None:
        """Get one more block; one must be available."""
        self.blocks += self._pool.take(1)

    @property
    def settled_tokens(self) -> int:
        """Ids in the findable blocks."""
        return self._settled * self._pool.block_tokens

    def settle(self, ids: Sequence[int], computed: int) -> int:
        """Make full blocks findable, and go on to what others have computed by now.

        computed   how many of the ids are in KV memory

        A block whose contents can be found elsewhere already is exchanged for that one, so that equal
        contents are held once, and who holds a block holds the findable ones before it.

        Returns how many ids are computed then; it leaves the last to compute if it was.
        """
        pool, size = self._pool, self._pool.block_tokens
        if not pool.prefix_cache:
            return computed
        while True:
            ends = (self._settled + 1) * size
            if ends > computed and ends >= len(ids):
                return computed
            key = pool.key(self._prefix, ids, self._settled)
            found = pool.find(key)
            if found is not None:
                pool.share(found)
                own, self.blocks[self._settled] = self.blocks[self._settled], found
                pool.give_back([own])
                self._prefix = pool.prefix(found)
            elif ends <= computed:
                self._prefix = pool.register(self.blocks[self._settled], key)
            else:
                return computed
            self._settled += 1
            computed = max(computed, ends)

    def next_key(self, ids: Sequence[int]) -> Key | None:
        """What the first block that is not findable would be found by; None where that is of no use."""
        if not self._pool.prefix_cache or (self._settled + 1) * self._pool.block_tokens >= len(ids):
            return None
        return self._pool.key(self._prefix, ids, self._settled)

    def empty(self) -> None:
        """Give all blocks back; the table is of no use any more."""
        self._pool.give_back(self.blocks)
        self.blocks = []

    def forget(self) -> None:
        """Let nobody find what is in these blocks: it may be wrong."""
        self._pool.forget(self.blocks)
