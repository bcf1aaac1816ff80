"""Define the interface through which worker links report events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from headrace import errors
from headrace.batcher.inbox import SequenceEnd
from headrace.batcher.job import Job

if TYPE_CHECKING:
    from headrace.batcher.links.link import WorkerLink


class LinkListener(Protocol):
    """Receives the events of all links."""

    def changed(self) -> None:
        """The free slots or the readiness of a worker may have changed."""
        ...

    def stepped(self, now: float) -> None:
        """A step frame has arrived, and its tokens are counted."""
        ...

    def ended(self, link: WorkerLink, job: Job, end: SequenceEnd) -> None:
        """The worker has completed a job."""
        ...

    def failed(self, link: WorkerLink, job: Job, error: errors.HeadraceError) -> None:
        """The job has failed at the worker, which sends nothing more for it."""
        ...

    def prefilled(self, link: WorkerLink, job: Job, cached: int, *, used_cache: bool) -> None:
        """The worker has computed a job's prompt, of which it had *cached* tokens in its cache.

        used_cache   False: it computed all of the prompt, whatever it had cached
        """
        ...

    def inbox_full(self, link: WorkerLink, job: Job) -> None:
        """The job's reader is too slow: its inbox accepts no more tokens, while the worker generates more."""
        ...

    def dropped(self, job: Job, tokens: int) -> None:
        """Tokens of a job are not kept: it was cancelled at the worker, or its inbox is full."""
        ...

    def cache_lost(self, link: WorkerLink) -> None:
        """The worker has restarted or left, and its prefix cache is gone."""
        ...
