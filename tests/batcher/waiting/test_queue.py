"""Order: priorities, then tenants in turn, then deadlines; nobody for ever; and who goes when it is full."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace.batcher.waiting.queue import LEVELS, JobQueue, victims

AGEING = 10.0
QUANTUM = 100
_names = count()


@dataclass(frozen=True, eq=False)
class Item:
    """What the queue sees of a job."""

    priority: int = 5
    tenant: str = ""
    cost: int = 50
    arrived: float = 0.0
    expires: float | None = None
    uncached: int = 10


ITEMS = st.builds(
    Item,
    priority=st.integers(0, LEVELS - 1),
    tenant=st.sampled_from("abc"),
    cost=st.integers(1, 300),
    expires=st.none() | st.floats(1, 1000),
    uncached=st.integers(1, 300),
)


def filled(*items: Item, limit: int = 1000) -> JobQueue[Item]:
    queue: JobQueue[Item] = JobQueue(limit, ageing=AGEING, quantum=QUANTUM)
    for item in items:
        queue.put(item)
    return queue


def one_victim(queue: JobQueue[Item], newcomer: Item) -> Item | None:
    """Who gives way if one place is needed."""
    chosen = victims([queue], newcomer, 1)
    return chosen[0] if chosen else None


def emptied(queue: JobQueue[Item], now: float = 0.0) -> list[Item]:
    order = []
    while (item := queue.head(now)) is not None:
        queue.take(item)
        order.append(item)
    return order


@given(items=st.lists(ITEMS, max_size=40))
def test_everybody_is_served_once_and_priorities_never_go_backwards(items: list[Item]) -> None:
    order = emptied(filled(*items))

    assert sorted(map(id, order)) == sorted(map(id, items))
    assert [item.priority for item in order] == sorted((item.priority for item in items), reverse=True)


@given(items=st.lists(ITEMS, max_size=40))
def test_within_a_tenant_and_priority_the_earliest_deadline_is_first(items: list[Item]) -> None:
    served: dict[tuple[int, str], list[float]] = {}
    for item in emptied(filled(*items)):
        deadline = item.expires if item.expires is not None else item.arrived + 600
        served.setdefault((item.priority, item.tenant), []).append(deadline)

    assert all(deadlines == sorted(deadlines) for deadlines in served.values())


@given(costs=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 300), min_size=30), min_size=2))
def test_while_tenants_wait_their_service_differs_by_a_turn_at_most(costs: dict[str, list[int]]) -> None:
    """The bound of deficit round robin: quantum and largest job, whatever the jobs' sizes."""
    queue = filled(*[Item(tenant=tenant, cost=cost) for tenant, sizes in costs.items() for cost in sizes])
    served = dict.fromkeys(costs, 0)
    waiting = {tenant: len(sizes) for tenant, sizes in costs.items()}
    largest = max(cost for sizes in costs.values() for cost in sizes)
    while all(waiting.values()):
        item = queue.head(0.0)
        assert item is not None
        queue.take(item)
        served[item.tenant] += item.cost
        waiting[item.tenant] -= 1
        assert max(served.values()) - min(served.values()) <= 2 * (QUANTUM + largest)


@given(priority=st.integers(0, 8), rivals=st.integers(1, 5))
def test_nobody_starves_however_many_more_urgent_ones_keep_coming(priority: int, rivals: int) -> None:
    """Each second brings more urgent work than can be served; the old job has its turn all the same."""
    old = Item(priority=priority, tenant="old", expires=10_000.0)
    queue = filled(old)
    for second in range(200):
        now = float(second)
        for _ in range(rivals):
            queue.put(Item(priority=9, tenant="new", arrived=now, expires=now + 5))
        head = queue.head(now)
        assert head is not None
        queue.take(head)
        if head is old:
            assert now <= (9 - priority + 1) * AGEING
            return
    raise AssertionError("it starved")


def test_an_answer_that_had_begun_stands_apart_and_needs_no_place() -> None:
    queue = filled(Item(priority=9), limit=1)
    broken = Item(priority=0)
    queue.put_back(broken)

    assert queue.waiting == 1
    assert queue.begun == [broken]
    queue.take(broken)
    assert len(queue) == 1


def test_asking_who_is_next_changes_nothing() -> None:
    queue = filled(Item(tenant="a", cost=90), Item(tenant="b", cost=90), Item(tenant="a", cost=90))

    assert queue.head(0) is queue.head(0)


@given(items=st.lists(ITEMS, min_size=1, max_size=30), newcomer=ITEMS)
def test_who_gives_way_is_less_urgent_or_of_a_tenant_that_has_more(items: list[Item], newcomer: Item) -> None:
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


def test_a_flood_gives_way_to_a_quiet_tenant_until_shares_are_even() -> None:
    flood = [Item(tenant="flood") for _ in range(8)]
    queue = filled(*flood, limit=8)
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
def test_who_gives_way_does_not_depend_on_which_queue_it_waits_in(
    items: list[Item], split: int, newcomer: Item
) -> None:
    whole = victims([filled(*items)], newcomer, 1)
    apart = victims([filled(*items[:split]), filled(*items[split:])], newcomer, 1)

    assert (whole is None) == (apart is None)
    if whole and apart:
        assert [(one.priority, one.tenant, one.expires) for one in whole] == [
            (one.priority, one.tenant, one.expires) for one in apart
        ]


@given(items=st.lists(ITEMS, min_size=1, max_size=30), newcomer=ITEMS, needed=st.integers(0, 2000))
def test_as_many_give_way_as_are_needed_by_weight_and_no_tenant_falls_below_the_newcomers(
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


@given(items=st.lists(ITEMS, max_size=30), newcomer=ITEMS)
def test_no_more_is_counted_ahead_than_is_served_ahead_of_a_newcomer(
    items: list[Item], newcomer: Item
) -> None:
    queue = filled(*items)
    jobs, tokens = queue.ahead_of(newcomer)
    more_urgent = [item for item in items if item.priority > newcomer.priority]

    assert len(more_urgent) <= jobs <= len(items)
    assert sum(item.uncached for item in more_urgent) <= tokens <= sum(item.uncached for item in items), (
        "answers are not computed before a first token"
    )


class Comings(RuleBasedStateMachine):
    """Jobs come, leave, are served and rise in any order: the queue's books stay right."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: JobQueue[Item] = JobQueue(1000, ageing=AGEING, quantum=QUANTUM)
        self.present: list[Item] = []
        self.now = 0.0

    @rule(item=ITEMS)
    def come(self, item: Item) -> None:
        item = Item(item.priority, item.tenant, item.cost, self.now, item.expires)
        self.queue.put(item)
        self.present.append(item)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.present:
            item = data.draw(st.sampled_from(self.present))
            assert self.queue.discard(item)
            assert not self.queue.discard(item)
            self.present.remove(item)

    @rule()
    def serve(self) -> None:
        item = self.queue.head(self.now)
        assert (item is None) == (not self.present)
        if item is not None:
            self.queue.take(item)
            self.present.remove(item)

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def books_agree(self) -> None:
        assert set(self.queue) == set(self.present)
        assert sum(self.queue.counts().values()) == len(self.present)
        assert len(self.queue._rising) <= 2 * len(self.present) + 17


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
