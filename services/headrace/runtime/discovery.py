"""Resolve gRPC targets to addresses, and report changes.

One channel over all replicas of a name would hide the load of each of them, and not follow the name (see
`endpoints.resolving`). Here names are resolved every 1.5 seconds, and each address may have its own channel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from headrace.channel import split
from headrace.endpoints.resolving import dns_name, lookup

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 1.5


class Discovery:
    """Resolves a list of targets to addresses.

    targets   "dns:///name:port" is resolved here; "host:port" and other gRPC targets are passed on unchanged
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        resolve_seconds: float = RESOLVE_SECONDS,
        lookup: Callable[[str, str], Awaitable[frozenset[str]]] = lookup,
    ) -> None:
        self._targets = list(targets)
        self._resolve_seconds = resolve_seconds
        self._lookup = lookup
        # While a name server is down, the last result remains valid.
        self._found: dict[str, frozenset[str]] = {}
        self._reported: dict[str, str] = {}

    async def changes(self) -> AsyncGenerator[frozenset[str], None]:
        """Yield all addresses, first immediately and then after each change."""
        known: frozenset[str] | None = None
        while True:
            now = await self.addresses()
            if now != known:
                known = now
                yield now
            if not any(dns_name(target) for target in self._targets):
                await asyncio.Event().wait()  # nothing to resolve, nothing changes
            await asyncio.sleep(self._resolve_seconds)

    async def addresses(self) -> frozenset[str]:
        """Resolve all targets now."""
        return frozenset().union(*[await self._resolve(target) for target in self._targets])

    def server_name(self, address: str) -> str:
        """Return the name that *address* was resolved from, which its certificate contains; else empty."""
        names = (target for target, found in self._found.items() if address in found)
        return split(next(names, "").removeprefix("dns:").rpartition("/")[2])[0]

    async def _resolve(self, target: str) -> frozenset[str]:
        name = dns_name(target)
        if name is None:
            return frozenset({target})
        try:
            self._found[target] = await self._lookup(*name)
            self._reported.pop(target, None)
        except (OSError, UnicodeError) as error:  # UnicodeError for invalid names, such as a..b
            if self._reported.get(target) != str(error):
                self._reported[target] = str(error)
                log.warning("name not resolved", extra={"target": target, "problem": str(error)})
        return self._found.get(target, frozenset())
