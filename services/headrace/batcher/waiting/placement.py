"""Choose a worker for a job: by room, by the work that waits there, and by what it has computed already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# A sequence under way makes every step of its worker longer: counted as so many prompt tokens.
SEQUENCE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that takes work now, as placement sees it.

    room        how many more sequences it takes, at least 1
    sequences   sequences of this batcher that it has
    backlog     prompt tokens that wait there to be computed
    others      of those, other batchers'
    budget      most that may wait there
    rate        prompt tokens that it computes per second; 0 while unknown
    held        tokens of this job's prompt that it has computed already
    probation   whether it has a job that may be what killed another worker
    shares      whether it keeps what it has computed for prompts that begin alike
    """

    name: str
    room: int
    sequences: int
    backlog: int
    budget: int
    rate: float = 0.0
    held: int = 0
    others: int = 0
    probation: bool = False
    shares: bool = False

    def takes(self, tokens: int) -> bool:
        """Whether a job of *tokens* may go there without standing in line for long.

        With nothing of our own in line there, any job may: what other batchers have there need never end.
        """
        return self.backlog == self.others or self.backlog + tokens - self.held <= self.budget


def choose(
    candidates: Iterable[Candidate], tokens: int, *, avoid: str = "", probation: bool = False
) -> Candidate | None:
    """The worker for a job of *tokens*; None if none of them should have it now.

    avoid       a worker that just failed it: only where there is no other
    probation   whether the job may be what killed a worker: then only where no other such job is
    """
    able = [candidate for candidate in candidates if candidate.takes(tokens)]
    if probation:
        able = [candidate for candidate in able if not candidate.probation]
    if any(candidate.name != avoid for candidate in able):
        able = [candidate for candidate in able if candidate.name != avoid]
    fastest = max((candidate.rate for candidate in able), default=0.0)

    def cost(candidate: Candidate) -> tuple[float, int]:
        work = candidate.backlog + tokens - candidate.held + SEQUENCE_TOKENS * candidate.sequences
        # One whose pace is not known yet is taken for as good as the best.
        return work * (fastest / candidate.rate if candidate.rate > 0 else 1.0), -candidate.room

    return min(able, key=cost, default=None)
