"""Resolve the names of gRPC targets to addresses.

gRPC's own resolver resolves a name again only when a connection breaks, and at most every 30 seconds, so a
replica that is added to a headless DNS name would receive no work. `runtime.discovery` and `endpoints`
follow names by the functions of this module.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from headrace.channel import is_local, join, split


async def resolve(host: str, port: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the IPv4 and IPv6 addresses of a DNS name, as "1.2.3.4:port". Raises OSError if it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    v4 = {str(where[0]) for family, *_, where in found if family == socket.AF_INET}
    v6 = {str(where[0]) for family, *_, where in found if family == socket.AF_INET6}
    return frozenset(join(one, port) for one in v4), frozenset(join(one, port) for one in v6)


async def lookup(host: str, port: str) -> frozenset[str]:
    """Return the addresses of a DNS name, as "1.2.3.4:port". Raises OSError if it has none.

    If a name has addresses of both families, only IPv4 is used: both lead to the same replicas, and a replica
    that is counted twice appears half as busy as it is.
    """
    v4, v6 = await resolve(host, port)
    return v4 or v6


def dns_name(target: str) -> tuple[str, str] | None:
    """Return host and port of a target of the scheme dns; None for any other."""
    if not target.startswith("dns:"):
        return None
    rest = target.removeprefix("dns:")
    if rest.startswith("//"):
        authority, _, rest = rest.removeprefix("//").partition("/")
        if authority:
            return None  # the target names its DNS server: left to gRPC
    host, port = split(rest)
    return (host, port) if port.isdigit() else None


def replicated_name(target: str) -> tuple[str, str] | None:
    """Return host and port of a target that is a DNS name, which may stand for replicas; None for others.

    Like gRPC, it takes a target without a scheme for a DNS name.
    """
    name = dns_name(target) or (dns_name(f"dns:{target}") if "://" not in target else None)
    if name is None or is_local(target):
        return None
    try:
        ipaddress.ip_address(name[0])
    except ValueError:
        return name if name[0] else None
    return None
