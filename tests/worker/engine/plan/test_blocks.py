"""The books of KV memory: what is shared, what is found again, and what goes first."""

from __future__ import annotations

import pytest

from headrace.worker.engine.plan.blocks import BlockPool, BlockTable

IDS = list(range(100, 112))  # three full blocks of four


def begun(pool: BlockPool, ids: list[int]) -> BlockTable:
    """A sequence that has computed nothing itself."""
    return BlockTable(pool, ids, pool.match(ids))


def computed(pool: BlockPool, ids: list[int]) -> BlockTable:
    """A sequence that has computed all its ids."""
    table = begun(pool, ids)
    assert table.settle(ids, len(ids)) == len(ids)
    return table


def found(pool: BlockPool, ids: list[int]) -> int:
    """How many ids of a sequence would be found."""
    return len(pool.match(ids)) * pool.block_tokens


def test_only_equal_beginnings_are_found_and_never_the_last_token() -> None:
    pool = BlockPool(16, 4)
    held = computed(pool, IDS)

    assert found(pool, [*IDS, 1]) == 12
    assert found(pool, IDS) == 8, "the last token is left to compute"
    assert found(pool, [*IDS[:6], 0, 0, 0]) == 4
    assert found(pool, [0, *IDS]) == 0
    assert found(pool, [*IDS[4:], 1]) == 0, "equal ids behind another beginning are something else"
    pool.check([held.blocks])


def test_a_shared_block_is_held_until_the_last_one_gives_it_back() -> None:
    pool = BlockPool(8, 4)
    first = computed(pool, IDS)
    assert pool.need(13, pool.match([*IDS, 1])) == 1
    second = begun(pool, [*IDS, 1])
    assert second.blocks[:3] == first.blocks
    assert pool.available == 4

    first.empty()
    assert pool.available == 4
    pool.check([second.blocks])
    second.empty()

    assert (pool.available, pool.cached) == (8, 3)
    assert pool.need(13, pool.match([*IDS, 1])) == 4, "what nobody holds counts as available"
    pool.check([])


def test_what_was_not_used_longest_goes_first_and_from_its_end() -> None:
    pool = BlockPool(6, 4)
    old, new = list(range(9)), list(range(50, 59))  # two full blocks each, and one that is not
    computed(pool, old).empty()
    computed(pool, new).empty()
    begun(pool, old).empty()  # used again
    assert pool.available == 6

    pool.take(3)
    assert (found(pool, new), found(pool, old)) == (4, 8)
    pool.take(1)
    assert (found(pool, new), found(pool, old)) == (0, 8)
    pool.take(1)
    assert (found(pool, new), found(pool, old[:5])) == (0, 4)
    with pytest.raises(IndexError, match="2 blocks asked for, 1 available"):
        pool.take(2)


def test_contents_that_two_computed_at_once_are_kept_once() -> None:
    pool = BlockPool(8, 4)
    first, second = begun(pool, IDS), begun(pool, IDS)
    assert pool.available == 2

    for table in (first, second):
        assert table.settle(IDS, 12) == 12

    assert second.blocks == first.blocks
    assert pool.available == 5
    pool.check([first.blocks, second.blocks])


def test_a_sequence_goes_on_behind_what_another_has_computed_meanwhile() -> None:
    pool = BlockPool(8, 4)
    slow = begun(pool, IDS)
    fast = computed(pool, [*IDS[:10], 1])

    assert slow.settle(IDS, 2) == 8, "the third block is its own"
    assert slow.blocks[:2] == fast.blocks[:2]
    assert slow.blocks[2] != fast.blocks[2]
    pool.check([slow.blocks, fast.blocks])


def test_what_is_forgotten_is_not_found_nor_is_what_continues_it() -> None:
    pool = BlockPool(12, 4)
    broken = computed(pool, IDS[:8])
    other = computed(pool, IDS)
    broken.forget()
    broken.empty()

    assert found(pool, [*IDS, 1]) == 0
    pool.check([other.blocks])
    other.empty()
    assert pool.available == 12
    again = computed(pool, IDS)
    assert found(pool, [*IDS, 1]) == 12
    pool.check([again.blocks])


def test_an_evicted_block_with_a_number_used_again_is_not_mistaken_for_itself() -> None:
    pool = BlockPool(2, 4)
    computed(pool, IDS[:8]).empty()
    computed(pool, list(range(8))).empty()  # both numbers now hold something else

    assert found(pool, IDS[:8]) == 0
    assert found(pool, list(range(8))) == 4


def test_without_prefix_cache_nothing_is_found_or_kept() -> None:
    pool = BlockPool(4, 4, prefix_cache=False)
    table = computed(pool, IDS)
    table.empty()

    assert (pool.cached, pool.available) == (0, 4)
    assert found(pool, IDS) == 0


def test_equal_beginnings_are_found_within_their_scope_and_not_across() -> None:
    pool, ids = BlockPool(24, 4), list(range(12))
    tables = {}
    for scope in (b"", b"a", b"b"):
        assert pool.match(ids, scope) == []
        tables[scope] = BlockTable(pool, ids, [], scope)
        tables[scope].settle(ids, 12)
    for scope, table in tables.items():
        assert pool.match(ids, scope) == table.blocks[:2], "two whole blocks before the last id's"
    assert len({block for table in tables.values() for block in table.blocks}) == 9
    pool.check([table.blocks for table in tables.values()])
