"""Shed requests have the lowest priority, or belong to a tenant that holds more than the newcomer's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.waiting.order import FairOrder
from headrace.batcher.waiting.shedding import victims
from tests.batcher.waiting.test_order import ITEMS, Item, filled


def one_victim(queue: FairOrder[Item], newcomer: Item) -> Item | None:
    """Return the request that is shed if one place is needed."""
    chosen = victims([queue], newcomer, 1)
    return chosen[0] if chosen else None


@given(items=st.lists(ITEMS, min_size=1, max_size=30), newcomer=ITEMS)
def test_the_shed_request_has_a_lower_priority_or_a_tenant_that_holds_more(
    items: list[Item], newcomer: Item
) -> None:
    victim = one_victim(filled(*items), newcomer)
    lowest = min(item.priority for item in items)
    held = {tenant: sum(item.tenant == tenant for item in items) for tenant in "abc"}

    if victim is None:
        assert lowest >= newcomer.priority
        if lowest == newcomer.priority:
            rivals = {item.tenant for item in items if item.priority == lowest}
            assert all(held[tenant] <= held[newcomer.tenant] + 1 for tenant in rivals)
    else:
        assert victim.priority == lowest <= newcomer.priority
        if lowest == newcomer.priority:
            assert held[victim.tenant] >= held[newcomer.tenant] + 2


def test_a_flood_is_shed_for_a_quiet_tenant_until_shares_are_equal() -> None:
    flood = [Item(tenant="flood") for _ in range(8)]
    queue = filled(*flood)
    for _ in range(4):
        quiet = Item(tenant="quiet")
        victim = one_victim(queue, quiet)
        assert victim is not None
        assert victim.tenant == "flood"
        queue.discard(victim)
        queue.put(quiet)

    assert one_victim(queue, Item(tenant="quiet")) is None
    assert one_victim(queue, Item(tenant="flood")) is None


@given(
    items=st.lists(ITEMS, min_size=1, max_size=30),
    split=st.integers(0, 30),
    newcomer=ITEMS,
)
def test_the_shed_request_does_not_depend_on_its_waiting_place(
    items: list[Item], split: int, newcomer: Item
) -> None:
    whole = victims([filled(*items)], newcomer, 1)
    apart = victims([filled(*items[:split]), filled(*items[split:])], newcomer, 1)

    assert (whole is None) == (apart is None)
    if whole and apart:
        assert [(one.priority, one.tenant, one.deadline) for one in whole] == [
            (one.priority, one.tenant, one.deadline) for one in apart
        ]


@given(items=st.lists(ITEMS, min_size=1, max_size=30), newcomer=ITEMS, needed=st.integers(0, 2000))
def test_no_more_is_shed_than_needed_and_no_tenant_falls_below_the_newcomers(
    items: list[Item], newcomer: Item, needed: int
) -> None:
    chosen = victims([filled(*items)], newcomer, needed, lambda item: item.cost)
    if chosen is None:
        return

    assert len(set(map(id, chosen))) == len(chosen)
    assert sum(item.cost for item in chosen) >= needed
    assert sum(item.cost for item in chosen[:-1]) < max(needed, 1)
    assert all(item.priority <= newcomer.priority for item in chosen)
    own = sum(item.cost for item in items if item.tenant == newcomer.tenant and item not in chosen)
    for item in chosen:
        if item.priority == newcomer.priority:
            before = sum(one.cost for one in items if one.tenant == item.tenant)
            assert before > own + newcomer.cost or item.tenant == newcomer.tenant
