"""Imitate NetworkPolicies by packet filters on the hosts.

A NetworkPolicy allows a pod's incoming connections from named peers to named ports, drops all others, and
lets replies through. On a host, that is a chain for incoming packets with the policy `drop`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence

from tests.cluster.network import NAME_SERVER, Host, Network
from tests.cluster.services import BATCHER, PORTS, ROUTER, WORKER

# Who may call whom: the intent of the NetworkPolicies in k8s/components/network-policies.
ALLOWED: Mapping[str, Sequence[str]] = {ROUTER: ("caller",), BATCHER: (ROUTER,), WORKER: (BATCHER,)}
PROBE_SECONDS = 2.0
# Exits with 0 if a connection is accepted, or refused because nobody listens: the packets passed.
_PROBE = """
import socket, sys
with socket.socket() as probe:
    probe.settimeout(float(sys.argv[3]))
    try:
        probe.connect((sys.argv[1], int(sys.argv[2])))
    except ConnectionRefusedError:
        pass
    except TimeoutError:
        sys.exit(3)
"""


def role_of(name: str) -> str:
    """Return the role of a host: `router` for `router0`."""
    return name.rstrip("0123456789")


def enforce(network: Network, allowed: Mapping[str, Sequence[str]] = ALLOWED) -> None:
    """Let each server be called only by the roles in *allowed*."""
    for name, host in network.hosts.items():
        if (callers := allowed.get(role_of(name))) is not None:
            peers = [one.address for other, one in network.hosts.items() if role_of(other) in callers]
            host.filter(_rules(peers, PORTS[role_of(name)]))


def lift(network: Network) -> None:
    """Remove all packet filters."""
    for host in network.hosts.values():
        host.filter("")


def _rules(peers: Iterable[str], port: int) -> str:
    return f"""
table inet policy {{
  chain input {{
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iif "lo" accept
    ip saddr {{ {", ".join(peers)} }} tcp dport {port} accept
  }}
}}
"""


async def reaches(source: Host, target: Host, port: int) -> bool:
    """Return whether a TCP connection from one host to another is possible."""
    probe = await asyncio.create_subprocess_exec(
        *source.command(sys.executable, "-c", _PROBE, target.address, str(port), str(PROBE_SECONDS))
    )
    code = await probe.wait()
    assert code in (0, 3), f"the probe failed with {code}"
    return code == 0


async def matrix(network: Network, sources: Iterable[str]) -> dict[tuple[str, str], bool]:
    """Return which role reaches the port of which other role, from one host of each in *sources*."""
    pairs = [
        (source, target)
        for source in sources
        for target in (f"{ROUTER}0", f"{BATCHER}0", f"{WORKER}0")
        if source != target and source != NAME_SERVER
    ]
    found = await asyncio.gather(
        *(reaches(network[source], network[target], PORTS[role_of(target)]) for source, target in pairs)
    )
    return {
        (role_of(source), role_of(target)): reached
        for (source, target), reached in zip(pairs, found, strict=True)
    }
