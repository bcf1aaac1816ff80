"""Choose a worker for a job, by free slots, by the work that waits there and by cached prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# A running sequence lengthens every step of its worker. It counts as this many prompt tokens.
SEQUENCE_TOKENS = 64


@dataclass(slots=True)
class WorkerCandidate:
    """A worker that accepts work now.

    free_slots        sequences that it accepts now, at least 1
    sequences         this batcher's sequences at the worker
    backlog           prompt tokens that wait there to be computed
    others_backlog    the part of `backlog` that belongs to other batchers
    budget            the most prompt tokens that may wait there
    prefill_rate      prompt tokens that it computes per second; 0 while unknown
    cached            tokens of this job's prompt that it has cached
    probation         whether it runs a job that may have killed another worker
    shares_prefixes   whether it caches prefixes
    """

    name: str
    free_slots: int
    sequences: int
    backlog: int
    budget: int
    prefill_rate: float = 0.0
    cached: int = 0
    others_backlog: int = 0
    probation: bool = False
    shares_prefixes: bool = False

    def accepts(self, tokens: int) -> bool:
        """Return whether a job of *tokens* would start there soon.

        A worker where none of this batcher's prompts wait accepts any job, because the backlog of other
        batchers may never end.
        """
        return self.backlog == self.others_backlog or self.backlog + tokens - self.cached <= self.budget


def choose(
    candidates: Iterable[WorkerCandidate], tokens: int, *, avoid: str = "", probation: bool = False
) -> WorkerCandidate | None:
    """Return the worker for a job of *tokens*; None if the job should wait.

    avoid       the worker that the job failed on last: chosen only if there is no other
    probation   whether the job may have killed a worker: then no worker with another such job is chosen
    """
    able = [candidate for candidate in candidates if candidate.accepts(tokens)]
    if len(able) == 1 and not probation:
        return able[0]
    if probation:
        able = [candidate for candidate in able if not candidate.probation]
    if any(candidate.name != avoid for candidate in able):
        able = [candidate for candidate in able if candidate.name != avoid]
    fastest = max((candidate.prefill_rate for candidate in able), default=0.0)

    def cost(candidate: WorkerCandidate) -> tuple[float, int]:
        work = candidate.backlog + tokens - candidate.cached + SEQUENCE_TOKENS * candidate.sequences
        # A worker whose rate is unknown counts as the fastest.
        slowdown = fastest / candidate.prefill_rate if candidate.prefill_rate > 0 else 1.0
        return work * slowdown, -candidate.free_slots

    return min(able, key=cost, default=None)
