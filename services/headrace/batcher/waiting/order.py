"""Order waiting requests by priority, tenant and deadline.

Requests are ordered by priority. Within a priority, tenants take turns by deficit round robin (Shreedhar &
Varghese, SIGCOMM 1995), counted in tokens. Within a tenant, the earliest deadline is first. The priority of a
waiting request rises by one every *ageing* seconds, so that no request starves. Interrupted answers come
before all others, because their callers are already reading them. Plain data: the caller passes the current
time.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

from headrace.deadline import Deadline

LEVELS = 10
# A request without a deadline is ordered as if it had this long, so that it keeps its position.
DEFAULT_DEADLINE_SECONDS = 600.0


class Waiting(Protocol):
    """A waiting request, as the order and admission see it. Compared by identity.

    cost      tokens that serving it is expected to take, at least 1
    uncached  tokens to compute before its first new token
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
    def deadline(self) -> Deadline: ...


J = TypeVar("J", bound=Waiting)


@dataclass(slots=True)
class _Tenant(Generic[J]):
    """One tenant's requests of one level, earliest deadline first; stale entries are skipped."""

    jobs: list[tuple[float, int, J]] = field(default_factory=list)
    present: int = 0
    deficit: float = 0.0
    has_quantum: bool = False  # of this turn


@dataclass(slots=True)
class _Position:
    """The level of a request, the number of its heap entries at this level, and its uncached tokens."""

    level: int
    number: int
    uncached: int


class FairOrder(Generic[J]):
    """Waiting requests, in the order in which they are served.

    ageing    seconds after which the priority of a request rises by one
    quantum   tokens that a tenant may take per turn; a smaller quantum is fairer over short times

    uncached  the sum of all requests' `uncached`, as they were when each was added
    """

    def __init__(self, *, ageing: float = 10.0, quantum: int = 512) -> None:
        self._ageing = ageing
        self._quantum = quantum
        self._numbers = count()
        self._interrupted: OrderedDict[J, int] = OrderedDict()  # and its uncached tokens
        self._positions: dict[J, _Position] = {}
        self._levels: list[OrderedDict[str, _Tenant[J]]] = [OrderedDict() for _ in range(LEVELS)]
        self._rising: list[tuple[float, int, J]] = []
        self.uncached = 0

    def __len__(self) -> int:
        return len(self._interrupted) + len(self._positions)

    def __iter__(self) -> Iterator[J]:
        """Iterate over all waiting requests, in no particular order."""
        yield from self._interrupted
        yield from self._positions

    def __contains__(self, job: J) -> bool:
        return job in self._interrupted or job in self._positions

    @property
    def waiting(self) -> int:
        """The number of new requests that wait: interrupted answers do not count against a limit."""
        return len(self._positions)

    @property
    def interrupted(self) -> list[J]:
        """The answers that wait to be resumed; they come before all new requests."""
        return list(self._interrupted)

    def by_level(self) -> dict[int, list[J]]:
        """Return the new requests by their current priority, in no particular order."""
        levels: dict[int, list[J]] = {}
        for job, position in self._positions.items():
            levels.setdefault(position.level, []).append(job)
        return levels

    def counts(self) -> dict[tuple[int, str], int]:
        """Return the number of new requests by current priority and tenant."""
        counts: dict[tuple[int, str], int] = {}
        for job, position in self._positions.items():
            counts[position.level, job.tenant] = counts.get((position.level, job.tenant), 0) + 1
        return counts

    def oldest_wait(self, now: float) -> float:
        """Return how long the oldest request has waited, in seconds."""
        return max((now - job.arrived for job in self), default=0.0)

    def put(self, job: J) -> None:
        """Add a new request. The order itself has no bound: admission keeps it."""
        self._enter(job, job.priority, next(self._numbers))
        if job.priority < LEVELS - 1:
            heapq.heappush(self._rising, (job.arrived + self._ageing, self._positions[job].number, job))

    def put_back(self, job: J) -> None:
        """Add an interrupted answer."""
        self._interrupted[job] = job.uncached
        self.uncached += job.uncached

    def discard(self, job: J) -> bool:
        """Remove a request. Returns False if it does not wait here."""
        if job in self._interrupted:
            self.uncached -= self._interrupted.pop(job)
            return True
        if job not in self._positions:
            return False
        self._leave(job)
        return True

    def head(self, now: float) -> J | None:
        """Return the next new request. The result changes only when a request is added, removed or rises."""
        self._rise(now)
        for tenants in reversed(self._levels):
            if tenants:
                return self._next_of(tenants)
        return None

    def take(self, job: J) -> None:
        """Remove *job*, which `head` or `interrupted` returned, and charge its cost to its tenant."""
        if job not in self._interrupted:
            tenant = self._levels[self._positions[job].level][job.tenant]
            tenant.deficit -= job.cost
        self.discard(job)

    def ahead_of(self, newcomer: J) -> tuple[int, int]:
        """Return how many requests are served before *newcomer*, and the tokens computed for them first.

        *newcomer* does not wait here yet. The result is a lower bound: each other tenant of the same priority
        counts with no more than *newcomer*'s own tenant has ahead of it, because tenants take turns.
        """
        jobs, tokens = len(self._interrupted), sum(job.uncached for job in self._interrupted)
        own = (0, 0)
        others: dict[str, tuple[int, int]] = {}
        for job, position in self._positions.items():
            if position.level > newcomer.priority:
                jobs, tokens = jobs + 1, tokens + job.uncached
            elif position.level < newcomer.priority:
                continue
            elif job.tenant != newcomer.tenant:
                number, sum_ = others.get(job.tenant, (0, 0))
                others[job.tenant] = (number + 1, sum_ + job.uncached)
            elif due_at(job) <= due_at(newcomer):
                own = (own[0] + 1, own[1] + job.uncached)
        for number, sum_ in others.values():
            jobs += min(number, own[0] + 1)
            tokens += min(sum_, own[1] + newcomer.uncached)
        return jobs + own[0], tokens + own[1]

    def _next_of(self, tenants: OrderedDict[str, _Tenant[J]]) -> J:
        """Return the next request of a level: of the first tenant in the round whose deficit covers it."""
        while True:
            name, tenant = next(iter(tenants.items()))
            if not tenant.has_quantum:
                tenant.has_quantum = True
                tenant.deficit += self._quantum
            job = self._first(tenant)
            if job.cost <= tenant.deficit:
                return job
            if len(tenants) == 1:  # no other tenant waits, so saving up would only leave workers idle
                tenant.deficit = float(job.cost)
                return job
            tenant.has_quantum = False
            tenants.move_to_end(name)

    def _first(self, tenant: _Tenant[J]) -> J:
        while True:
            _, number, job = tenant.jobs[0]
            position = self._positions.get(job)
            if position is not None and position.number == number:
                return job
            heapq.heappop(tenant.jobs)

    def _enter(self, job: J, level: int, number: int) -> None:
        self._positions[job] = _Position(level, number, job.uncached)
        self.uncached += job.uncached
        tenants = self._levels[level]
        if job.tenant not in tenants:
            tenants[job.tenant] = _Tenant()
        tenant = tenants[job.tenant]
        tenant.present += 1
        heapq.heappush(tenant.jobs, (due_at(job), number, job))

    def _leave(self, job: J) -> None:
        position = self._positions.pop(job)
        self.uncached -= position.uncached
        tenants = self._levels[position.level]
        tenant = tenants[job.tenant]
        tenant.present -= 1
        if not tenant.present:
            del tenants[job.tenant]  # and its deficit: no tenant saves up while it has no requests
        elif len(tenant.jobs) > 2 * tenant.present + 16:  # bounds the entries of requests that left
            tenant.jobs = [entry for entry in tenant.jobs if self._is_current(entry)]
            heapq.heapify(tenant.jobs)
        if len(self._rising) > 2 * len(self._positions) + 16:
            self._rising = [entry for entry in self._rising if self._is_current(entry)]
            heapq.heapify(self._rising)

    def _is_current(self, entry: tuple[float, int, J]) -> bool:
        position = self._positions.get(entry[2])
        return position is not None and position.number == entry[1]

    def _rise(self, now: float) -> None:
        while self._rising and self._rising[0][0] <= now:
            entry = heapq.heappop(self._rising)
            if not self._is_current(entry):
                continue
            due, _, job = entry
            level = self._positions[job].level + 1
            self._leave(job)
            self._enter(job, level, next(self._numbers))
            if level < LEVELS - 1:
                heapq.heappush(self._rising, (due + self._ageing, self._positions[job].number, job))


def due_at(job: Waiting) -> float:
    """Return the time that orders *job* within its tenant: its deadline, or a default for none."""
    return job.deadline.at if job.deadline.exists else job.arrived + DEFAULT_DEADLINE_SECONDS
