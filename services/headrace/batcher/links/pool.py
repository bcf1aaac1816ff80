"""Keep a link to every worker of the tier, as they come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import aclosing

from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.listener import Sink
from headrace.runtime.discovery import Discovery

log = logging.getLogger(__name__)


class WorkerPool:
    """The workers behind *targets*.

    targets       gRPC names; `dns:///host:port` stands for all addresses of the name
    fingerprint   of the batcher's tokenizer
    """

    def __init__(self, targets: Sequence[str], *, fingerprint: str, batcher_id: str) -> None:
        self._targets = targets
        self._discovery = Discovery(targets)
        self._fingerprint = fingerprint
        self._batcher_id = batcher_id
        self._links: dict[str, WorkerLink] = {}
        self._wanted: frozenset[str] = frozenset()
        self._kept: set[str] = set()

    def __iter__(self) -> Iterator[WorkerLink]:
        return iter(self._links.values())

    def __len__(self) -> int:
        return len(self._links)

    def ready(self) -> list[WorkerLink]:
        """The workers that take work, when they have room."""
        return [link for link in self if link.ready]

    @property
    def problem(self) -> str:
        """Why none is ready, for people."""
        problems = [
            f"{link.target}: {link.problem or ('it makes no steps' if link.suspect else 'it is leaving')}"
            for link in self
            if not link.ready
        ]
        return "; ".join(problems) or f"no address found for {', '.join(self._targets)}"

    async def run(self, sink: Sink) -> None:
        """Follow the names, and keep a link to each address, until cancelled."""
        async with asyncio.TaskGroup() as tasks, aclosing(self._discovery.changes()) as changes:
            async for self._wanted in changes:
                for target, link in self._links.items():
                    if target not in self._wanted and not link.retiring:
                        log.info("worker left", extra={"target": target, "sequences": link.outstanding})
                        link.retire()
                for target in sorted(self._wanted - self._kept):
                    self._kept.add(target)
                    tasks.create_task(self._keep(target, sink))

    async def _keep(self, target: str, sink: Sink) -> None:
        # More than once if an address returns while the last sequences of its former link end.
        while target in self._wanted:
            log.info("worker found", extra={"target": target})
            link = self._links[target] = WorkerLink(
                target, fingerprint=self._fingerprint, batcher_id=self._batcher_id, sink=sink
            )
            try:
                await link.run()
            finally:
                del self._links[target]
                sink.renewed(link)
                sink.changed()
        self._kept.discard(target)
