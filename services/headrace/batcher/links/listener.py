"""What the links to workers report, and to whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from headrace import errors
from headrace.batcher.inbox import End
from headrace.batcher.job import Job

if TYPE_CHECKING:
    from headrace.batcher.links.link import WorkerLink


class Sink(Protocol):
    """Who hears what becomes of the jobs."""

    def changed(self) -> None:
        """Room or readiness of a worker may have changed."""
        ...

    def ended(self, link: WorkerLink, job: Job, end: End) -> None:
        """The worker has said the last of a job."""
        ...

    def failed(self, link: WorkerLink, job: Job, error: errors.HeadraceError) -> None:
        """The worker will say no more of a job, and why."""
        ...

    def prefilled(self, link: WorkerLink, job: Job, cached: int) -> None:
        """The worker has computed a job's prompt, and had so many tokens of it before."""
        ...

    def full(self, link: WorkerLink, job: Job) -> None:
        """The job's reader is so far behind that no more is kept for it, and the worker goes on."""
        ...

    def renewed(self, link: WorkerLink) -> None:
        """The worker is another process than before: it remembers nothing."""
        ...
