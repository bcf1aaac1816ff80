"""Check whether a server can bind an address, before gRPC tries, and explain why not.

gRPC reports every bind failure with the same text. For a name with several addresses it also accepts a
partial success: `localhost` with 127.0.0.1 in use would listen on ::1 only, and callers of 127.0.0.1 would
reach the other process.
"""

from __future__ import annotations

import errno
import socket

from headrace.channel import join

_PRIVILEGED_BELOW = 1024
# The addresses that gRPC binds for these names, whatever the system's resolver returns.
_AS_GRPC = {
    "0.0.0.0": ("0.0.0.0", "::"),
    "::": ("::", "0.0.0.0"),
    "localhost": ("127.0.0.1", "::1"),
}


def bind_error(host: str, port: int, *, shared: bool = False) -> OSError | UnicodeError | None:
    """Return the error of binding *host*, an address or a name, and *port*; None if it can be bound.

    shared   whether other servers that share the port may listen on it

    Resolves names, which may take seconds: call it on a thread.
    """
    try:
        found = [
            one
            for name in _AS_GRPC.get(host.lower(), (host,))
            for one in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        ]
    except (OSError, UnicodeError) as error:  # UnicodeError for invalid names, such as a..b
        return error
    tried = (_bind(family, where, shared) for family, *_, where in found)
    problems = [problem for problem in tried if problem is not None]
    taken = next((problem for problem in problems if problem.errno == errno.EADDRINUSE), None)
    return taken or (problems[0] if len(problems) == len(found) else None)


def _bind(family: int, where: tuple[object, ...], shared: bool) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)
    except OSError as error:
        return error
    return None


def explain(problem: Exception, host: str, port: int, setting: str = "--port") -> str:
    """Return the bind error as a message, with what to do about it; *setting* is that of the port."""
    return f"cannot listen on {join(host, port)}: {_cause(problem, host, port, setting)}"


def _cause(problem: Exception, host: str, port: int, setting: str) -> str:
    if isinstance(problem, (socket.gaierror, UnicodeError)):
        return f"{host!r} does not resolve ({problem}); --host must be an address of this machine or its name"
    number = problem.errno if isinstance(problem, OSError) else None
    if number == errno.EADDRINUSE:
        advice = "the port is in use by another process; stop it or set another"
        return f"{advice} {setting}" + (" (0 picks a free one)" if setting == "--port" else "")
    if number == errno.EADDRNOTAVAIL:
        return "this machine does not have this address; use --host 0.0.0.0 for all its addresses"
    if number in (errno.EACCES, errno.EPERM) and port < _PRIVILEGED_BELOW:
        return (
            f"ports below {_PRIVILEGED_BELOW} need root or the capability NET_BIND_SERVICE; set another "
            f"{setting}"
        )
    if number == errno.EAFNOSUPPORT:
        return "this machine has no IPv6; set --host to an IPv4 address, such as 127.0.0.1 or 0.0.0.0"
    if number == errno.EINVAL and host.lower().startswith("fe80"):
        return "a link-local address needs its interface, such as fe80::1%eth0"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    return "gRPC cannot bind it; --host must be an address of this machine, such as 127.0.0.1, 0.0.0.0 or ::"
