"""Find the addresses behind gRPC targets, and notice when they change.

gRPC's own resolver looks again only when a connection breaks, so a replica that joins a headless DNS name
would get no work, and one channel over all replicas would hide which of them is how busy. Here a name is
resolved every second or so, and each address may have a channel of its own.
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
    """The addresses of a DNS name, as "1.2.3.4:port". Raises OSError where it has none.

    Of a name with addresses of both families only those of IPv4 are used: they are two ways to the same
    replicas, and a replica that is counted twice looks half as busy as it is.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    v4 = {str(where[0]) for family, *_, where in found if family == socket.AF_INET}
    v6 = {str(where[0]) for family, *_, where in found if family == socket.AF_INET6}
    return frozenset(join(address, port) for address in v4 or v6)


class Discovery:
    """The addresses of a list of targets.

    targets   "host:port", which is its own only address, or "dns:///name:port", which is looked up;
              other gRPC targets are left to gRPC
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
        # A name server that is down takes nobody away: what was found last stays.
        self._found: dict[str, frozenset[str]] = {}
        self._told: dict[str, str] = {}

    async def changes(self) -> AsyncGenerator[frozenset[str], None]:
        """All addresses, at once and then whenever they have changed."""
        known: frozenset[str] | None = None
        while True:
            now = await self.addresses()
            if now != known:
                known = now
                yield now
            if not any(_name(target) for target in self._targets):
                await asyncio.Event().wait()  # nothing to look up, nothing will change
            await asyncio.sleep(self._resolve_seconds)

    async def addresses(self) -> frozenset[str]:
        """All addresses, looked up now."""
        return frozenset().union(*[await self._resolve(target) for target in self._targets])

    async def _resolve(self, target: str) -> frozenset[str]:
        name = _name(target)
        if name is None:
            return frozenset({target})
        try:
            self._found[target] = await self._lookup(*name)
            self._told.pop(target, None)
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a name, such as a..b
            if self._told.get(target) != str(error):
                self._told[target] = str(error)
                log.warning("name not resolved", extra={"target": target, "problem": str(error)})
        return self._found.get(target, frozenset())


def _name(target: str) -> tuple[str, str] | None:
    """Host and port of a target that is to be looked up here; None for any other."""
    if not target.startswith("dns:"):
        return None
    rest = target.removeprefix("dns:")
    if rest.startswith("//"):
        authority, _, rest = rest.removeprefix("//").partition("/")
        if authority:
            return None  # a name server of its own: gRPC knows how to ask it
    host, port = split(rest)
    return (host, port) if port.isdigit() else None
