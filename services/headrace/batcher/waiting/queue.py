"""Decide who is next, and who has to go when there are too many.

What waits is ordered by priority; within a priority tenants take turns by deficit round robin (Shreedhar
& Varghese, SIGCOMM 1995), counted in tokens; within a tenant the earliest deadline is first. What waits
long rises a priority every *ageing* seconds, so nothing starves. Answers that had begun when their worker
was lost stand before all others: somebody is reading them. Plain data; the caller brings the clock.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

LEVELS = 10
# A job without a deadline is taken for one that may wait this long, so that it keeps its place.
PATIENCE_SECONDS = 600.0


class Waiting(Protocol):
    """What a job shows to the queue. Compared by identity.

    cost      tokens that serving it is expected to take, at least 1
    uncached  tokens to compute before its first new one
    expires   time of the deadline, None for never
    """

    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def cost(self) -> int: ...
    @property
    def uncached(self) -> int: ...
    @property
    def arrived(self) -> float: ...
    @property
    def expires(self) -> float | None: ...


J = TypeVar("J", bound=Waiting)


@dataclass(slots=True)
class _Tenant(Generic[J]):
    """One tenant's jobs of one level, earliest deadline first; those that left are skipped."""

    jobs: list[tuple[float, int, J]] = field(default_factory=list)
    present: int = 0
    deficit: float = 0.0
    on_turn: bool = False  # has its quantum for this turn


@dataclass(slots=True)
class _Place:
    """Where a job stands."""

    level: int
    number: int


class JobQueue(Generic[J]):
    """Jobs that wait for a worker.

    limit     most jobs that may wait, those that had begun not counted
    ageing    seconds after which a job rises by one priority
    quantum   tokens that a tenant may take on its turn; smaller is fairer over short times
    """

    def __init__(self, limit: int, *, ageing: float = 10.0, quantum: int = 512) -> None:
        self.limit = limit
        self._ageing = ageing
        self._quantum = quantum
        self._numbers = count()
        self._begun: OrderedDict[J, None] = OrderedDict()
        self._places: dict[J, _Place] = {}
        self._levels: list[OrderedDict[str, _Tenant[J]]] = [OrderedDict() for _ in range(LEVELS)]
        self._rising: list[tuple[float, int, J]] = []

    def __len__(self) -> int:
        return len(self._begun) + len(self._places)

    def __iter__(self) -> Iterator[J]:
        """All that wait, in no particular order."""
        yield from self._begun
        yield from self._places

    def __contains__(self, job: J) -> bool:
        return job in self._begun or job in self._places

    @property
    def waiting(self) -> int:
        """How many wait that have not begun: those that the limit is for."""
        return len(self._places)

    def by_level(self) -> dict[int, list[J]]:
        """Those that have not begun, by priority as it is now, in no particular order."""
        levels: dict[int, list[J]] = {}
        for job, place in self._places.items():
            levels.setdefault(place.level, []).append(job)
        return levels

    @property
    def begun(self) -> list[J]:
        """Answers that wait to go on; they stand before everybody else."""
        return list(self._begun)

    def put(self, job: J) -> None:
        """Add a job. The queue may grow beyond its limit: see `victims`."""
        self._enter(job, job.priority, next(self._numbers))
        if job.priority < LEVELS - 1:
            heapq.heappush(self._rising, (job.arrived + self._ageing, self._places[job].number, job))

    def put_back(self, job: J) -> None:
        """Add a job that had begun; the limit is not for those."""
        self._begun[job] = None

    def discard(self, job: J) -> bool:
        """Remove a job wherever it stands; false if it is not here."""
        if job in self._begun:
            del self._begun[job]
            return True
        if job not in self._places:
            return False
        self._leave(job)
        return True

    def head(self, now: float) -> J | None:
        """Who is next of those that have not begun. The same again, unless somebody came, left or rose."""
        self._rise(now)
        for tenants in reversed(self._levels):
            if tenants:
                return self._turn(tenants)
        return None

    def take(self, job: J) -> None:
        """Remove *job*, which `head` or `begun` gave, and charge its tenant."""
        if job not in self._begun:
            tenant = self._levels[self._places[job].level][job.tenant]
            tenant.deficit -= job.cost
        self.discard(job)

    def ahead_of(self, newcomer: J) -> tuple[int, int]:
        """How many jobs are served before *newcomer*, not here yet, and how much is computed for them first.

        Rather too few than too many: of each other tenant of its priority as much as it has itself before
        it, for they take turns.
        """
        jobs, tokens = len(self._begun), sum(job.uncached for job in self._begun)
        own = (0, 0)
        others: dict[str, tuple[int, int]] = {}
        for job, place in self._places.items():
            if place.level > newcomer.priority:
                jobs, tokens = jobs + 1, tokens + job.uncached
            elif place.level < newcomer.priority:
                continue
            elif job.tenant != newcomer.tenant:
                number, sum_ = others.get(job.tenant, (0, 0))
                others[job.tenant] = (number + 1, sum_ + job.uncached)
            elif _deadline(job) <= _deadline(newcomer):
                own = (own[0] + 1, own[1] + job.uncached)
        for number, sum_ in others.values():
            jobs += min(number, own[0] + 1)
            tokens += min(sum_, own[1] + newcomer.uncached)
        return jobs + own[0], tokens + own[1]

    def oldest_wait(self, now: float) -> float:
        """How long the first to come has waited, in seconds."""
        return max((now - job.arrived for job in self), default=0.0)

    def counts(self) -> dict[tuple[int, str], int]:
        """How many wait, by priority as it is now and tenant."""
        counts: dict[tuple[int, str], int] = {}
        for job, place in self._places.items():
            counts[place.level, job.tenant] = counts.get((place.level, job.tenant), 0) + 1
        return counts

    def _turn(self, tenants: OrderedDict[str, _Tenant[J]]) -> J:
        """Whose turn it is: the first tenant in the round that can pay for its next job."""
        while True:
            name, tenant = next(iter(tenants.items()))
            if not tenant.on_turn:
                tenant.on_turn = True
                tenant.deficit += self._quantum
            job = self._first(tenant)
            # Alone, a tenant need not save up: nobody would use what it leaves.
            if job.cost <= tenant.deficit:
                return job
            if len(tenants) == 1:
                tenant.deficit = float(job.cost)
                return job
            tenant.on_turn = False
            tenants.move_to_end(name)

    def _first(self, tenant: _Tenant[J]) -> J:
        while True:
            _, number, job = tenant.jobs[0]
            place = self._places.get(job)
            if place is not None and place.number == number:
                return job
            heapq.heappop(tenant.jobs)

    def _stands(self, entry: tuple[float, int, J], level: int) -> bool:
        place = self._places.get(entry[2])
        return place is not None and place.number == entry[1] and place.level == level

    def _enter(self, job: J, level: int, number: int) -> None:
        self._places[job] = _Place(level, number)
        tenants = self._levels[level]
        if job.tenant not in tenants:
            tenants[job.tenant] = _Tenant()
        tenant = tenants[job.tenant]
        tenant.present += 1
        heapq.heappush(tenant.jobs, (_deadline(job), number, job))

    def _leave(self, job: J) -> None:
        place = self._places.pop(job)
        tenants = self._levels[place.level]
        tenant = tenants[job.tenant]
        tenant.present -= 1
        if not tenant.present:
            del tenants[job.tenant]  # and its deficit: nobody saves up while away
        elif len(tenant.jobs) > 2 * tenant.present + 16:  # who has left is not kept in mind for long
            tenant.jobs = [entry for entry in tenant.jobs if self._stands(entry, place.level)]
            heapq.heapify(tenant.jobs)
        if len(self._rising) > 2 * len(self._places) + 16:
            self._rising = [entry for entry in self._rising if self._rises(entry)]
            heapq.heapify(self._rising)

    def _rises(self, entry: tuple[float, int, J]) -> bool:
        place = self._places.get(entry[2])
        return place is not None and place.number == entry[1]

    def _rise(self, now: float) -> None:
        while self._rising and self._rising[0][0] <= now:
            entry = heapq.heappop(self._rising)
            if not self._rises(entry):
                continue
            due, _, job = entry
            level = self._places[job].level + 1
            self._leave(job)
            self._enter(job, level, next(self._numbers))
            if level < LEVELS - 1:
                heapq.heappush(self._rising, (due + self._ageing, self._places[job].number, job))


def _one(_: Waiting) -> float:
    return 1.0


def victims(
    queues: Sequence[JobQueue[Any]],
    newcomer: Waiting,
    needed: float,
    weight: Callable[[Any], float] = _one,
) -> list[Any] | None:
    """Who should give their places to *newcomer*, of all that wait in *queues*; None: nobody, refuse it.

    needed   how much room is missing
    weight   how much of it a job takes: by default each takes one place

    The lowest priority goes first, of it the tenant that has most, of it the latest deadline. Among equals a
    tenant gives way only to one that has less, the newcomer included: a flood takes no place from the others.
    """
    if needed <= 0:
        return []
    levels: dict[int, list[Any]] = {}
    held: defaultdict[str, float] = defaultdict(float)
    for queue in queues:
        for level, jobs in queue.by_level().items():
            levels.setdefault(level, []).extend(jobs)
            for job in jobs:
                held[job.tenant] += weight(job)
    chosen: list[Any] = []
    while needed > 0:
        level = min(levels, default=LEVELS)
        if level > newcomer.priority:
            return None
        here = Counter(job.tenant for job in levels[level])
        tenant = max(here, key=lambda name: (held[name], here[name]))
        if level == newcomer.priority and held[tenant] <= held[newcomer.tenant] + weight(newcomer):
            return None
        latest = max((job for job in reversed(levels[level]) if job.tenant == tenant), key=_deadline)
        levels[level].remove(latest)
        if not levels[level]:
            del levels[level]
        held[tenant] -= weight(latest)
        needed -= weight(latest)
        chosen.append(latest)
    return chosen


def _deadline(job: Waiting) -> float:
    return job.expires if job.expires is not None else job.arrived + PATIENCE_SECONDS
