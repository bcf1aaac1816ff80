"""Imitate NetworkPolicies by packet filters on the hosts.

A NetworkPolicy allows a pod's connections from and to named peers and ports, drops all others, and lets
replies through. On a host, that is a chain for incoming and one for outgoing packets with the policy `drop`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence

from tests.cluster.network import NAME_SERVER, Host, Network
from tests.cluster.services import BATCHER, GATEWAY, PORTS, ROUTER, WORKER

# Which roles may call a role: the intent of the NetworkPolicies in k8s/components/network-policies. Routers
# share the quotas of tenants.
ALLOWED: Mapping[str, Sequence[str]] = {
    GATEWAY: ("caller",),
    ROUTER: ("caller", GATEWAY, ROUTER),
    BATCHER: (ROUTER,),
    WORKER: (BATCHER,),
}
UNUSED_PORT = 443  # nothing listens there
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


def enforce(network: Network) -> None:
    """Let each server be called by the roles in `ALLOWED` only, and call only the name server and these."""
    for name, host in network.hosts.items():
        if (callers := ALLOWED.get(role_of(name))) is not None:
            incoming = [_from(one, PORTS[role_of(name)]) for one in _hosts(network, callers)]
            outgoing = [
                _to(one, PORTS[role])
                for role, allowed in ALLOWED.items()
                if role_of(name) in allowed
                for one in _hosts(network, (role,))
            ]
            host.filter(
                _rules(incoming, [*outgoing, f"ip daddr {network[NAME_SERVER].address} udp dport 53"])
            )


def lift(network: Network) -> None:
    """Remove all packet filters."""
    for host in network.hosts.values():
        host.filter("")


def _hosts(network: Network, roles: Sequence[str]) -> list[Host]:
    return [host for name, host in network.hosts.items() if role_of(name) in roles]


def _from(peer: Host, port: int) -> str:
    return f"ip saddr {peer.address} tcp dport {port}"


def _to(peer: Host, port: int) -> str:
    return f"ip daddr {peer.address} tcp dport {port}"


def _rules(incoming: Iterable[str], outgoing: Iterable[str]) -> str:
    chains = "".join(
        f"""
  chain {hook} {{
    type filter hook {hook} priority 0; policy drop;
    ct state established,related accept
    {"".join(f"{rule} accept; " for rule in accepted)}
  }}"""
        for hook, accepted in (("input", incoming), ("output", outgoing))
    )
    return f"table inet guard {{{chains}\n}}\n"


async def reaches(source: Host, target: Host, port: int) -> bool:
    """Return whether a TCP connection from one host to another is possible."""
    probe = await asyncio.create_subprocess_exec(
        *source.command(sys.executable, "-c", _PROBE, target.address, str(port), str(PROBE_SECONDS))
    )
    code = await probe.wait()
    assert code in (0, 3), f"the probe failed with {code}"
    return code == 0


async def matrix(network: Network, sources: Iterable[str]) -> dict[tuple[str, str], bool]:
    """Return which role reaches which other one, from each host in *sources* to the first of a role."""
    ports = {f"{role}0": port for role, port in PORTS.items()} | {"outsider": UNUSED_PORT}
    pairs = [(source, target) for source in sources for target in ports if source != target]
    found = await asyncio.gather(
        *(reaches(network[source], network[target], ports[target]) for source, target in pairs)
    )
    return {
        (role_of(source), role_of(target)): reached
        for (source, target), reached in zip(pairs, found, strict=True)
    }
