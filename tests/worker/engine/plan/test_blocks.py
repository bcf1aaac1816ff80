"""The accounting of KV blocks: what is shared, what is cached, and what is evicted first."""

from __future__ import annotations

import pytest

from headrace.worker.engine.plan.blocks import BlockPool, BlockTable

IDS = list(range(100, 112))  # three full blocks of four


def started(pool: BlockPool, ids: list[int]) -> BlockTable:
    """Return a sequence's blocks before it has computed anything."""
    return BlockTable(pool, ids, pool.match(ids))


def computed(pool: BlockPool, ids: list[int]) -> BlockTable:
    """Return a sequence's blocks after it has computed all its ids."""
    table = started(pool, ids)
    assert table.publish(ids, len(ids)) == len(ids)
    return table


def cached(pool: BlockPool, ids: list[int]) -> int:
    """Return how many ids of a sequence are cached."""
    return len(pool.match(ids)) * pool.block_tokens


def test_only_equal_prefixes_are_cached_and_never_the_last_token() -> None:
    pool = BlockPool(16, 4)
    held = computed(pool, IDS)

    assert cached(pool, [*IDS, 1]) == 12
    assert cached(pool, IDS) == 8, "the last token must be computed"
    assert cached(pool, [*IDS[:6], 0, 0, 0]) == 4
    assert cached(pool, [0, *IDS]) == 0
    assert cached(pool, [*IDS[4:], 1]) == 0, "equal ids after another prefix do not match"
    pool.check([held.blocks])


def test_a_shared_block_is_in_use_until_the_last_sequence_releases_it() -> None:
    pool = BlockPool(8, 4)
    first = computed(pool, IDS)
    assert pool.need(13, pool.match([*IDS, 1])) == 1
    second = started(pool, [*IDS, 1])
    assert second.blocks[:3] == first.blocks
    assert pool.available == 4

    first.release()
    assert pool.available == 4
    pool.check([second.blocks])
    second.release()

    assert (pool.available, pool.cached) == (8, 3)
    assert pool.need(13, pool.match([*IDS, 1])) == 4, "unreferenced blocks count as available"
    pool.check([])


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    pool = BlockPool(6, 4)
    old, new = list(range(9)), list(range(50, 59))  # two full blocks each, and one that is not
    computed(pool, old).release()
    computed(pool, new).release()
    started(pool, old).release()  # used again
    assert pool.available == 6

    pool.allocate(3)
    assert (cached(pool, new), cached(pool, old)) == (4, 8)
    pool.allocate(1)
    assert (cached(pool, new), cached(pool, old)) == (0, 8)
    pool.allocate(1)
    assert (cached(pool, new), cached(pool, old[:5])) == (0, 4)
    with pytest.raises(IndexError, match="2 blocks requested, 1 available"):
        pool.allocate(2)


def test_contents_that_two_sequences_computed_at_once_are_kept_once() -> None:
    pool = BlockPool(8, 4)
    first, second = started(pool, IDS), started(pool, IDS)
    assert pool.available == 2

    for table in (first, second):
        assert table.publish(IDS, 12) == 12

    assert second.blocks == first.blocks
    assert pool.available == 5
    pool.check([first.blocks, second.blocks])


def test_a_sequence_continues_after_what_another_has_computed_meanwhile() -> None:
    pool = BlockPool(8, 4)
    slow = started(pool, IDS)
    fast = computed(pool, [*IDS[:10], 1])

    assert slow.publish(IDS, 2) == 8, "the third block is its own"
    assert slow.blocks[:2] == fast.blocks[:2]
    assert slow.blocks[2] != fast.blocks[2]
    pool.check([slow.blocks, fast.blocks])


def test_the_version_of_a_table_changes_only_when_a_block_is_exchanged() -> None:
    """An engine uploads a table again only then."""
    pool = BlockPool(8, 4)
    slow, fast = started(pool, IDS), started(pool, [*IDS[:10], 1])
    versions = {slow.version, fast.version}
    fast.grow()
    fast.publish([*IDS[:10], 1], 11)
    assert len(versions) == 2
    assert fast.version in versions

    slow.publish(IDS, 2)

    assert slow.version not in versions


def test_invalidated_blocks_and_their_continuations_are_no_longer_cached() -> None:
    pool = BlockPool(12, 4)
    broken = computed(pool, IDS[:8])
    other = computed(pool, IDS)
    broken.invalidate()
    broken.release()

    assert cached(pool, [*IDS, 1]) == 0
    pool.check([other.blocks])
    other.release()
    assert pool.available == 12
    again = computed(pool, IDS)
    assert cached(pool, [*IDS, 1]) == 12
    pool.check([again.blocks])


def test_a_reused_block_number_does_not_match_the_evicted_contents() -> None:
    pool = BlockPool(2, 4)
    computed(pool, IDS[:8]).release()
    computed(pool, list(range(8))).release()  # both numbers now hold something else

    assert cached(pool, IDS[:8]) == 0
    assert cached(pool, list(range(8))) == 4


def test_without_prefix_cache_nothing_is_cached() -> None:
    pool = BlockPool(4, 4, prefix_cache=False)
    table = computed(pool, IDS)
    table.release()

    assert (pool.cached, pool.available) == (0, 4)
    assert cached(pool, IDS) == 0


def test_equal_prefixes_are_cached_per_scope() -> None:
    pool, ids = BlockPool(24, 4), list(range(12))
    tables = {}
    for scope in (b"", b"a", b"b"):
        assert pool.match(ids, scope) == []
        tables[scope] = BlockTable(pool, ids, [], scope)
        tables[scope].publish(ids, 12)
    for scope, table in tables.items():
        assert pool.match(ids, scope) == table.blocks[:2], "two whole blocks before the last id's"
    assert len({block for table in tables.values() for block in table.blocks}) == 9
    pool.check([table.blocks for table in tables.values()])
