"""Targets and channels: how a gRPC target is written, and the options of every channel that Headrace opens.

Everything that dials imports this: the client, the router's hop to batchers, the batchers' hop to workers,
and the CLI. It knows nothing of the services behind a target.
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

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # either way, on every hop
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a word is noticed in half a minute. Servers allow a ping each 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Retrying is decided here, where it is known what the caller has seen; not twice.
    ("grpc.enable_retries", 0),
    # A server that comes back is found within half a second, not after up to two minutes as by default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
STALE_SECONDS = 0.05  # the longest that a connection which broke is taken for the channel's
NO_PROXY = ("grpc.enable_http_proxy", 0)

# In the order in which gRPC reads them; it does not read them in capitals.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXEMPTING_VARIABLES = ("no_grpc_proxy", "no_proxy")
_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|passthrough):", re.IGNORECASE)
_LOCAL_SCHEMES = ("unix", "unix-abstract", "vsock")


def open_channel(
    target: str, *, credentials: grpc.ChannelCredentials | None = None, direct: bool = False
) -> grpc.aio.Channel:
    """A channel with the message limits and keepalive that every hop of the mesh uses.

    credentials   for TLS; None speaks plain text
    direct        never through an HTTP proxy, as between processes of one mesh. Targets on this machine are
                  always dialled directly; for others gRPC's default applies (http_proxy and its kin)
    """
    options = (*CHANNEL_OPTIONS, NO_PROXY) if direct or is_local(target) else CHANNEL_OPTIONS
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


async def reconnected(channel: grpc.aio.Channel) -> None:
    """Wait for a connection, after a call whose connection broke.

    The calls fail before the channel notices: for some moments it is READY with a connection that is gone,
    and a call that is made then fails, too. READY counts only if it stays.
    """
    ready = grpc.ChannelConnectivity.READY
    if channel.get_state() is ready:
        with suppress(TimeoutError):
            async with asyncio.timeout(STALE_SECONDS):
                await channel.wait_for_state_change(ready)
    await channel.channel_ready()


def join(host: str, port: int | str) -> str:
    """Host and port as one address: an IPv6 address stands in brackets."""
    bare = host.removeprefix("[").removesuffix("]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def split(address: str) -> tuple[str, str]:
    """Host, without brackets, and port of HOST:PORT; the port is empty if there is none."""
    if address.startswith("["):
        host, _, rest = address.removeprefix("[").partition("]")
        return host, rest.removeprefix(":")
    if address.count(":") > 1:  # an IPv6 address alone
        return address, ""
    host, _, port = address.partition(":")
    return host, port


def target_problem(target: str) -> str:
    """What is wrong with the form of a gRPC target, for people; empty if nothing is.

    Only what no resolver of gRPC could use is a problem: names are not looked up here.
    """
    advice = "a target is HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051, or dns:///NAME:PORT"
    scheme = _SCHEME.match(target)
    if scheme and scheme[1].lower() not in ("dns", "ipv4", "ipv6"):
        return ""
    if not target.strip() or ("://" in target and not scheme):
        return f"{target!r} is no gRPC target; {advice}"
    for address in _addresses(target):
        host, port = split(address)
        if address.count(":") > 1 and not address.startswith("["):
            return f"{target!r} is an IPv6 address without brackets; {advice}"
        if not host:
            return f"{target!r} has no host; {advice}"
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            return f"{target!r} has no port from 1 to 65535; {advice}"
    return ""


def is_local(target: str) -> bool:
    """Whether all addresses of a target are on this machine by their form; names are not looked up."""
    scheme = _SCHEME.match(target)
    if scheme and scheme[1].lower() in _LOCAL_SCHEMES:
        return True
    return all(is_loopback(split(address)[0]) for address in _addresses(target))


def proxy_variable(target: str, environment: Mapping[str, str] | None = None) -> str:
    """The variable whose HTTP proxy a channel to *target* goes through; empty if it goes through none.

    It names no value: a proxy's address may hold a password.
    """
    environment = os.environ if environment is None else environment
    if is_local(target):
        return ""
    variable = next((name for name in _PROXY_VARIABLES if environment.get(name)), "")
    if not variable or urlsplit(environment[variable]).scheme != "http":  # gRPC takes no other
        return ""
    exempt = next((environment[name] for name in _EXEMPTING_VARIABLES if environment.get(name)), "")
    hosts = [split(address)[0] for address in _addresses(target)]
    return "" if all(_is_exempt(host, exempt.split(",")) for host in hosts) else variable


def _addresses(target: str) -> list[str]:
    """The HOST:PORT of a target; several of ipv4: and ipv6:."""
    scheme = _SCHEME.match(target)
    if scheme is None:
        return [target]
    rest = target[scheme.end() :]
    if rest.startswith("//"):
        rest = rest.removeprefix("//").partition("/")[2]
    return rest.split(",") if scheme[1].lower() in ("ipv4", "ipv6") else [rest]


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its form; names other than localhost are not looked up."""
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
    """Whether *host* is in a no_proxy list: by a suffix of its name, or by its network."""
    for entry in filter(None, (entry.strip() for entry in entries)):
        if host.lower().endswith(entry.lower()):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
