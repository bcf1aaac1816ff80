"""Resolve gRPC targets to addresses, and report changes.

gRPC's own resolver resolves a name again only when a connection breaks, so a replica that is added to a
headless DNS name would receive no work. One channel over all replicas would also hide the load of each of
them. Here names are resolved every 1.5 seconds, and each address may have its own channel.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from headrace.channel import join, split

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 1.5


async def lookup(host: str, port: str) -> frozenset[str]:
    """Return the addresses of a DNS name, as "1.2.3.4:port". Raises OSError if it has none.

    If a name has addresses of both families, only IPv4 is used: both lead to the same replicas, and a replica
    that is counted twice appears half as busy as it is.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    v4 = {str(where[0]) for family, *_, where in found if family == socket.AF_INET}
    v6 = {str(where[0]) for family, *_, where in found if family == socket.AF_INET6}
    return frozenset(join(address, port) for address in v4 or v6)


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
            if not any(_name(target) for target in self._targets):
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
        name = _name(target)
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


def _name(target: str) -> tuple[str, str] | None:
    """Return host and port of a target that is resolved here; None for any other."""
    if not target.startswith("dns:"):
        return None
    rest = target.removeprefix("dns:")
    if rest.startswith("//"):
        authority, _, rest = rest.removeprefix("//").partition("/")
        if authority:
            return None  # the target names its DNS server: left to gRPC
    host, port = split(rest)
    return (host, port) if port.isdigit() else None
