"""Requests are served by priority, then tenants in turn, then deadlines; none starves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace.batcher.waiting.order import LEVELS, FairOrder
from headrace.deadline import NEVER, Deadline

AGEING = 10.0
QUANTUM = 100
_names = count()


@dataclass(frozen=True, eq=False)
class Item:
    """A waiting request."""

    priority: int = 5
    tenant: str = ""
    cost: int = 50
    arrived: float = 0.0
    deadline: Deadline = NEVER
    uncached: int = 10


ITEMS = st.builds(
    Item,
    priority=st.integers(0, LEVELS - 1),
    tenant=st.sampled_from("abc"),
    cost=st.integers(1, 300),
    deadline=st.just(NEVER) | st.builds(Deadline, st.floats(1, 1000)),
    uncached=st.integers(1, 300),
)


def filled(*items: Item) -> FairOrder[Item]:
    queue: FairOrder[Item] = FairOrder(ageing=AGEING, quantum=QUANTUM)
    for item in items:
        queue.put(item)
    return queue


def emptied(queue: FairOrder[Item], now: float = 0.0) -> list[Item]:
    order = []
    while (item := queue.head(now)) is not None:
        queue.take(item)
        order.append(item)
    return order


@given(items=st.lists(ITEMS, max_size=40))
def test_each_request_is_served_once_in_order_of_priority(items: list[Item]) -> None:
    order = emptied(filled(*items))

    assert sorted(map(id, order)) == sorted(map(id, items))
    assert [item.priority for item in order] == sorted((item.priority for item in items), reverse=True)


@given(items=st.lists(ITEMS, max_size=40))
def test_within_a_tenant_and_priority_the_earliest_deadline_is_first(items: list[Item]) -> None:
    served: dict[tuple[int, str], list[float]] = {}
    for item in emptied(filled(*items)):
        deadline = item.deadline.at if item.deadline.exists else item.arrived + 600
        served.setdefault((item.priority, item.tenant), []).append(deadline)

    assert all(deadlines == sorted(deadlines) for deadlines in served.values())


@given(costs=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 300), min_size=30), min_size=2))
def test_the_service_of_waiting_tenants_differs_by_a_turn_at_most(costs: dict[str, list[int]]) -> None:
    """The bound of deficit round robin, for jobs of any size: the quantum and the largest job."""
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
def test_no_request_starves_under_a_stream_of_higher_priorities(priority: int, rivals: int) -> None:
    """Each second brings more work of higher priority than can be served; the old request is still served."""
    old = Item(priority=priority, tenant="old", deadline=Deadline(10_000.0))
    queue = filled(old)
    for second in range(200):
        now = float(second)
        for _ in range(rivals):
            queue.put(Item(priority=9, tenant="new", arrived=now, deadline=Deadline(now + 5)))
        head = queue.head(now)
        assert head is not None
        queue.take(head)
        if head is old:
            assert now <= (9 - priority + 1) * AGEING
            return
    raise AssertionError("the old request starved")


def test_an_interrupted_answer_does_not_count_as_waiting() -> None:
    queue = filled(Item(priority=9))
    answer = Item(priority=0)
    queue.put_back(answer)

    assert queue.waiting == 1
    assert queue.interrupted == [answer]
    queue.take(answer)
    assert len(queue) == 1


def test_reading_the_head_does_not_change_it() -> None:
    queue = filled(Item(tenant="a", cost=90), Item(tenant="b", cost=90), Item(tenant="a", cost=90))

    assert queue.head(0) is queue.head(0)


@given(items=st.lists(ITEMS, max_size=30), newcomer=ITEMS)
def test_ahead_of_counts_no_more_than_is_served_before_a_newcomer(items: list[Item], newcomer: Item) -> None:
    queue = filled(*items)
    jobs, tokens = queue.ahead_of(newcomer)
    higher = [item for item in items if item.priority > newcomer.priority]

    assert len(higher) <= jobs <= len(items)
    assert sum(item.uncached for item in higher) <= tokens <= sum(item.uncached for item in items), (
        "answer tokens of other requests do not count"
    )


class Changes(RuleBasedStateMachine):
    """Requests arrive, leave, are served and rise in any order, and the counts stay right."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairOrder[Item] = FairOrder(ageing=AGEING, quantum=QUANTUM)
        self.present: list[Item] = []
        self.now = 0.0

    @rule(item=ITEMS)
    def arrive(self, item: Item) -> None:
        item = Item(item.priority, item.tenant, item.cost, self.now, item.deadline)
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
    def counts_agree(self) -> None:
        assert set(self.queue) == set(self.present)
        assert sum(self.queue.counts().values()) == len(self.present)
        assert len(self.queue._rising) <= 2 * len(self.present) + 17


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
