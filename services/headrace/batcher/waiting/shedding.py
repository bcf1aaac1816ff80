"""Choose which waiting requests are shed when a newcomer finds no free place.

The lowest priority is shed first, of it the tenant that holds most, of it the latest deadline. Within the
same priority, a tenant is shed only in favour of one that holds less, the newcomer included: a flood takes no
place from other tenants.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from headrace.batcher.waiting.order import LEVELS, Waiting, due_at


class Sheddable(Protocol):
    """Waiting requests that can be shed."""

    def by_level(self) -> dict[int, list[Any]]:
        """Return the requests by their current priority."""
        ...


def _one_place(_: Waiting) -> float:
    return 1.0


def victims(
    places: Sequence[Sheddable],
    newcomer: Waiting,
    needed: float,
    weight: Callable[[Any], float] = _one_place,
) -> list[Any] | None:
    """Return the requests to shed from *places* for *newcomer*; None to reject the newcomer instead.

    needed   the capacity that is missing
    weight   the capacity that a request frees; by default each frees one place
    """
    if needed <= 0:
        return []
    levels: dict[int, list[Any]] = {}
    held: defaultdict[str, float] = defaultdict(float)
    for place in places:
        for level, jobs in place.by_level().items():
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
        latest = max((job for job in reversed(levels[level]) if job.tenant == tenant), key=due_at)
        levels[level].remove(latest)
        if not levels[level]:
            del levels[level]
        held[tenant] -= weight(latest)
        needed -= weight(latest)
        chosen.append(latest)
    return chosen
