"""Keep a link to every worker of the tier, as workers join and leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import aclosing

from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.listener import LinkListener
from headrace.runtime.discovery import Discovery
from headrace.tls.files import TlsReader

log = logging.getLogger(__name__)


class WorkerPool:
    """The workers behind *targets*.

    targets       gRPC names; `dns:///host:port` stands for all addresses of the host
    fingerprint   of the batcher's tokenizer
    tls           for calls over TLS; None: plaintext
    """

    def __init__(
        self, targets: Sequence[str], *, fingerprint: str, batcher_id: str, tls: TlsReader | None = None
    ) -> None:
        self._targets = targets
        self._discovery = Discovery(targets)
        self._fingerprint = fingerprint
        self._batcher_id = batcher_id
        self._tls = tls
        self._links: dict[str, WorkerLink] = {}
        self._wanted: frozenset[str] = frozenset()
        self._kept: set[str] = set()

    def __iter__(self) -> Iterator[WorkerLink]:
        return iter(self._links.values())

    def __len__(self) -> int:
        return len(self._links)

    def ready(self) -> list[WorkerLink]:
        """Return the links to workers that accept work when they have free slots."""
        return [link for link in self if link.ready]

    def step_seconds(self) -> float:
        """Return the shortest step time of the ready workers, in seconds; 0 if none is ready."""
        return min((link.step_seconds for link in self.ready()), default=0.0)

    @property
    def problem(self) -> str:
        """Why no worker is ready, for people."""
        problems = [
            f"{link.target}: {link.problem or ('it makes no steps' if link.suspect else 'it left the tier')}"
            for link in self
            if not link.ready
        ]
        return "; ".join(problems) or f"no address found for {', '.join(self._targets)}"

    async def run(self, listener: LinkListener) -> None:
        """Resolve the names continuously, and keep a link to each address, until cancelled."""
        async with asyncio.TaskGroup() as tasks, aclosing(self._discovery.changes()) as changes:
            async for self._wanted in changes:
                for target, link in self._links.items():
                    if target not in self._wanted and not link.retiring:
                        log.info("worker left", extra={"target": target, "sequences": link.outstanding})
                        link.retire()
                for target in sorted(self._wanted - self._kept):
                    self._kept.add(target)
                    tasks.create_task(self._keep(target, listener))

    async def _keep(self, target: str, listener: LinkListener) -> None:
        # Repeats if an address returns before the last sequences of its previous link have ended.
        while target in self._wanted:
            log.info("worker found", extra={"target": target})
            link = self._links[target] = WorkerLink(
                target,
                fingerprint=self._fingerprint,
                batcher_id=self._batcher_id,
                listener=listener,
                tls=self._tls,
                server_name=self._discovery.server_name(target),
            )
            try:
                await link.run()
            finally:
                del self._links[target]
                listener.cache_lost(link)
                listener.changed()
        self._kept.discard(target)
