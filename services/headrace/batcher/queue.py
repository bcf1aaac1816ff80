"""Hold the jobs that wait for a worker: first come, first served, bounded, and free to leave."""

from __future__ import annotations

from collections.abc import Iterator

from headrace import errors
from headrace.batcher.job import Job


class JobQueue:
    """Jobs in order of arrival.

    limit   most jobs that may wait; a full queue is an answer, not a wait
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: dict[Job, None] = {}  # a dict keeps order and removes from the middle at once

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    def put(self, job: Job, *, retry_after: float) -> None:
        """Add a job at the end. Raises Overloaded, with *retry_after* seconds, when full."""
        if len(self._jobs) >= self.limit:
            raise errors.Overloaded(
                f"the queue is full ({self.limit} requests wait); retry after {retry_after:.1f} s",
                retry_after=retry_after,
                queued=len(self._jobs),
                limit=self.limit,
            )
        self._jobs[job] = None

    def take(self, count: int) -> list[Job]:
        """Remove the first *count* jobs."""
        taken = [job for job, _ in zip(self._jobs, range(count), strict=False)]
        for job in taken:
            del self._jobs[job]
        return taken

    def discard(self, job: Job) -> bool:
        """Remove a job wherever it stands; false if it is not here."""
        if job not in self._jobs:
            return False
        del self._jobs[job]
        return True

    def oldest_wait(self, now: float) -> float:
        """How long the first has waited, in seconds."""
        for job in self._jobs:
            return now - job.arrived
        return 0.0
