"""Parse gRPC targets and open channels, with the same options on every hop.

Used by the client, the router for its batchers, batchers for their workers, and the CLI. This module does not
know which service a target is.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

import grpc

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # in both directions, on every hop
# Clients and servers detect within 30 s that a peer is gone without closing its connection.
KEEPALIVE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.max_pings_without_data", 0),
    # Retries are decided by the client library, which knows what the caller has received.
    ("grpc.enable_retries", 0),
    # Reconnect within half a second; the default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
STALE_SECONDS = 0.05  # the longest time for which a channel reports a lost connection as READY
NO_PROXY = ("grpc.enable_http_proxy", 0)

# In the order in which gRPC reads them. It does not read the upper-case names.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXEMPTING_VARIABLES = ("no_grpc_proxy", "no_proxy")
_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|passthrough):", re.IGNORECASE)
_LOCAL_SCHEMES = ("unix", "unix-abstract", "vsock")


def open_channel(
    target: str, *, credentials: grpc.ChannelCredentials | None = None, direct: bool = False
) -> grpc.aio.Channel:
    """Open a channel with the options of this module.

    credentials   for TLS; None for plaintext
    direct        do not use an HTTP proxy, as between processes of one mesh. Targets on this machine never
                  use one; for others gRPC reads http_proxy and similar variables by default
    """
    options = (*CHANNEL_OPTIONS, NO_PROXY) if direct or is_local(target) else CHANNEL_OPTIONS
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


async def reconnected(channel: grpc.aio.Channel) -> None:
    """Wait until the channel is connected again, after a call failed because its connection was lost.

    Calls fail before the channel changes its state: for a moment it is READY with a lost connection, and
    further calls fail as well. So READY counts only if it lasts for STALE_SECONDS.
    """
    ready = grpc.ChannelConnectivity.READY
    if channel.get_state() is ready:
        with suppress(TimeoutError):
            async with asyncio.timeout(STALE_SECONDS):
                await channel.wait_for_state_change(ready)
    await channel.channel_ready()


def join(host: str, port: int | str) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    bare = host.removeprefix("[").removesuffix("]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def split(address: str) -> tuple[str, str]:
    """Split HOST:PORT into the host, without brackets, and the port, which may be empty."""
    if address.startswith("["):
        host, _, rest = address.removeprefix("[").partition("]")
        return host, rest.removeprefix(":")
    if address.count(":") > 1:  # an IPv6 address without a port
        return address, ""
    host, _, port = address.partition(":")
    return host, port


def target_problem(target: str) -> str:
    """Return what is wrong with the form of a gRPC target, as a message; empty if it is valid.

    Names are not resolved: only a form that none of gRPC's resolvers accepts is a problem.
    """
    advice = "a target is HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051, or dns:///NAME:PORT"
    scheme = _SCHEME.match(target)
    if scheme and scheme[1].lower() not in ("dns", "ipv4", "ipv6"):
        return ""
    if not target.strip() or ("://" in target and not scheme):
        return f"{target!r} is not a gRPC target; {advice}"
    for address in _addresses(target):
        host, port = split(address)
        if address.count(":") > 1 and not address.startswith("["):
            return f"{target!r} is an IPv6 address without brackets; {advice}"
        if not host:
            return f"{target!r} has no host; {advice}"
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            return f"{target!r} has no port from 1 to 65535; {advice}"
    return ""


def server_address(target: str) -> tuple[str, int] | None:
    """Return host and port of a target; None if it has several addresses, or none with a port."""
    scheme = _SCHEME.match(target)
    if scheme and scheme[1].lower() in _LOCAL_SCHEMES:
        return None
    addresses = _addresses(target)
    host, port = split(addresses[0])
    return (host, int(port)) if len(addresses) == 1 and port.isascii() and port.isdigit() else None


def is_local(target: str) -> bool:
    """Return whether all addresses of a target are on this machine. Names are not resolved."""
    scheme = _SCHEME.match(target)
    if scheme and scheme[1].lower() in _LOCAL_SCHEMES:
        return True
    return all(is_loopback(split(address)[0]) for address in _addresses(target))


def proxy_variable(target: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the name of the variable that sets the HTTP proxy for *target*; empty if there is no proxy.

    The value is not returned: a proxy's address may contain a password.
    """
    environment = os.environ if environment is None else environment
    if is_local(target):
        return ""
    variable = next((name for name in _PROXY_VARIABLES if environment.get(name)), "")
    if not variable or urlsplit(environment[variable]).scheme != "http":  # gRPC ignores others
        return ""
    exempt = next((environment[name] for name in _EXEMPTING_VARIABLES if environment.get(name)), "")
    hosts = [split(address)[0] for address in _addresses(target)]
    return "" if all(_is_exempt(host, exempt.split(",")) for host in hosts) else variable


def _addresses(target: str) -> list[str]:
    """Return each HOST:PORT of a target; the schemes ipv4: and ipv6: allow several."""
    scheme = _SCHEME.match(target)
    if scheme is None:
        return [target]
    rest = target[scheme.end() :]
    if rest.startswith("//"):
        rest = rest.removeprefix("//").partition("/")[2]
    return rest.split(",") if scheme[1].lower() in ("ipv4", "ipv6") else [rest]


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine. Names other than localhost are not resolved."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1
        except (OSError, UnicodeError):
            return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return any(one.is_loopback or one.is_unspecified for one in (address, mapped) if one is not None)


def _is_exempt(host: str, entries: Iterable[str]) -> bool:
    """Return whether a no_proxy list contains *host*: by a suffix of its name or by its network."""
    for entry in filter(None, (entry.strip() for entry in entries)):
        if host.lower().endswith(entry.lower()):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
