"""Refuse requests for hosts that are not this server: protection against DNS rebinding.

A web page can point a name of its own at a loopback address, and its scripts may then read the responses of
a server there, because for the browser they come from the page's own host. Only the header `host` shows it.
Addresses and localhost cannot be pointed elsewhere, so they are always permitted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.gateway.http.exchange import Exchange
from headrace.gateway.problems import Problem
from headrace.quoting import quoted

_LOCALHOST = "localhost"


class Hosts:
    """The ASGI application that passes on to *app* what is sent to one of *names*, or to this machine."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(map(str.lower, names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        # Clients of HTTP/1.0 may send none; browsers always do.
        sent = next((value for name, value in scope["headers"] if name == b"host"), None)
        if sent is None or self._permits(host := host_in(sent.decode("latin-1"))):
            await self._app(scope, receive, send)
            return
        await Exchange(scope, send).refuse(
            Problem(
                421,
                f"{quoted(host)} is not a name of this gateway, which serves callers without credentials as "
                "localhost or by its address; its operator can add names by --allow-hosts",
                code="unknown_host",
            )
        )

    def _permits(self, host: str) -> bool:
        return (
            host == _LOCALHOST or host in self._names or host.endswith("." + _LOCALHOST) or _is_address(host)
        )


def host_in(header: str) -> str:
    """Return the host in lower case of a header `host`, which may contain a port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().removesuffix(".")


@lru_cache(maxsize=16)  # callers choose them, and most send the same one
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
